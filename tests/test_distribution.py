"""What is published: the sdist, the wheel built from it, and the wheel installed beside nothing but what it requires."""

import re
import subprocess
import sys
import tarfile
import venv
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

import kdecore

ROOT = Path(__file__).parent.parent
NAME = f"kdecore-{kdecore.__version__}"


def run(*command, cwd=None):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def source(sdist):
    with tarfile.open(sdist) as archive:
        # The first releases of Python 3.11 have no filters.
        archive.extractall(sdist.parent / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return sdist.parent / "unpacked" / NAME


@pytest.fixture(scope="module")
def wheel(source):
    """Built from the sdist, as those who publish and those who have no wheel do."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", source / "dist", cwd=source)
    (found,) = (source / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment's Python, with the wheel and links to what the wheel requires, and to nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    scripts = folder / "bin"
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-index", wheel)
    packages = Path(run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in required("kdecore"):
        for entry in {file.parts[0] for file in metadata.files(name)} - {".."}:
            (packages / entry).symlink_to(metadata.distribution(name).locate_file(entry))
    return scripts


def required(name):
    """Return distributions that one requires without extras, and those that these require."""
    lines = [line for line in metadata.requires(name) or () if ";" not in line]
    direct = {re.match(r"[\w-]+", line)[0] for line in lines}
    return direct.union(*map(required, direct))


def held(wheel):
    with ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_sdist_holds_what_is_needed_to_test_and_to_cite_it(sdist, source):
    assert sdist.name == f"{NAME}.tar.gz"
    names = {path.name for path in source.iterdir()} - {"dist"}
    assert names >= {"README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "CITATION.cff", "pyproject.toml", "Makefile"}
    assert names >= {"kdecore", "adapters", "tests", "docs", "examples", "bench"}
    tracked = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py")}
    assert {path.relative_to(source) for path in (source / "tests").rglob("*.py")} == tracked


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    names = held(wheel)
    assert {name.partition("/")[0] for name in names} == {"kdecore", "kdecore_adapters", f"{NAME}.dist-info"}
    for package, folder in (("kdecore", ROOT), ("kdecore_adapters", ROOT / "adapters")):
        files = [path.relative_to(folder) for path in (folder / package).rglob("*") if "__pycache__" not in path.parts]
        assert {name for name in names if name.startswith(f"{package}/")} == {
            path.as_posix() for path in files if (folder / path).is_file()
        }
        assert f"{package}/py.typed" in names


def test_the_metadata_say_what_pyproject_does(wheel):
    with ZipFile(wheel) as archive:
        said = message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))
        entry_points = archive.read(f"{NAME}.dist-info/entry_points.txt").decode()
        assert f"{NAME}.dist-info/licenses/LICENSE" in archive.namelist()
    assert (said["Name"], said["Version"], said["Requires-Python"]) == ("kdecore", kdecore.__version__, ">=3.11")
    assert said["License-Expression"] == "BSD-3-Clause"
    assert said.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    always = [line for line in said.get_all("Requires-Dist") if ";" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in always] == ["array-api-compat", "numba", "numpy"]
    assert {"torch", "transformers", "diffusers", "cuda", "sklearn", "cli"} <= set(said.get_all("Provides-Extra"))
    for group in ("console_scripts", "kdecore.backends", "vllm_omni.sparse_attn"):
        assert f"[{group}]\n" in entry_points


def test_one_version_everywhere():
    assert f"version: {kdecore.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert (
        re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == kdecore.__version__
    )
    assert f"gets fixes: {kdecore.__version__.rpartition('.')[0]}." in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


PROGRAM = """
from pathlib import Path
import sys
import numpy
import kdecore, kdecore.kde

assert Path(kdecore.__file__).is_relative_to(sys.prefix), kdecore.__file__
q, k, v = numpy.random.default_rng(0).standard_normal((3, 300, 8))
logits = q @ k.T / 8**0.5
weights = numpy.exp(logits - logits.max(axis=1, keepdims=True))
exact = weights @ v / weights.sum(axis=1, keepdims=True)
numpy.testing.assert_allclose(kdecore.attention(q, k, v), exact, rtol=1e-10)
out, report = kdecore.attention(q, k, v, method="sortlsh", budget=64, kernels="array-api", return_report=True)
assert report.method == "sortlsh" and report.certificate is not None and str(report)
assert kdecore.kde.log_gaussian_kde(k, q).shape == (300,)
for name in sorted({name.partition(".")[0] for name in sys.modules}):
    file = getattr(sys.modules[name], "__file__", None)
    if file and "site-packages" in file:
        print(name)
"""


def test_the_wheel_runs_with_what_it_requires_and_nothing_else(installed):
    loaded = run(installed / "python", "-I", "-W", "error", "-c", PROGRAM).split()
    assert {"kdecore", "numpy", "numba", "array_api_compat"} <= set(loaded)
    assert {name for name in loaded if not name.startswith("_")} <= {
        "kdecore", "kdecore_adapters", "numpy", "numba", "llvmlite", "array_api_compat",
    }  # fmt: skip


def test_the_command_says_what_it_lacks(installed):
    assert f"kdecore {kdecore.__version__}" in run(installed / "kdecore", "info")
    compared = subprocess.run([installed / "kdecore", "compare"], capture_output=True, text=True, check=False, timeout=60)
    assert compared.returncode == 2
    assert "pip install" in compared.stderr


def test_without_scikit_learn_and_pytorch_their_parts_name_what_is_missing(installed):
    for module, library in (("kdecore.neighbors", "scikit-learn"), ("kdecore_adapters.torch_adapter", "torch")):
        program = f"import {module}"
        done = subprocess.run([installed / "python", "-c", program], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert re.search(rf"ModuleNotFoundError: .*{library}", done.stderr)
