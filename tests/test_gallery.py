"""The gallery's notebooks run, and print what is stored in them; its page names all of them, and all examples."""

import base64
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs" / "gallery"
NEEDS = {"surface": ("sklearn",)}
"""Notebook → libraries that it is about."""
NOTEBOOKS = ("certificate", "surface", "words")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@cache
def code(name):
    """Return a notebook's cells of code, in order."""
    cells = json.loads((GALLERY / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell):
    """Return what a cell printed when it was stored."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def pictures(name):
    """Return the PNG images that are stored in a notebook."""
    outputs = [output for cell in code(name) for output in cell["outputs"] if output["output_type"] == "display_data"]
    return [base64.b64decode(output["data"]["image/png"]) for output in outputs]


def test_every_notebook_is_run():
    assert set(NOTEBOOKS) == {path.stem for path in GALLERY.glob("*.ipynb")}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_prints_what_is_stored(name, capsys):
    """The same words; numbers within a tenth, as another processor rounds otherwise and a tree may be cut elsewhere."""
    matplotlib = pytest.importorskip("matplotlib")
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library)
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    names, drawn = {"__name__": "__main__"}, 0
    try:
        for number, cell in enumerate(code(name)):
            exec(compile("".join(cell["source"]), f"{name}.ipynb, code {number}", "exec"), names)
            found, stored = capsys.readouterr().out, printed(cell)
            assert NUMBER.sub("#", found) == NUMBER.sub("#", stored)
            assert numbers(found) == pytest.approx(numbers(stored), rel=0.1)
        drawn = len(plt.get_fignums())
    finally:
        plt.close("all")
    assert drawn == len(pictures(name)) > 0


def numbers(text):
    """Return the numbers in a text."""
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_of_one_run(name):
    """In order, from the first cell to the last, without errors or warnings."""
    assert [cell["execution_count"] for cell in code(name)] == list(range(1, len(code(name)) + 1))
    for cell in code(name):
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"
        assert bool(printed(cell)) == ("print(" in "".join(cell["source"]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pictures_are_small_and_the_last_one_stands_for_its_notebook(name):
    assert max(len(picture) for picture in pictures(name)) < 80_000
    assert (GALLERY / f"{name}.png").read_bytes() == pictures(name)[-1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    cells = json.loads((GALLERY / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert links
    assert [link for link in links if not (GALLERY / link).exists()] == []


def test_the_gallery_shows_all():
    page = (GALLERY / "index.md").read_text(encoding="utf-8")
    examples = [f"](../../examples/{path.name})" for path in (ROOT / "examples").glob("*.py")]
    notebooks = [link for name in NOTEBOOKS for link in (f"]({name}.png)", f"]({name}.ipynb)")]
    assert [link for link in (*examples, *notebooks) if link not in page] == []
