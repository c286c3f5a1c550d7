"""Where a kernel is to run, and how large what it is given may be: what the choice of an implementation goes by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Largest:
    """The largest sizes of what a kernel is given, in a call or in any piece of it; 1 where they aren't known.

    What an implementation takes, it takes in every smaller size too.

    Attributes
    ----------
    groups, n_q, n_k
        Groups, and the queries and keys of each.
    d, d_v
        Numbers of a query or key, and of a value.
    item_bytes
        Bytes of a number of a query, a key or a value.
    directions
        Coordinates by which trees are built and opened.
    leaf_size, nodes
        Keys in a leaf of a tree, and its nodes.
    rows
        Queries of a block.
    """

    groups: int = 1
    n_q: int = 1
    n_k: int = 1
    d: int = 1
    d_v: int = 1
    item_bytes: int = 1
    directions: int = 1
    leaf_size: int = 1
    nodes: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Site:
    """Where a kernel is to run, and on what: plain names and integers only.

    Attributes
    ----------
    library
        Array library, such as ``"numpy"``.
    device
        Device as the library prints it, such as ``"cpu"`` or ``"cuda:0"``.
    dtype
        Accumulation dtype, ``"float32"`` or ``"float64"``.
    gradient
        ``"reverse"`` or ``"forward"`` where q, k or v is recorded for automatic differentiation, else "".
    largest
        Sizes.
    given
        Array library of what the user gave, where that is another one.
    """

    library: str
    device: str
    dtype: str
    gradient: str = ""
    largest: Largest = Largest()
    given: str = ""

    @property
    def place(self) -> str:
        """Library and device, as the user knows them."""
        return f"{self.given or self.library} on {self.device}"


def beyond(name: str, most: int, found: int) -> str | None:
    """Say that a size is larger than an implementation takes; None where it isn't."""
    return f"takes {name} ≤ {most}, got {found}" if found > most else None
