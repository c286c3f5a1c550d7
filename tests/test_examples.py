"""Each example runs, and prints what it is there to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPECTED = {
    "replace_attention.py": (
        r"layers\.0\.self_attn +1 +(3[4-9]|4[0-2])\d .*treecode\n(.*\n)*.*PyTorch: fewer than 1024 keys\n",
        r"treecode, [34]\d\d keys a query, error 0\.0\d\d\n",
        r"within 0\.0",
    ),
    "train.py": (r"step 0: loss 1\.[4-9]", r"estimated attention finds (9\d|100)%", r"exact attention finds (9\d|100)%"),
    "hugging_face.py": (r"within 0\.0", r"layer 0 +2 +\d+ .*treecode\n", r"layer 1 +4 .*PyTorch: fewer than 32 queries\n"),
}


def test_every_example_is_run():
    assert set(EXPECTED) == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items(), ids=EXPECTED)
def test_examples_run(name, expected):
    if name == "hugging_face.py":
        pytest.importorskip("transformers")
    path = os.pathsep.join((str(ROOT), str(ROOT / "adapters")))
    found = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for pattern in expected:
        assert re.search(pattern, found.stdout), found.stdout
