"""Sequences sharded across processes: the checks of tests/ranks.py, in 2 and in 4 processes, and what needs none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kdecore
from kdecore import Certificate
from kdecore_adapters.distributed import ProcessGroupError, ring_attention, ulysses_attention
from kdecore_adapters.distributed.parts import asked, parts_of, shared_out
from kdecore_adapters.distributed.ranks import Layout, Shard
from kdecore_adapters.distributed.ulysses import of_all_heads
from tests.processes import Command, run
from tests.ranks import CHECKS

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)

LAUNCHES = [Command(("-m", "tests.ranks", str(number))) for number in CHECKS]


@pytest.mark.parametrize("command", LAUNCHES, ids=str)
def test_in_processes(command):
    out = run(command)
    for check in CHECKS[int(command.arguments[-1])]:
        assert check.__name__ in out


@pytest.mark.parametrize("call", [ulysses_attention, ring_attention])
def test_without_a_process_group(call):
    x = torch.zeros(1, 2, 4, 3)
    with pytest.raises(ProcessGroupError, match="init_process_group wasn't called"):
        call(x, x, x)


@pytest.mark.parametrize(
    ("budget", "weights", "most", "parts"),
    [
        (90, (1, 1, 1), (100, 100, 100), [30, 30, 30]),
        (90, (100, 200, 150), (100, 200, 100), [20, 40, 30]),
        (90, (10, 100, 100), (10, 100, 100), [4, 43, 43]),
        (250, (100, 100, 150), (100, 100, 100), [75, 75, 100]),
        (300, (100, 100, 150), (100, 100, 100), [100, 100, 100]),
        (900, (100, 100), (100, 100), [100, 100]),
        (1, (1, 1), (9, 9), [1, 1]),
        (5, (), (), []),
    ],
)
def test_a_budget_is_shared_out(budget, weights, most, parts):
    assert shared_out(budget, weights, most) == parts


def call_of(sizes, groups=2, **options):
    layout = Layout(sizes, sizes)
    shape = (groups, sizes[0], 4)
    return asked(Shard((shape,) * 3, torch.float32, "cpu", False, options, {}), layout)


def test_causal_ranks_leave_out_what_comes_after_them():
    call = call_of((100, 60, 80), causal=True, budget=60, method="treecode")
    found = [{source: parts[0].options for source, parts in parts_of(call, rank).items()} for rank in range(3)]
    assert [list(one) for one in found] == [[0], [0, 1], [0, 1, 2]]
    assert [one["budget"] for one in found[2].values()] == [21, 13, 26]
    assert [one["diagonal"] for one in found[2].values()] == [160, 60, 0]
    assert [one["budget"] for one in found[0].values()] == [60]


def test_the_shard_that_queries_stand_in_gets_more_where_that_is_said():
    for options, parts in (({}, [25, 25]), ({"diagonal": 0}, [30, 20]), ({"diagonal": 100}, [20, 30])):
        found = parts_of(call_of((100, 100), budget=50, **options), 0)
        assert [found[source][0].options["budget"] for source in (0, 1)] == parts


def test_windows_leave_out_what_lies_before():
    call = call_of((100, 100, 100), causal=True, window=50)
    assert [list(parts_of(call, rank)) for rank in range(3)] == [[0], [0, 1], [1, 2]]


def test_groups_of_one_length_are_called_together_and_padding_costs_nothing():
    call = call_of((50, 50), groups=3, key_lengths=[100, 20, 100], budget=40)
    found = parts_of(call, 0)
    assert [(part.groups, part.keys, part.options["budget"]) for part in found[0]] == [((1,), 20, 20), ((0, 2), 50, 20)]
    assert [(part.groups, part.keys, part.options["budget"]) for part in found[1]] == [((0, 2), 50, 20)]
    assert parts_of(call_of((50, 50), key_lengths=[0, 0]), 0) == {}


def test_a_full_budget_is_a_full_budget_of_every_shard():
    for options in ({}, {"causal": True}, {"causal": True, "window": 70}, {"key_lengths": [100, 61]}):
        call = call_of((50, 30, 20), budget=100, **options)
        for rank in range(3):
            assert all(part.options["budget"] == part.keys for parts in parts_of(call, rank).values() for part in parts)


def test_options_objects_share_their_budgets():
    call = call_of((50, 50), method=kdecore.SortLSH(block_size=12, num_samples=28))
    methods = [part.options["method"] for parts in parts_of(call, 0).values() for part in parts]
    assert [(one.block_size, one.num_samples) for one in methods] == [(6, 14), (6, 14)]
    call = call_of((50, 50), method=kdecore.Exact())
    assert all(part.options["method"] == kdecore.Exact() for parts in parts_of(call, 0).values() for part in parts)


def test_every_part_draws_numbers_of_its_own():
    call = call_of((50, 50, 50), key_lengths=[150, 140], seed=7)
    seeds = [part.options["seed"] for rank in range(3) for parts in parts_of(call, rank).values() for part in parts]
    assert len(set(seeds)) == len(seeds) == 18
    again = call_of((50, 50, 50), key_lengths=[150, 140], seed=7)
    assert seeds == [part.options["seed"] for rank in range(3) for parts in parts_of(again, rank).values() for part in parts]


def test_certificates_of_ranks_are_averaged():
    one = Certificate(40, 0.95, 0.1, (0.08, 0.14), 0.2, (0.1, 0.4))
    other = Certificate(32, 0.95, 0.3, (0.2, 0.5), 0.2, (0.1, 0.4))
    reports = [SimpleNamespace(certificate=x) for x in (one, other)]
    found = of_all_heads(reports)
    assert (found.rows, found.confidence) == (32, 0.95)
    np.testing.assert_allclose([found.frobenius, *found.frobenius_interval], [0.2, 0.14, 0.32])
    np.testing.assert_allclose([found.spectral, *found.spectral_interval], [0.2, 0.1, 0.4])
    exact = SimpleNamespace(certificate=None)
    np.testing.assert_allclose(of_all_heads([reports[0], exact]).frobenius_interval, [0.04, 0.07])
    assert of_all_heads([exact, exact]) is None
