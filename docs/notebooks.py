"""Run the gallery's notebooks, and store what they print and draw: ``python docs/notebooks.py [NAME …]``.

Needs the extras cli, docs and sklearn. Beside each notebook lies its last picture, for the gallery's page.
"""

import base64
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

GALLERY = Path(__file__).parent / "gallery"


def main(names: list[str]) -> None:
    """Run notebooks by their names, or all."""
    for path in [GALLERY / f"{name}.ipynb" for name in names] or sorted(GALLERY.glob("*.ipynb")):
        stored = run(path)
        nbformat.write(stored, path)
        path.with_suffix(".png").write_bytes(pictures(stored)[-1])


def run(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with its outputs, without what differs from one run or machine to the next."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    notebook.metadata = {"language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        # The text that stands for a picture names a size only.
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("text/plain", None)
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """Return the PNG images among a notebook's outputs, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


if __name__ == "__main__":
    main(sys.argv[1:])
