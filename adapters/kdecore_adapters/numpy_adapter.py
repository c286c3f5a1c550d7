"""NumPy: the functions that every adapter has, and reading of NumPy's own files."""

from os import PathLike
from typing import IO, Any

import numpy as np


def version() -> str:
    """Return NumPy's version."""
    return np.__version__


def unusable() -> str | None:
    """Return why no device can be used, or None where one can."""
    return None


def devices() -> list[str]:
    """Return the names of the devices that arrays can lie on."""
    return ["cpu"]


def threads() -> int | None:
    """Return how many threads the library uses on the CPU; None where it doesn't tell."""
    return None


def to_numpy(array: Any) -> Any:
    """Return a NumPy array; the same one where ``array`` is one already."""
    return np.asarray(array)


def from_numpy(array: Any, device: str | None = None) -> Any:
    """Return a NumPy array as this library's, without a copy; ``device`` is ``"cpu"`` or None."""
    if device not in (None, "cpu"):
        raise ValueError(f"NumPy arrays lie on cpu only, not on {device}")
    return np.asarray(array)


def synchronize() -> None:
    """Wait until all work is done: NumPy has done it when it returns."""


def names(path: str | PathLike[str]) -> list[str]:
    """Return the names of the arrays in an .npz file.

    Raises
    ------
    OSError, EOFError, ValueError, zipfile.BadZipFile
        The file cannot be read, or is no such file.
    """
    with open(path, "rb") as stream:
        return list(_loaded(stream, True).files)


def load(path: str | PathLike[str], names: tuple[str, ...] | None = None) -> list[Any]:
    """Read a .npy file, or the named arrays of an .npz file; pickled objects are never loaded.

    Parameters
    ----------
    path
        File to read.
    names
        Arrays to read from an .npz file; None for a .npy file.

    Returns
    -------
    list of numpy.ndarray
        One for each name, or one, writable and in the machine's byte order.

    Raises
    ------
    KeyError
        An .npz file lacks one of the names; its argument lists the names that the file has.
    OSError, EOFError, ValueError, zipfile.BadZipFile
        The file cannot be read, or is no such file.
    """
    with open(path, "rb") as stream:
        loaded = _loaded(stream, names is not None)
        if names is None:
            arrays = [loaded]
        else:
            if not set(names) <= set(loaded.files):
                raise KeyError(list(loaded.files))
            arrays = [loaded[name] for name in names]
        return [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]


def _loaded(stream: IO[bytes], npz: bool) -> Any:
    loaded = np.load(stream, allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile) != npz:
        raise ValueError(f"it is {'a .npy' if npz else 'an .npz'} file by its content, unlike its name")
    return loaded
