"""Inputs for a comparison: the user's files, or the bundled sample of GloVe word vectors."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdecore.errors import InputFileError, OptionError
from kdecore.inputs import canonicalise
from kdecore.namespaces import Array
from kdecore_adapters import numpy_adapter

GLOVE = Path(__file__).parent / "data" / "glove_6b_100d_sample.npz"
GLOVE_ROWS = 32768
GLOVE_SCALE = 10**-0.5
"""The KDEformer paper's protocol divides Q and K by 10^{1/4} each."""
NAMES = ("q", "k", "v")


@dataclass(frozen=True)
class Case:
    """Inputs of a comparison.

    Attributes
    ----------
    name
        What they are, for titles.
    q, k, v
        NumPy arrays (…, n_q, d), (…, n_k, d), (…, n_k, d_v) of one floating-point dtype.
    scale
        Factor on ⟨q, k⟩; None for 1/√d.
    """

    name: str
    q: Array
    k: Array
    v: Array
    scale: float | None = None


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
    (vectors,) = numpy_adapter.load(GLOVE, ("vectors",))
    first = min(2 * n, GLOVE_ROWS - n)
    q, v = vectors[:n].astype("float32"), vectors[first : first + n].astype("float32")
    return Case("GloVe 6B 100d sample", q, q, v, GLOVE_SCALE)


def load_case(files: Sequence[str | Path], scale: float | None = None) -> Case:
    """Read q, k and v from files.

    Parameters
    ----------
    files
        One .npz or one .safetensors file that holds arrays named q, k and v; or three .npy files, in the order q, k, v.
        Objects (pickles) are never loaded; bfloat16 becomes float32.
    scale
        Factor on ⟨q, k⟩; None for 1/√d.

    Raises
    ------
    InputFileError
        Wrong number or kind of files, an unreadable one, or one without q, k or v.
    ShapeError, DTypeError, OptionError
        The arrays do not fit together, or the scale is not finite.
    """
    paths = [Path(file) for file in files]
    kinds = [path.suffix.lower() for path in paths]
    if kinds == [".npy"] * 3:
        q, k, v = (_read(path, None)[0] for path in paths)
    elif kinds == [".npz"]:
        q, k, v = _read(paths[0], NAMES)
    elif kinds == [".safetensors"]:
        q, k, v = _read_safetensors(paths[0])
    else:
        got = ", ".join(str(path) for path in paths) or "none"
        raise InputFileError(f"files must be one .npz, one .safetensors, or three .npy in the order q k v; got {got}")
    canonicalise(q, k, v, scale)
    return Case(", ".join(path.name for path in paths), q, k, v, scale)


def _missing(path: Path, found: Sequence[str]) -> InputFileError:
    return InputFileError(f"{path} must hold arrays named q, k and v; it holds {', '.join(found) or 'none'}")


def _read(path: Path, names: tuple[str, ...] | None) -> list[Any]:
    try:
        return numpy_adapter.load(path, names)
    except KeyError as error:
        raise _missing(path, error.args[0]) from None
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        # NumPy takes any unknown content for a pickle.
        reason = "it is no NumPy file, or holds objects, which are never loaded" if "ickle" in str(error) else str(error)
        raise InputFileError(f"cannot read {path}: {reason}") from None


def _read_safetensors(path: Path) -> list[Any]:
    try:
        import safetensors
    except ImportError:
        raise InputFileError(f"reading {path} needs safetensors: pip install 'kdecore[cli]'") from None
    try:
        with safetensors.safe_open(path, framework="np") as stream:
            found = list(stream.keys())
            if not set(NAMES) <= set(found):
                raise _missing(path, found)
            if all(stream.get_slice(name).get_dtype() != "BF16" for name in NAMES):
                return [stream.get_tensor(name) for name in NAMES]
        return _read_bfloat16(path)
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, TypeError) as error:
        raise InputFileError(f"cannot read {path}: {error}") from None


def _read_bfloat16(path: Path) -> list[Any]:
    """Read through PyTorch, which has the bfloat16 that NumPy lacks."""
    try:
        from kdecore_adapters import torch_adapter
    except ImportError:
        raise InputFileError(f"{path} holds bfloat16, which needs PyTorch: pip install 'kdecore[torch]'") from None
    import safetensors

    with safetensors.safe_open(path, framework="pt") as stream:
        return [torch_adapter.to_numpy(stream.get_tensor(name)) for name in NAMES]
