"""Which implementations each kernel has, and the choice between them.

The choice is made once, while planning, from what is known without touching array data; it and the reasons for what was
passed over go into the plan and the report. An implementation asked for by name that cannot run raises
`KernelUnavailable`: nothing falls back in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdecore.errors import KernelUnavailable, OptionError
from kdecore.kernels.attend_blocks.reference import attend_blocks
from kdecore.kernels.attend_dense.reference import attend_dense
from kdecore.kernels.bucket_order.reference import bucket_order
from kdecore.kernels.draw_indices.reference import draw_indices
from kdecore.kernels.hash_codes.reference import hash_codes


@dataclass(frozen=True)
class Site:
    """Where a kernel is to run: plain names only.

    Attributes
    ----------
    library
        Array library, such as ``"numpy"``.
    device
        Device as the library prints it, such as ``"cpu"`` or ``"cuda:0"``.
    dtype
        Accumulation dtype, ``"float32"`` or ``"float64"``.
    """

    library: str
    device: str
    dtype: str


def _anywhere(site: Site) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One implementation of a kernel.

    Attributes
    ----------
    target
        What it is written for: ``"array-api"`` runs wherever the arrays are.
    function
        Follows the kernel's contract.
    unsupported
        Why it cannot run at a site, or None where it can.
    """

    target: str
    function: Callable[..., Any]
    unsupported: Callable[[Site], str | None] = _anywhere


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for one kernel, and why."""

    kernel: str
    target: str
    reason: str
    function: Callable[..., Any]


KERNELS: dict[str, tuple[Implementation, ...]] = {
    function.__name__: (Implementation("array-api", function),)
    for function in (hash_codes, bucket_order, draw_indices, attend_blocks, attend_dense)
}
"""Kernel name → its implementations, fastest first; the last one, ``"array-api"``, runs everywhere."""

TARGETS = tuple(dict.fromkeys(i.target for implementations in KERNELS.values() for i in implementations))


def choose(kernel: str, site: Site, target: str = "auto") -> Choice:
    """Choose the implementation of ``kernel`` for ``site``.

    Parameters
    ----------
    kernel
        A name in `KERNELS`.
    site
        Where the arrays are.
    target
        ``"auto"`` for the first implementation that can run, or the name of one.

    Raises
    ------
    OptionError
        Unknown target.
    KernelUnavailable
        The target asked for cannot run here; the message says why.
    """
    if target not in ("auto", *TARGETS):
        raise OptionError(f"kernels must be one of {', '.join(('auto', *TARGETS))}, got {target!r}")
    passed_over: list[str] = []
    for implementation in KERNELS[kernel]:
        reason = implementation.unsupported(site)
        if target not in ("auto", implementation.target):
            continue
        if reason is None:
            why = "asked for by name" if target != "auto" else "; ".join(passed_over) or "first choice"
            return Choice(kernel, implementation.target, why, implementation.function)
        passed_over.append(f"{implementation.target}: {reason}")
    raise KernelUnavailable(f"kernel {kernel} cannot run: {'; '.join(passed_over) or f'it has no target {target}'}")
