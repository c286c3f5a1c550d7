"""NumPy's own files: reading them, and never the objects that they may hold."""

from os import PathLike
from typing import IO, Any

import numpy as np


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
