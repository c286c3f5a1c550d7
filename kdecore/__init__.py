"""kdecore: softmax attention over long sequences in near-linear time, with an error its user can see.

Call `attention` on NumPy, CuPy or PyTorch arrays; `kdecore.kde` has the density estimates by themselves.
Importing kdecore imports neither PyTorch nor CuPy.
"""

from kdecore.attention import attention
from kdecore.certificate import Certificate
from kdecore.errors import (
    DeviceError,
    DTypeError,
    InputFileError,
    KdecoreError,
    KernelUnavailable,
    MemoryLimitError,
    OptionError,
    ShapeError,
)
from kdecore.key_index import KeyIndex
from kdecore.options import Exact, Hyper, KDEformer, SortLSH, Treecode
from kdecore.packed import packed_attention
from kdecore.report import Report

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "DTypeError",
    "DeviceError",
    "Exact",
    "Hyper",
    "InputFileError",
    "KDEformer",
    "KdecoreError",
    "KernelUnavailable",
    "KeyIndex",
    "MemoryLimitError",
    "OptionError",
    "Report",
    "ShapeError",
    "SortLSH",
    "Treecode",
    "attention",
    "packed_attention",
]
