"""One count of work for everyone: products that are added up, of whatever runs as operations of PyTorch.

Matrix products, products of a matrix or a vector with a vector, and PyTorch's own attention count; exponentials, sums,
products of elements, sorting, gathering and decompositions don't. Kernels of Numba and Triton are not seen: kdecore's own
methods are counted with ``kernels="array-api"``, and its certificates count where a report is asked for.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def multiply_accumulates(call: Callable[[], Any]) -> int:
    """Run a call, and return how many multiply-accumulates it took; exact attention takes n_q·n_k·(d + d_v) a group."""
    # PyTorch counts a multiply-accumulate as two operations, and not at all what follows.
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def _of_vector(a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * prod(a)


def _of_vector_added(c: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * prod(a)


def _of_attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


UNCOUNTED = {
    aten.mv: _of_vector,
    aten.dot: _of_vector,
    aten.vdot: _of_vector,
    aten.addmv: _of_vector_added,
    aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
}
"""Operation → its formula, from shapes of its arguments, in PyTorch's operations."""
