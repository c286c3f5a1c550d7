"""Errors of every method on given q, k and v, where a model's weights are not at hand; and what such experiments share.

No score is made of these errors: they say how far attention is off, not what a model makes of that.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench.model_methods import Method, multiply_accumulates
from kdecore.accuracy.metrics import errors
from kdecore.arrays.errors import did_you_mean
from kdecore.arrays.namespace import namespace_of
from kdecore.compare.cases import Case

Results = dict[str, Any]


def add_shared_arguments(parser: ArgumentParser, weights: str, budgets: Sequence[int], meaning: str) -> None:
    """Add what both models' experiments are asked for.

    Parameters
    ----------
    parser
        The experiment's.
    weights
        Help of ``--weights``.
    budgets, meaning
        Default of ``--budgets``, and what the numbers are.
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, help=weights)
    source.add_argument("--standin", type=Path, help="a .npz file with q, k, v and scale: errors on those, without a model")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="all by default")
    parser.add_argument("--budgets", nargs="+", type=int, default=list(budgets), metavar="N", help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of methods and noise")
    parser.add_argument("--device", default="cpu", help="PyTorch's name of where the model runs")


def refuse(text: str) -> NoReturn:
    """Say in one line why an experiment cannot run, and exit with 2."""
    print(text, file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn errors of files and arguments into a line and exit status 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        refuse(str(error))


def chosen(names: Sequence[str] | None, known: Mapping[str, Method]) -> dict[str, Method]:
    """Return the methods of these names, all if None, or raise `ValueError` that names one unknown."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"methods must be of {', '.join(known)}; got {name!r}{did_you_mean(name, known)}")
    return {name: known[name] for name in names or known}


def check_budgets(budgets: Sequence[int]) -> None:
    """Raise `ValueError` unless all budgets are at least 1."""
    if min(budgets) < 1:
        raise ValueError(f"--budgets must be at least 1, got {min(budgets)}")


def measure_standin(case: Case, methods: Mapping[str, Method], budgets: Sequence[int], seed: int) -> Results:
    """Measure every method on one case.

    Parameters
    ----------
    case
        q (…, n_q, d), k (…, n_k, d), v (…, n_k, d_v); 1/√d where it has no scale.
    methods
        Name → method.
    budgets
        Each is tried; ``"exact"`` once, with all keys.
    seed
        Of the methods.

    Returns
    -------
    dict
        ``"standin"``, the file's name, ``"shape"`` (groups, n_q, n_k, d, d_v), ``"scale"``, and ``"rows"``: for each method
        and budget the three errors of `kdecore.accuracy.metrics`, against exact attention in float64, and
        multiply-accumulates.
    """
    q, k, v = (torch.as_tensor(x) for x in (case.q, case.k, case.v))
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    exact = (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()
    shape = (len(q), q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    rows = []
    for name, method in methods.items():
        for budget in (shape[2],) if name == "exact" else dict.fromkeys(budgets):
            off = errors(namespace_of(exact), method(q, k, v, scale, budget, seed).double(), exact)
            count = multiply_accumulates(*shape[:2], min(budget, shape[2]), *shape[3:])
            found = {"spectral": off.spectral, "frobenius": off.frobenius, "worst_row": off.worst_row}
            rows.append({"method": name, "budget": budget, **found, "multiply_accumulates": count})
    return {"standin": case.name, "shape": list(shape), "scale": scale, "rows": rows}


def standin_table(results: Results) -> str:
    """Return the errors of `measure_standin` as a table."""
    groups, n_q, n_k, d, d_v = results["shape"]
    head = f"{results['standin']}: {groups} × {n_q} queries, {n_k} keys, d = {d}, d_v = {d_v}, scale {results['scale']:.4g}"
    columns = ("method", "budget", "spectral", "Frobenius", "worst row", "G multiply-accumulates")
    kinds = ("spectral", "frobenius", "worst_row")
    rows = [
        (row["method"], row["budget"], *(f"{row[kind]:.4f}" for kind in kinds), f"{row['multiply_accumulates'] / 1e9:.3f}")
        for row in results["rows"]
    ]
    return f"{head}\nrelative errors; no model, so no score\n{aligned(columns, rows)}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in plain text, the first column to the left and the others to the right."""
    cells = [list(map(str, line)) for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )
