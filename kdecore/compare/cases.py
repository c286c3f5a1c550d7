"""Inputs for a comparison: the user's files, or the bundled sample of GloVe word vectors."""

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from kdecore.arrays import files
from kdecore.arrays.backend import backend_named, unusable
from kdecore.arrays.errors import InputFileError, OptionError
from kdecore.arrays.namespace import Array, type_name
from kdecore.arrays.scalars import to_float
from kdecore.core.problem import canonicalise

GLOVE = Path(__file__).parent / "data" / "glove_6b_100d_sample.npz"
GLOVE_ROWS = 32768
GLOVE_SCALE = 10**-0.5
"""The KDEformer paper's protocol divides Q and K by 10^{1/4} each."""
NAMES = (("q", "k", "v"), ("query", "key", "value"))
"""What q, k and v may be called in a file, in upper or lower case."""


@dataclass(frozen=True)
class Case:
    """Inputs of a comparison.

    Attributes
    ----------
    name
        What they are, for titles.
    q, k, v
        NumPy arrays (…, n_q, d), (…, n_k, d), (…, n_k, d_v) of one floating-point dtype; k and v may have fewer heads.
    scale
        Factor on ⟨q, k⟩; None for 1/√d.
    diagonal
        Query i stands at the position of key i + diagonal, as in `kdecore.attention`; None where it isn't known.
    note
        What was done with a scale that the file holds; "" where it holds none.
    """

    name: str
    q: Array
    k: Array
    v: Array
    scale: float | None = None
    diagonal: int | None = None
    note: str = ""

    @property
    def groups(self) -> int:
        """Number of attention problems: batch times query heads."""
        return math.prod(self.q.shape[:-2])

    @property
    def n_q(self) -> int:
        """Number of queries in each of them."""
        return int(self.q.shape[-2])

    @property
    def n_k(self) -> int:
        """Number of keys in each of them."""
        return int(self.k.shape[-2])


def glove_case(n: int = 8192) -> Case:
    """Return the KDEformer paper's protocol on ``n`` words of GloVe: K = Q, V other words, logits ⟨q, k⟩ / √10.

    Parameters
    ----------
    n
        Words, 1 ≤ n ≤ 16,384 (half of the sample, so that Q and V share none).

    Returns
    -------
    Case
        q, k, v (n, 100) float32.
    """
    if not 1 <= n <= GLOVE_ROWS // 2:
        raise OptionError(f"the bundled GloVe sample allows 1 ≤ n ≤ {GLOVE_ROWS // 2}, got {n}")
    (vectors,) = files.load(GLOVE, ("vectors",))
    first = min(2 * n, GLOVE_ROWS - n)
    q, v = vectors[:n].astype("float32"), vectors[first : first + n].astype("float32")
    return Case("GloVe 6B 100d sample", q, q, v, GLOVE_SCALE, diagonal=0)


def load_case(files: Sequence[str | Path], scale: float | None = None, diagonal: int | None = None) -> Case:
    """Read q, k and v, and the scale that is stored with them, from files.

    Parameters
    ----------
    files
        One .npz, .safetensors or .pt file (a dictionary written by `torch.save`) that holds arrays named q, k and v, or
        query, key and value, in upper or lower case; or three .npy files, in the order q, k, v. Objects (pickles) are never
        loaded; bfloat16 becomes float32.
    scale
        Factor on ⟨q, k⟩; if None, the number that the file holds under the name scale, or 1/√d.
    diagonal
        Query i stands at the position of key i + diagonal; None where it isn't known.

    Raises
    ------
    InputFileError
        Wrong number or kind of files, an unreadable one, or one without q, k or v.
    ShapeError, DTypeError, OptionError
        The arrays do not fit together, or the scale is not finite.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if path.is_dir():
            raise InputFileError(f"cannot read {path}: it is a folder")
    kinds = [path.suffix.lower() for path in paths]
    stored: Any = None
    if kinds == [".npy"] * 3:
        q, k, v = (_read_npy(path) for path in paths)
    elif len(kinds) == 1 and kinds[0] in READERS:
        (q, k, v), stored = READERS[kinds[0]](paths[0])
    else:
        got = ", ".join(str(path) for path in paths) or "none"
        raise InputFileError(
            f"files must be one .pt, one .npz, one .safetensors, or three .npy in the order q k v; got {got}"
        )
    note = "" if stored is None else _note(paths[0].name, stored, scale)
    if scale is None and math.isfinite(number := _number(stored)):
        scale = number
    canonicalise(q, k, v, scale)
    return Case(", ".join(path.name for path in paths), q, k, v, scale, diagonal, note)


def install(extra: str) -> str:
    """Return how to install what an extra of this package brings."""
    return f"pip install 'kdecore[{extra}]', or from a clone pip install '.[{extra}]'"


def _number(stored: Any) -> float:
    """Return a scale as files hold it: a number, an array of one, or text in metadata; NaN for anything else."""
    if isinstance(stored, str):
        with suppress(ValueError):
            return float(stored)
    return to_float(stored.item() if getattr(stored, "size", 0) == 1 else stored)


def _note(name: str, stored: Any, given: float | None) -> str:
    if given is not None:
        return f"scale: {given:.4g} as asked for, not what {name} holds."
    if math.isfinite(number := _number(stored)):
        return f"scale: {number:.4g}, as {name} holds it."
    what = f"an array of shape {stored.shape}" if getattr(stored, "size", 1) != 1 else str(stored)
    return f"scale: 1/√d; what {name} holds under that name is no finite number but {what}."


def _wanted(path: Path, found: Iterable[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the names under which a file holds q, k and v, and the scale or None, or raise what it lacks."""
    found = list(found)
    # Of names that differ by case only, the one in lower case is sorted last, and counts.
    spelt = {name.lower(): name for name in sorted(found)}
    for names in NAMES:
        if set(names) <= set(spelt):
            return tuple(spelt[name] for name in names), spelt.get("scale")
    held = ", ".join(found) or "none"
    raise InputFileError(f"{path} must hold arrays named q, k and v, or query, key and value; it holds {held}")


@contextmanager
def _reading(path: Path, *errors: type[Exception], reason: Callable[[Exception], str] = str) -> Iterator[None]:
    """Turn errors of reading a file into `InputFileError` with a reason."""
    try:
        yield
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror or error}") from None
    except errors as error:
        raise InputFileError(f"cannot read {path}: {reason(error)}") from None


def _reading_numpy(path: Path) -> AbstractContextManager[None]:
    def reason(error: Exception) -> str:
        # NumPy takes any unknown content for a pickle.
        return "it is no NumPy file, or holds objects, which are never loaded" if "ickle" in str(error) else str(error)

    return _reading(path, ValueError, EOFError, zipfile.BadZipFile, reason=reason)


def _read_npy(path: Path) -> Any:
    with _reading_numpy(path):
        return files.load(path)[0]


def _read_npz(path: Path) -> tuple[list[Any], Any]:
    with _reading_numpy(path):
        found = files.names(path)
    names, scale = _wanted(path, found)
    with _reading_numpy(path):
        arrays = files.load(path, names)
        if scale is None:
            return arrays, None
        try:
            return arrays, files.load(path, (scale,))[0]
        except ValueError:
            return arrays, "an object"


def _read_safetensors(path: Path) -> tuple[list[Any], Any]:
    try:
        import safetensors
    except ImportError:
        raise InputFileError(f"reading {path} needs safetensors: {install('cli')}") from None
    with _reading(path, safetensors.SafetensorError, TypeError):
        with safetensors.safe_open(path, framework="np") as stream:
            names, scale = _wanted(path, stream.keys())
            wanted = names if scale is None else (*names, scale)
            metadata = {name.lower(): text for name, text in (stream.metadata() or {}).items()}
            in_torch = any(stream.get_slice(name).get_dtype() == "BF16" for name in wanted)
            arrays = [] if in_torch else [stream.get_tensor(name) for name in wanted]
        if in_torch:
            arrays = _read_bfloat16(path, wanted)
    return arrays[:3], metadata.get("scale") if scale is None else arrays[3]


def _read_bfloat16(path: Path, names: Sequence[str]) -> list[Any]:
    """Read through PyTorch, which has the bfloat16 that NumPy lacks."""
    pytorch = _pytorch(f"{path} holds bfloat16, which")
    import safetensors

    with safetensors.safe_open(path, framework="pt") as stream:
        return [pytorch.to_numpy(stream.get_tensor(name)) for name in names]


def _read_torch(path: Path) -> tuple[list[Any], Any]:
    pytorch = _pytorch(f"reading {path}")

    def reason(error: Exception) -> str:
        return "it is no file of PyTorch tensors, or holds objects, which are never loaded"

    with _reading(path, EOFError, RuntimeError, ValueError, UnpicklingError, reason=reason):
        held = pytorch.load(path)
    if not isinstance(held, dict):
        raise InputFileError(f"{path} must hold a dictionary with q, k and v; it holds {type_name(held)}")
    names, scale = _wanted(path, (name for name in held if isinstance(name, str)))

    def array(name: str) -> Any:
        return pytorch.to_numpy(held[name]) if hasattr(held[name], "detach") else held[name]

    with _reading(path, RuntimeError, TypeError):
        return [array(name) for name in names], None if scale is None else array(scale)


def _pytorch(what: str) -> Any:
    if (problem := unusable("torch")) is not None:
        raise InputFileError(f"{what} needs PyTorch ({problem}): {install('torch')}")
    return backend_named("torch")


READERS: dict[str, Callable[[Path], tuple[list[Any], Any]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
}
"""How q, k and v, and the scale or None, are read from one file of each kind."""
