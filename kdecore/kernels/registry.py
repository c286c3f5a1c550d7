"""Which implementations each kernel has, and the choice between them.

The choice is made once, while planning, from what is known without touching array data: library, device, dtype, and the
largest sizes of what a kernel will be given. It and the reasons for what was passed over go into the plan and the report. An
implementation asked for by name that is there and cannot run raises `KernelUnavailable`: nothing falls back in silence, and
no implementation calls another one for what it doesn't take.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from kdecore.arrays.backend import recorded_kernel
from kdecore.arrays.errors import KernelUnavailable
from kdecore.arrays.scalars import one_of
from kdecore.kernels.runtime.grids import MOST_BLOCKS
from kdecore.kernels.site import Largest, Site, beyond


def _anywhere(site: Site) -> str | None:
    return None


def _host_constants(site: Site) -> str | None:
    if site.library not in ("numpy", "torch") or site.device != "cpu":
        return f"needs NumPy arrays or PyTorch tensors on the CPU, got {site.place}"
    return None


def _host_floats(site: Site) -> str | None:
    return _host_constants(site) or _recording(site)


def _recording(site: Site) -> str | None:
    return "records no gradients" if site.gradient else None


def _many_rows(site: Site) -> str | None:
    """Say that there are more rows than a grid has blocks.

    No kernel takes more blocks than there are rows, or 32 a group, but for arrays that no device's memory holds.
    """
    largest = site.largest
    return beyond("rows of all groups", MOST_BLOCKS, largest.groups * max(largest.n_q, largest.n_k, 32))


@cache
def cuda_problem() -> str | None:
    """Return why Numba CUDA kernels cannot run on this machine, or None where they can."""
    if find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    from numba import cuda

    try:
        if not cuda.is_available():
            return "no CUDA driver or device found"
    except Exception as error:  # a broken driver raises errors of many kinds
        return f"CUDA does not start: {error}"

    def nothing() -> None:
        """Do nothing."""

    try:
        cuda.jit("void()")(nothing)
    except Exception as error:  # and so does a compiler that doesn't fit the driver, or the NumPy, it finds
        return f"Numba does not compile for the device: {type(error).__name__}: {error}"
    return None


def _cuda_constants(site: Site) -> str | None:
    if site.library not in ("cupy", "torch") or not site.device.startswith("cuda"):
        return f"needs CuPy arrays or PyTorch tensors on a CUDA device, got {site.place}"
    return cuda_problem() or _many_rows(site)


def _cuda_floats(site: Site) -> str | None:
    return _cuda_constants(site) or _recording(site)


def _sorted_by_torch(site: Site) -> str | None:
    # A third of the time on an H200 (bench/NOTES.md).
    return "PyTorch's own radix sort is faster" if site.library == "torch" else None


FEW_QUERIES = 256
"""Of all groups. Fewer are few thread blocks, of 64 each, which leave most of a device idle (attend_dense/cuda.py)."""


def _few_queries(site: Site) -> str | None:
    found = site.largest.groups * site.largest.n_q
    return f"matrix products are expected to be faster for {found} queries" if found < FEW_QUERIES else None


def triton_problem(site: Site) -> str | None:
    """Return why Triton kernels cannot run at a site, or None where they can."""
    if site.library != "torch" or not site.device.startswith("cuda"):
        return f"needs PyTorch tensors on a CUDA device, got {site.place}"
    if site.dtype != "float32":
        return f"computes in float32, not in {site.dtype}"
    return _many_rows(site) if find_spec("triton") is not None else "triton is not installed"


def _triton_floats(site: Site) -> str | None:
    return triton_problem(site) or _recording(site)


def _recorded_tensors(site: Site) -> str | None:
    if site.library != "torch" or site.gradient != "reverse":
        return "for PyTorch tensors whose gradients are recorded"
    return None


def _recorded_on_host(site: Site) -> str | None:
    return _recorded_tensors(site) or _host_floats(replace(site, gradient=""))


Unsupported: TypeAlias = Callable[[Site], str | None]
"""Why an implementation cannot run at a site, or None where it can."""
Limit: TypeAlias = Callable[[Largest], str | None]
"""Which size is larger than an implementation takes, or None where none is."""


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
    slower
        Why another one is preferred at a site where it can, or None.
    """

    target: str
    function: Callable[..., Any]
    unsupported: Unsupported = _anywhere
    slower: Unsupported = _anywhere


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for one kernel, and why.

    Attributes
    ----------
    kernel, target, function
        Of which kernel, and of the implementation.
    reason
        Why it, and what it computes by where that is another one.
    computed_by
        Target of what computes: ``target``, or the implementation that torch-autograd records.
    """

    kernel: str
    target: str
    reason: str
    function: Callable[..., Any]
    computed_by: str


def _late(module: str, name: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of that name in a module that is imported when it is called first."""

    @wraps(like)
    def called(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return called


def _recorded(name: str, like: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of that name among the kernels whose gradients PyTorch's backend knows."""

    @wraps(like)
    def called(*args: Any, **kwargs: Any) -> Any:
        return recorded_kernel("torch", name)(*args, **kwargs)

    return called


def _within(unsupported: Unsupported, limit: Limit) -> Unsupported:
    """Return why an implementation cannot run at a site, for its sizes if not for anything else."""
    return lambda site: unsupported(site) or limit(site.largest)


CONSTANTS, FLOATS = (_host_constants, _cuda_constants, triton_problem), (_host_floats, _cuda_floats, _triton_floats)
"""Why Numba for the CPU, Numba CUDA and Triton cannot run at a site: for results that carry no gradient, and for others."""


def _implementations(
    name: str,
    *,
    constant: bool = True,
    slower: Unsupported = _anywhere,
    recorded: Unsupported = _recorded_tensors,
    others: tuple[str, ...] = (),
) -> tuple[Implementation, ...]:
    """Return the implementations of the kernel in the folder of its name, with some of ``others``, fastest first.

    Of what isn't ``constant`` gradients are recorded: it is for those that record them, or for calls that record none.
    ``slower`` is of the one in Numba CUDA, ``recorded`` of the one that knows its gradients. What sizes an implementation
    takes, the kernel's contract says in ``LIMITS``.
    """
    folder = f"kdecore.kernels.{name}"
    reference = getattr(import_module(f"{folder}.reference"), name)
    limits: dict[str, Limit] = getattr(import_module(f"{folder}.contract"), "LIMITS", {})

    cpu = [import_module(f"{folder}.cpu")] if find_spec(f"{folder}.cpu") else []

    def other(
        target: str, module: str, unsupported: Unsupported, slower: Unsupported = _anywhere
    ) -> tuple[Implementation, ...]:
        if target not in others:
            return ()
        if target in limits:
            unsupported = _within(unsupported, limits[target])
        return (Implementation(target, _late(module, name, reference), unsupported, slower),)

    host, cuda, triton = CONSTANTS if constant else FLOATS
    return (
        *other("triton", f"{folder}.triton", triton),
        *other("numba-cuda", f"{folder}.cuda", cuda, slower),
        *(Implementation("numba-cpu", getattr(module, name), host) for module in cpu),
        *((Implementation("torch-autograd", _recorded(name, reference), recorded),) if "torch-autograd" in others else ()),
        Implementation("array-api", reference),
    )


KERNELS: dict[str, tuple[Implementation, ...]] = {
    "finite_rows": _implementations("finite_rows", constant=False, others=("numba-cuda",)),
    "spoil_groups": _implementations("spoil_groups", constant=False, others=("numba-cuda",)),
    "spoil_rows": _implementations("spoil_rows", constant=False, others=("numba-cuda",)),
    "row_norms": _implementations("row_norms", others=("numba-cuda",)),
    "value_sizes": _implementations("value_sizes", others=("numba-cuda",)),
    "hash_codes": _implementations("hash_codes", others=("triton", "numba-cuda")),
    "bucket_order": _implementations("bucket_order", slower=_sorted_by_torch, others=("numba-cuda",)),
    "bucket_windows": _implementations("bucket_windows", others=("numba-cuda",)),
    "draw_uniform": _implementations("draw_uniform", others=("numba-cuda",)),
    "draw_indices": _implementations("draw_indices", others=("numba-cuda",)),
    "balanced_view": _implementations("balanced_view", others=("numba-cuda",)),
    "second_moment": _implementations("second_moment", others=("numba-cuda",)),
    "project_rows": _implementations("project_rows", constant=False, others=("triton",)),
    "rank_codes": _implementations("rank_codes", others=("triton", "numba-cuda")),
    "tree_order": _implementations("tree_order"),
    "node_summaries": _implementations("node_summaries", constant=False, others=("triton", "numba-cuda", "torch-autograd")),
    "scaled_nodes": _implementations("scaled_nodes", others=("numba-cuda",)),
    "pick_threshold": _implementations("pick_threshold", others=("triton", "numba-cuda")),
    "open_tree": _implementations("open_tree", others=("triton", "numba-cuda")),
    "gap_moments": _implementations("gap_moments", constant=False, others=("triton", "torch-autograd")),
    "shrink_matrices": _implementations("shrink_matrices", constant=False, others=("numba-cuda",)),
    "attend_tree": _implementations(
        "attend_tree", constant=False, recorded=_recorded_on_host, others=("triton", "torch-autograd")
    ),
    "attend_blocks": _implementations("attend_blocks", constant=False, others=("triton", "numba-cuda", "torch-autograd")),
    "attend_dense": _implementations(
        "attend_dense",
        constant=False,
        slower=_few_queries,
        others=("triton", "numba-cuda", "torch-autograd"),
    ),
}
"""Kernel name → its implementations, fastest first; the last one, ``"array-api"``, runs everywhere."""

TARGETS = tuple(dict.fromkeys(i.target for implementations in KERNELS.values() for i in implementations))


def check_target(target: str) -> str:
    """Return the name of a target or ``"auto"``, or raise `OptionError`."""
    return one_of(("auto", *TARGETS), "kernels", target)


def _recording_another(choice: Choice, site: Site) -> Choice:
    """Return the choice of torch-autograd; its reason is what computes, and not who else records no gradients."""
    forward = choose(choice.kernel, replace(site, gradient=""))
    backward = recorded_kernel(site.library, "backward")(choice.kernel, site)
    why = f"gradients are recorded: forward {forward.target} ({forward.reason}), backward {backward}"
    return replace(choice, reason=why, computed_by=forward.target)


def choose(kernel: str, site: Site, target: str = "auto") -> Choice:
    """Choose the implementation of ``kernel`` for ``site``.

    Parameters
    ----------
    kernel
        A name in `KERNELS`.
    site
        Where the arrays are, and their sizes.
    target
        ``"auto"`` for the first implementation that can run, or the name of one; a kernel without one of that name runs in
        the array API.

    Raises
    ------
    OptionError
        Unknown target.
    KernelUnavailable
        The target asked for cannot run here, or not on what is so large; the message says why.
    """
    every = KERNELS[kernel]
    if check_target(target) != "auto" and target not in (one.target for one in every):
        return Choice(kernel, every[-1].target, f"it has no target {target}", every[-1].function, every[-1].target)
    passed_over: list[str] = []
    for one in every:
        if target not in ("auto", one.target):
            continue
        reason = one.unsupported(site) or (one.slower(site) if target == "auto" else None)
        if reason is None:
            why = "asked for by name" if target != "auto" else "; ".join(passed_over) or "first choice"
            found = Choice(kernel, one.target, why, one.function, one.target)
            return _recording_another(found, site) if one.target == "torch-autograd" else found
        passed_over.append(f"{one.target}: {reason}")
    raise KernelUnavailable(f"kernel {kernel} cannot run: {'; '.join(passed_over)}")
