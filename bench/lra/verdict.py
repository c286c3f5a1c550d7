"""Whether exact attention is worth anything on a task: only then gaps between it and what stands for it mean something."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.lra.attention import CONTROL, EXACT
from bench.lra.runs import CONTROLLED, TRAINED, TUNED

Row = dict[str, Any]
CLEARLY = 3.0
"""Standard errors that exact attention has to be ahead of every rival."""


def ahead(exact: Sequence[Row], rival: Sequence[Row]) -> float:
    """Return by how many standard errors exact attention's accuracy is above a rival's.

    Parameters
    ----------
    exact, rival
        Rows of the same seeds, in their order: ``accuracy`` on the same ``examples`` test examples.

    Returns
    -------
    float
        The mean difference over √((p(1 − p) + p′(1 − p′))/N + s²/S): p and p′ are the two accuracies on N examples, taken
        for independent, which overstates the error of a difference on the same ones; s² is the variance of the S seeds'
        differences. That of training from other random weights is not in it where one network is tuned.
    """
    pairs = [(mine["accuracy"], other["accuracy"]) for mine, other in zip(exact, rival, strict=True)]
    differences = [mine - other for mine, other in pairs]
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    variance = sum(p * (1 - p) for p in means) / exact[0]["examples"]
    if len(pairs) > 1:
        variance += statistics.variance(differences) / len(pairs)
    difference = statistics.fmean(differences)
    if variance == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def rivals(rows: Sequence[Row]) -> dict[str, float]:
    """Return rival → by how many standard errors exact attention is ahead of it.

    Rivals are the majority class; the mean of values, trained as exact attention was; and, where networks were tuned, the
    mean of values tuned from exact attention's network. Of each the seeds count that exact attention has, too. Empty where
    one has none of them.
    """
    tuned = any(row["stage"] == TUNED for row in rows)

    def of(stage: str, method: str) -> dict[int, Row]:
        found = [row for row in rows if (row["stage"], row["method"]) == (stage, method) and "accuracy" in row]
        return {row["seed"]: row for row in found}

    exact = of(TUNED if tuned else TRAINED, EXACT)
    against = {"the majority class": {seed: row | {"accuracy": row["majority"]} for seed, row in exact.items()}}
    against["the mean of values, trained so"] = of(CONTROLLED if tuned else TRAINED, CONTROL)
    if tuned:
        against["the mean of values, tuned from exact"] = of(TUNED, CONTROL)
    common = {name: sorted(exact.keys() & rival.keys()) for name, rival in against.items()}
    if not all(common.values()):
        return {}
    return {
        name: ahead([exact[seed] for seed in common[name]], [rival[seed] for seed in common[name]])
        for name, rival in against.items()
    }


def clear(rows: Sequence[Row]) -> bool:
    """Return whether exact attention is clearly ahead of every rival."""
    return min(rivals(rows).values(), default=-math.inf) >= CLEARLY
