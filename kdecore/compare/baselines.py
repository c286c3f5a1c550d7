"""Other papers' methods beside kdecore's: those of `bench.baselines`, where this project's folder `bench` can be imported.

They are looked for when a method is asked for that isn't kdecore's, and not before. Nothing else here knows of them.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from kdecore.arrays.backend import Backend, backend_named, unusable
from kdecore.arrays.errors import OptionError
from kdecore.arrays.namespace import Array
from kdecore.core.problem import Problem
from kdecore.methods import METHODS

FOLDER = "bench.baselines"
WITHOUT_BUDGET = ("exact", "mean")
"""Methods, kdecore's or baselines, that are measured once."""
Baseline = Callable[[Array, Array, Array, float, int, int], Array]
"""(q, k, v, scale, budget, seed) → out, PyTorch's tensors (G, n_q, d), (G, n_k, d), (G, n_k, d_v) → (G, n_q, d_v)."""


def known_methods(asked: Sequence[str]) -> tuple[str, ...]:
    """Return the names of methods: kdecore's, and those of baselines if any other is asked for."""
    own = tuple(METHODS)
    return own if all(name in own for name in asked) else tuple(dict.fromkeys([*own, *baselines()]))


def baselines() -> Mapping[str, Baseline]:
    """Return the baselines by name; none where PyTorch or their folder isn't there."""
    if unusable("torch") is not None:
        return {}
    try:
        folder = import_module(FOLDER)
    except ImportError as error:
        if error.name in (FOLDER, FOLDER.partition(".")[0]):
            return {}
        raise OptionError(f"methods of {FOLDER} cannot be used: {error}") from None
    found: Mapping[str, Baseline] = getattr(folder, "BASELINES", {})  # another project's folder has none
    return found


def baseline(name: str, problem: Problem, ours: Backend) -> Callable[[int, int], Array]:
    """Return a baseline as a function of budget and seed, whose results are shaped as kdecore's and in its library.

    Parameters
    ----------
    name
        Of `baselines`.
    problem
        In NumPy arrays.
    ours
        Library of the results.

    Returns
    -------
    callable
        (budget, seed) → (…, n_q, d_v). It raises `OptionError` where the baseline cannot do with such sizes.
    """
    attend, theirs = baselines()[name], backend_named("torch")
    q, k, v = (theirs.from_numpy(array) for array in (problem.q, problem.k, problem.v))

    def call(budget: int, seed: int) -> Array:
        try:
            out = attend(q, k, v, problem.scale, budget, seed)
        except ValueError as error:
            raise OptionError(f"{name}: {error}") from None
        return ours.from_numpy(problem.unfolded(theirs.to_numpy(out)))

    return call
