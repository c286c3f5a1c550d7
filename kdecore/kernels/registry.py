"""Which implementations each kernel has, and the choice between them.

The choice is made once, while planning, from what is known without touching array data; it and the reasons for what was
passed over go into the plan and the report. An implementation asked for by name that cannot run raises
`KernelUnavailable`: nothing falls back in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from kdecore.errors import KernelUnavailable, OptionError
from kdecore.kernels import (
    attend_blocks,
    attend_dense,
    bucket_order,
    draw_indices,
    hash_codes,
    node_summaries,
    open_tree,
    project_rows,
    row_norms,
    tree_order,
)


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
    gradient
        ``"reverse"`` or ``"forward"`` where q, k or v is recorded for automatic differentiation, else "".
    """

    library: str
    device: str
    dtype: str
    gradient: str = ""


def _anywhere(site: Site) -> str | None:
    return None


def _host_constants(site: Site) -> str | None:
    if site.library not in ("numpy", "torch") or site.device != "cpu":
        return f"needs NumPy arrays or PyTorch tensors on the CPU, got {site.library} on {site.device}"
    return None


def _host_floats(site: Site) -> str | None:
    if site.gradient:
        return "records no gradients"
    return _host_constants(site)


def _recorded_tensors(site: Site) -> str | None:
    if site.library != "torch" or site.gradient != "reverse":
        return "for PyTorch tensors whose gradients are recorded"
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


def _implementations(
    reference: Callable[..., Any], cpu: Callable[..., Any], unsupported: Callable[[Site], str | None]
) -> tuple[Implementation, ...]:
    return (Implementation("numba-cpu", cpu, unsupported), Implementation("array-api", reference))


def _with_gradient(name: str, found: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
    """Put the kernel of that name that knows its gradient before the last implementation."""

    @wraps(found[-1].function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        from kdecore_adapters import torch_gradients

        return getattr(torch_gradients, name)(*args, **kwargs)

    return (*found[:-1], Implementation("torch-autograd", recorded, _recorded_tensors), found[-1])


KERNELS: dict[str, tuple[Implementation, ...]] = {
    "row_norms": _implementations(row_norms.reference.row_norms, row_norms.cpu.row_norms, _host_constants),
    "hash_codes": _implementations(hash_codes.reference.hash_codes, hash_codes.cpu.hash_codes, _host_constants),
    "bucket_order": _implementations(bucket_order.reference.bucket_order, bucket_order.cpu.bucket_order, _host_constants),
    "draw_indices": _implementations(draw_indices.reference.draw_indices, draw_indices.cpu.draw_indices, _host_constants),
    "project_rows": _implementations(project_rows.reference.project_rows, project_rows.cpu.project_rows, _host_floats),
    "tree_order": _implementations(tree_order.reference.tree_order, tree_order.cpu.tree_order, _host_constants),
    "node_summaries": _with_gradient(
        "node_summaries",
        _implementations(node_summaries.reference.node_summaries, node_summaries.cpu.node_summaries, _host_floats),
    ),
    "open_tree": _implementations(open_tree.reference.open_tree, open_tree.cpu.open_tree, _host_constants),
    "attend_blocks": _with_gradient(
        "attend_blocks",
        _implementations(attend_blocks.reference.attend_blocks, attend_blocks.cpu.attend_blocks, _host_floats),
    ),
    "attend_dense": _with_gradient(
        "attend_dense",
        _implementations(attend_dense.reference.attend_dense, attend_dense.cpu.attend_dense, _host_floats),
    ),
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
