"""Files of a comparison: all of them, or none."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OUTPUTS = ("compare.html", "compare.png", "compare.json")


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Prepare the output folder; where the body fails, remove what was created of it and is still empty."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        prepare_folder(folder)
        yield
    except BaseException:
        for path in created:
            with suppress(OSError):
                path.rmdir()
        raise


def prepare_folder(folder: Path) -> None:
    """Create the output folder, and find out before anything is measured whether files can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        if (folder / name).is_dir():
            raise IsADirectoryError(None, "is a folder, but a file is to be written there", str(folder / name))
    trial = _temporary(folder, "trial")
    trial.write_bytes(b"")
    trial.unlink()


def write_together(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files so that each appears whole, and none if one cannot be written."""
    temporary = {name: _temporary(folder, name) for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.{os.getpid()}.tmp"


def to_json(record: dict[str, Any]) -> bytes:
    """Encode as JSON (RFC 8259, so NaN and infinity become null)."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return (json.dumps(finite(record), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
