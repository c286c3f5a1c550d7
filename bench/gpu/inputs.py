"""Sizes and inputs of all measurements of `bench.gpu`, and the errors of what is computed from them."""

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from bench.gpu.session import Session, exact_rows
from kdecore.accuracy.metrics import Errors, errors
from kdecore.arrays.namespace import namespace_of
from kdecore.compare.cases import GLOVE_SCALE, Case, glove_case

D = 64
INPUT_SETS = 3
CHECKED_ROWS = 256
"""Queries on which errors are computed."""
NOISE = 0.3
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""q, k and v, (heads, n, d) each."""


@dataclass(frozen=True)
class Scale:
    """Sizes of measurements: n of the goals, other n, slots of a list, bytes of a copy, and rows of a product."""

    heads: int
    goals: tuple[int, ...]
    others: tuple[int, ...]
    budget: int
    copied: int
    product: int


FULL = Scale(16, (2**13, 2**15, 2**17), (2**12, 2**14, 2**16, 2**18), 512, 2**30, 8192)
TINY = Scale(2, (256,), (192,), 64, 2**20, 128)


def scale_of(session: Session) -> Scale:
    """Return the sizes to measure, tiny in a rehearsal."""
    return TINY if session.rehearsal else FULL


@cache
def all_words() -> Case:
    """Read the words once."""
    return glove_case(16_384)


def words(session: Session, n: int, dtype: str, number: int = 0) -> Inputs:
    """Return one set of inputs, for logits ⟨q, k⟩ / √10: the same ones in every section.

    Rows are GloVe words, drawn with replacement, in 64 random directions for each head, and noise: real data of such length
    is not at hand, and attention to normal numbers is nearly uniform, which no estimate finds hard.
    """
    case, heads, device = all_words(), scale_of(session).heads, session.device
    generator = session.generator(n, number)
    of_keys, of_values = (torch.tensor(x, device=device) for x in (case.k, case.v))

    def some(source: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
        found = source[rows] @ directions
        noise = torch.randn(found.shape, generator=generator, device=device)
        return (found + NOISE * found.std() * noise).to(getattr(torch, dtype))

    q_rows, k_rows = (torch.randint(len(of_keys), (heads, n), generator=generator, device=device) for _ in "qk")
    width = of_keys.shape[1]
    to_keys, to_values = (torch.randn((heads, width, D), generator=generator, device=device) / width**0.5 for _ in "kv")
    return some(of_keys, q_rows, to_keys), some(of_keys, k_rows, to_keys), some(of_values, k_rows, to_values)


def input_sets(session: Session, n: int, dtype: str) -> list[Inputs]:
    """Return as many sets of inputs as memory holds beside a call's temporaries, three at most."""
    one = words(session, n, dtype)
    room = INPUT_SETS
    if session.device == "cuda":
        room = int(torch.cuda.mem_get_info()[0] / (8 * sum(x.nbytes for x in one)))
    return [one, *(words(session, n, dtype, number) for number in range(1, max(1, min(INPUT_SETS, room))))]


def sampled_errors(session: Session, one: Inputs, out: Tensor) -> Errors:
    """Return the errors on some queries, against exact attention in float64 to the same numbers."""
    q, k, v = one
    rows = torch.randperm(q.shape[1], generator=session.generator(7), device=q.device)[:CHECKED_ROWS]
    exact = exact_rows(q[:, rows], k, v, GLOVE_SCALE)
    return errors(namespace_of(exact), out[:, rows].double(), exact)
