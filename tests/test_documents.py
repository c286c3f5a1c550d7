"""Code in README and the guides runs as it stands there, what can't run here has the right names, and no page is missing."""

import ast
import importlib
import inspect
import re
import socket
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RUN = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)```", re.DOTALL)
NEEDS = {
    "README.md": ("torch",),
    "arrays.md": ("torch",),
    "densities.md": ("sklearn",),
    "diffusers.md": ("torch", "diffusers"),
    "hugging_face.md": ("torch", "transformers"),
    "processes.md": ("torch",),
    "pytorch.md": ("torch",),
    "scikit_learn.md": ("sklearn",),
}
"""Page → libraries that its code is about."""


def blocks(path):
    """Return a page's Python, each block where it stands on the page, and whether it can be run here."""
    text = path.read_text(encoding="utf-8")
    return [("\n" * text[: found.start(2)].count("\n") + found[2], found[1] is None) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_code_of_a_page_runs(path, request, capsys):
    for library in NEEDS.get(path.name, ()):
        pytest.importorskip(library)
    if path.name == "processes.md":
        request.getfixturevalue("one_process")
    names = {}
    for code, runs in blocks(path):
        if runs:
            exec(compile(code, path, "exec"), names)
    printed = capsys.readouterr().out
    assert "print(" not in "".join(code for code, runs in blocks(path) if runs) or printed.strip()


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells the only process of a group, which is left afterwards."""
    from torch import distributed

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("path", [*RUN, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_code_of_a_page_names_what_is_there(path):
    """Modules, their names, and arguments of kdecore's functions; also where a block isn't run."""
    names = {"kdecore": importlib.import_module("kdecore")}
    for code, _ in blocks(path):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("kdecore"):
                module = pytest.importorskip(node.module)
                names |= {alias.asname or alias.name: member(module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (function := named(node.func, names)) is not None:
                check_arguments(function, node)


def member(module, name):
    """Return a module's name, which may be a module itself."""
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{module.__name__}.{name}")


def named(node, names):
    """Return what of kdecore an expression names, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        owner = names.get(node.value.id)
        return getattr(owner, node.attr) if isinstance(owner, ModuleType) else None
    return None


OPTIONS = {"cuda_graph", "layers", *inspect.signature(importlib.import_module("kdecore").attention).parameters}
"""What functions that pass options on may be given."""


def check_arguments(function, call):
    """Assert that a call's keywords are parameters, or options of kdecore where these are passed on."""
    parameters = inspect.signature(function).parameters
    passes = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for keyword in call.keywords:
        assert keyword.arg is None or keyword.arg in parameters or (passes and keyword.arg in OPTIONS), keyword.arg


def test_what_is_not_run_says_why():
    marked = [code for path in RUN for code, runs in blocks(path) if not runs]
    assert len(marked) == 3
    assert all("cupy" in code or "from_pretrained" in code for code in marked)


def test_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


PUBLIC = (
    "kdecore",
    "kdecore.kde",
    "kdecore.neighbors",
    "kdecore.testing",
    "kdecore_adapters.torch_adapter",
    "kdecore_adapters.torch_modules",
    "kdecore_adapters.hosts",
    "kdecore_adapters.distributed",
)


def test_every_public_name_stands_in_the_reference():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    expected = {"kdecore_adapters.transformers_adapter.register", "kdecore_adapters.torch_graphs.clear_graphs"}
    for name in PUBLIC:
        expected |= {f"{name}.{one}" for one in pytest.importorskip(name).__all__}
    assert shown == expected


def test_every_page_stands_in_the_navigation():
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    files = [path for kind in ("*.md", "*.ipynb") for path in (ROOT / "docs").rglob(kind)]
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".md")) for path in files}
    assert pages | {"index.md", "contributing.md", "changelog.md"} == set(listed)
