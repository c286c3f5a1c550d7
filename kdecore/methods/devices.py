"""What exact attention and the treecode took on CUDA devices: a table of cards that were measured, for ``method="auto"``.

Nothing is foretold of what wasn't measured: other cards and dtypes, wider rows, restricted keys, other kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdecore.core.problem import Problem
from kdecore.methods.costs import Sizes

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of a number of an input."""


@dataclass(frozen=True)
class Line:
    """What the treecode takes, in seconds.

    Attributes
    ----------
    launch
        A call that the host takes longer to launch than the device to work: the longest that was measured.
    row
        A query or a key of a group.
    listed_key
        A slot of a query's list.
    """

    launch: float
    row: float
    listed_key: float


@dataclass(frozen=True)
class Card:
    """A card as it was measured by `bench.gpu`, and fitted by `bench.cards`.

    Attributes
    ----------
    name
        As PyTorch and CuPy report it.
    code
        What of kdecore was measured.
    opener
        Target of the kernel that opened trees.
    width
        Numbers of a query, key and value.
    copy
        Bytes a second that a copy of memory reads and writes.
    exact
        Dtype → operations a second of PyTorch's fastest attention, 2 (d + d_v) of them for a query and a key.
    treecode
        Dtype → times.
    """

    name: str
    code: str
    opener: str
    width: int
    copy: float
    exact: Mapping[str, float]
    treecode: Mapping[str, Line]


CARDS: dict[str, Card] = {
    # bench/results/gpu_h200.json, by bench.cards; the present opening, in one pass, hasn't been measured.
    "NVIDIA H200": Card(
        name="NVIDIA H200",
        code="commit 6fca90d+, trees opened in sweeps",
        opener="triton",
        width=64,
        copy=4.259e12,
        exact={"bfloat16": 4.946e14, "float32": 3.527e13},
        treecode={"bfloat16": Line(0.008473, 2.433e-9, 1.588e-11), "float32": Line(0.009414, 3.156e-9, 2.798e-11)},
    )
}
"""Name → card."""


def unmeasured(name: str, sizes: Problem | Sizes, beside: Sequence[str] = (), opener: str | None = None) -> str:
    """Return why nothing is foretold of a call on a card of that name; "" where it was measured.

    Parameters
    ----------
    name
        What `kdecore.arrays.backend.Backend.card` says.
    sizes
        The call's.
    beside
        What else it has that no measured call had.
    opener
        Target of the kernel that opens trees; None where nobody asked.
    """
    card = CARDS.get(name)
    if card is None:
        return f"no measurement of {name}: exact; name a method"
    missing = (
        *beside,
        *([] if sizes.input_dtype in card.exact else [sizes.input_dtype]),
        *([f"rows of more than {card.width} numbers"] if sizes.d > card.width or sizes.d_v > card.width else []),
        *([] if opener in (None, card.opener) else [f"trees opened by {opener}"]),
    )
    return f"no measurement of {missing[0]} on {name}: exact; name a method" if missing else ""


def exact_over_treecode(name: str, sizes: Problem | Sizes, budget: int) -> float:
    """Return how many times as long as the treecode's of a budget exact attention is expected to take on a measured card.

    Exact attention is bound by its products or by reading keys and values; the treecode by the host or the device. Narrower
    rows than the measured ones save exact attention time, and the treecode none.
    """
    card, width = CARDS[name], sizes.d + sizes.d_v
    pairs, rows = sizes.groups * sizes.n_q * sizes.n_k, sizes.groups * (sizes.n_q + sizes.n_k)
    read = rows * width * ITEM_BYTES[sizes.input_dtype]
    exact = max(2 * pairs * width / card.exact[sizes.input_dtype], read / card.copy)
    line = card.treecode[sizes.input_dtype]
    return exact / max(line.launch, rows * line.row + sizes.groups * sizes.n_q * budget * line.listed_key)
