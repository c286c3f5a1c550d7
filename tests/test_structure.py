"""The tree of folders is the picture: a package imports only those below it, and the core no adapter."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compare", "testing", "neighbors", "api", "accuracy", "engine", "methods", "kde", "kernels", "core", "arrays")
"""From the top down."""
BELOW = {name: set(PACKAGES[number:]) for number, name in enumerate(PACKAGES)} | {"kde": {"kde", "arrays"}}
"""What files of a package may import."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "kdecore").rglob("*.py"))
}
"""Module → its file."""


@cache
def imported(module):
    """Return which modules of kdecore a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {one if (one := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
    return {name for name in found if name.partition(".")[0] in ("kdecore", "kdecore_adapters")}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below(package):
    mine = [module for module in FILES if module.split(".")[1:2] == [package]]
    assert mine
    for module in mine:
        for other in imported(module):
            # Its version is kdecore's own.
            assert other == "kdecore" or other.split(".")[1] in BELOW[package], f"{module} imports {other}"


def test_no_file_names_an_adapter():
    for module, path in FILES.items():
        assert "kdecore_adapters" not in path.read_text(encoding="utf-8"), module


def test_files_import_each_other_in_no_circle():
    """Neither at the top of files nor within functions, but for kdecore's version."""
    TopologicalSorter({module: imported(module) - {"kdecore"} for module in FILES}).prepare()


def test_kdecore_is_its_packages():
    entries = {path.name for path in (ROOT / "kdecore").iterdir() if path.name != "__pycache__"}
    assert entries == {*PACKAGES, "__init__.py", "__main__.py", "py.typed"}


SOURCES = [path for folder in ("kdecore", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))]
ONE_IDEA = [path for path in SOURCES if "kernels" not in path.parts]


@pytest.mark.parametrize("path", ONE_IDEA, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    """400 lines, and 80 without the docstring; kernels are written out."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            said = node.body[0] if ast.get_docstring(node, clean=False) else None
            lines = node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)
            assert lines <= 80, node.name


@pytest.mark.parametrize(
    "path",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bench").rglob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_of_documents_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []
