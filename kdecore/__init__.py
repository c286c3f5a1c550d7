"""kdecore: softmax attention over long sequences in near-linear time, with an error its user can see.

Call `attention` on NumPy, CuPy or PyTorch arrays; `kdecore.kde` has the density estimates by themselves.
Importing kdecore imports neither PyTorch nor CuPy.
"""

from kdecore.accuracy.certificate import Certificate
from kdecore.api.attention import attention
from kdecore.api.key_index import KeyIndex
from kdecore.api.packed import packed_attention
from kdecore.api.report import Report
from kdecore.arrays.errors import (
    DeviceError,
    DTypeError,
    InputFileError,
    KdecoreError,
    KernelUnavailable,
    MemoryLimitError,
    OptionError,
    ShapeError,
)
from kdecore.core.options import Exact
from kdecore.methods.hyper import Hyper
from kdecore.methods.kdeformer import KDEformer
from kdecore.methods.sortlsh import SortLSH
from kdecore.methods.treecode import Treecode

__version__ = "0.2.0"

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
