"""Which implementation of each kernel a problem is computed by."""

from dataclasses import replace

from kdecore.arrays.gradients import gradient_mode
from kdecore.arrays.namespace import ACCUMULATION, device_name, dtype_name, namespace_name, on_accelerator
from kdecore.core.options import Options
from kdecore.core.problem import Problem
from kdecore.kernels.registry import Choice, choose
from kdecore.kernels.site import Largest, Site
from kdecore.methods.base import METHODS


def site_of(problem: Problem) -> Site:
    """Return where the kernels of a problem are to run, and its sizes."""
    masks = [] if problem.mask is None else [problem.mask.values]
    gradient = gradient_mode(problem.q, problem.k, problem.v, *masks)
    dtype = ACCUMULATION[problem.input_dtype]
    library = namespace_name(problem.xp)
    return Site(library, device_name(problem.q), dtype, gradient, sizes_of(problem), problem.library)


def choices(problem: Problem, options: Options, site: Site, kernels: str) -> dict[str, Choice]:
    """Choose an implementation of every kernel that options need."""
    needed = dict.fromkeys(options.kernels)
    if on_accelerator(problem.q):
        needed |= dict.fromkeys(("finite_rows", "spoil_groups", "spoil_rows"))
    restricted = problem.visible is not None or problem.mask is not None
    if restricted:
        needed |= dict.fromkeys(("attend_dense", "attend_blocks"))
    chosen: dict[str, Choice] = {}
    for name in needed:
        largest = METHODS[options.name].largest(problem, options, name, chosen, sizes_of(problem))
        place = replace(site, largest=largest)
        if name == "attend_tree" and not _fused(problem, place, kernels):
            continue
        if name == "attend_blocks" and "attend_tree" in chosen and not restricted:
            continue
        chosen[name] = choose(name, place, kernels)
    return chosen


def _fused(problem: Problem, site: Site, kernels: str) -> bool:
    """Return whether what a tree opens to is evaluated while it is opened, and no lists are made in memory.

    Lists are made where gradients are recorded and no kernel knows those of both, and on accelerators without a kernel.
    """
    accelerator = on_accelerator(problem.q)
    if site.gradient:
        return not accelerator and choose("attend_tree", site, kernels).target == "torch-autograd"
    return not accelerator or choose("attend_tree", site, kernels).target != "array-api"


def sizes_of(problem: Problem) -> Largest:
    """Return the sizes of a problem, which those of its pieces do not pass.

    Samples of queries, exact rows, shares, parts of them and chunks have no more queries or keys in a group, and the same
    d and d_v. Chunks become more groups of fewer rows: together the keys left to the next level may be some more than
    the problem's, for which launches check their grids again. An index plans for each of its trees.
    """
    half = dtype_name(problem.q) in ("float16", "bfloat16")
    size = 2 if half else item_bytes(problem)
    return Largest(problem.groups, problem.n_q, problem.n_k, problem.d, problem.d_v, size)


def item_bytes(problem: Problem) -> int:
    """Return the bytes of a number in the accumulation dtype."""
    return 8 if ACCUMULATION[problem.input_dtype] == "float64" else 4
