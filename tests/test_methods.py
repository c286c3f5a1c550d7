"""A method from outside: registered by its 60 lines alone, it gets all that others have."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

import kdecore
from kdecore.core.options import DEFAULT_BUDGET, Options
from kdecore.core.selection import Selection, equal_blocks
from kdecore.methods import METHODS, Method, Priors, Stages, register
from kdecore.methods.costs import CostModel, modelled_cost
from tests import oracles
from tests.features import FEATURES


@dataclass(frozen=True)
class EveryFew(Options):
    """Every so many-th key, for all queries alike."""

    name: ClassVar[str] = "every-few"

    num_keys: int | None = None

    @property
    def budget(self):
        return self.num_keys

    def resolve(self, budget):
        return replace(self, num_keys=self.num_keys or budget or DEFAULT_BUDGET)

    def with_budget(self, budget):
        return replace(self, num_keys=budget)


def select(problem, plan):
    """Select evenly spaced keys, each of which stands for as many."""
    xp, budget = problem.xp, min(plan.options.budget, problem.n_k)
    every = xp.arange(problem.n_q, dtype=xp.int64, device=problem.device)
    key = xp.arange(budget, dtype=xp.int64, device=problem.device) * problem.n_k // budget
    weight = xp.full((1, 1, budget), float(np.log(problem.n_k / budget)), dtype=problem.dtype, device=problem.device)
    return Selection(
        equal_blocks(xp, xp.broadcast_to(every, (problem.groups, problem.n_q)), problem.n_q),
        xp.broadcast_to(key, (problem.groups, 1, budget)),
        xp.broadcast_to(weight, (problem.groups, 1, budget)),
    )


@pytest.fixture
def every_few():
    yield register(
        Method(
            EveryFew,
            select,
            cost=partial(modelled_cost, CostModel(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
            priors=Priors(("num_keys",), first_budget=128, easy_error=0.5, decay=0.5),
        )
    )
    del METHODS["every-few"]


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature(backend, rng, every_few, feature):
    """Exact where the budget covers all keys; else an estimate, its report with a certificate that holds the error."""
    example = FEATURES[feature](rng)
    options = {name: backend.arrays(x)[0] if isinstance(x, np.ndarray) else x for name, x in example.options.items()}
    arrays = backend.arrays(example.q, example.k, example.v)
    truth, _ = oracles.masked_attention(example.q, example.k, example.v, example.bias)
    out = kdecore.attention(*arrays, **options, method="every-few", budget=90)
    np.testing.assert_allclose(backend.numpy(out), truth, rtol=0, atol=1e-9)
    out, report = kdecore.attention(*arrays, **options, method="every-few", budget=30, return_report=True)
    off = np.linalg.norm(backend.numpy(out) - truth) / np.linalg.norm(truth)
    assert 0.0 < off < 2.0
    assert "every-few" in str(report)
    assert report.certificate is not None


def test_a_tolerance(rng, every_few):
    k = np.repeat(rng.standard_normal((60, 8)), 100, axis=0)[rng.permutation(6000)]
    q, v = rng.standard_normal((6000, 8)), k[:, :3] + 1.0
    out, report = kdecore.attention(q, k, v, method=EveryFew(), rtol=0.2, return_report=True)
    exact = kdecore.attention(q, k, v, method="exact")
    assert report.method == "every-few"
    assert np.linalg.norm(out - exact) <= 0.2 * np.linalg.norm(exact)


def test_gradients_in_a_model(rng, every_few):
    q, k, v = (torch.tensor(rng.standard_normal((1, 2, 50, 4)), requires_grad=True) for _ in range(3))
    call = partial(kdecore.attention, method="every-few", budget=20)
    assert torch.autograd.gradcheck(call, (q, k, v), fast_mode=True)


def test_names_are_of_one_method(every_few):
    with pytest.raises(kdecore.OptionError, match="'every-few' is there already"):
        register(Method(EveryFew, select))
    assert kdecore.attention(*np.ones((3, 4, 2)), method="every-few", budget=2).shape == (4, 2)


def test_options_of_no_method():
    with pytest.raises(kdecore.OptionError, match=r"method must be registered .*EveryFew\(num_keys=3\)"):
        kdecore.attention(*np.ones((3, 4, 2)), method=EveryFew(3))
    with pytest.raises(kdecore.OptionError, match=r"method must be one of .*, got 'every-few'"):
        kdecore.attention(*np.ones((3, 4, 2)), method="every-few")


def test_all_keys_may_be_selected(rng, every_few):
    METHODS["every-few"] = replace(METHODS["every-few"], select=lambda problem, plan: Selection())
    q, k, v = rng.standard_normal((3, 30, 4))
    for options in ({}, {"causal": True}):
        found = kdecore.attention(q, k, v, method="every-few", budget=20, **options)
        np.testing.assert_allclose(found, kdecore.attention(q, k, v, method="exact", **options), rtol=0, atol=1e-12)


def test_what_no_mask_can_be_applied_to_is_refused(rng, every_few):
    def with_keys(problem, plan):
        return replace(select(problem, plan), keys=problem.k, values=problem.v)

    METHODS["every-few"] = replace(METHODS["every-few"], select=with_keys)
    with pytest.raises(ValueError, match="under a mask every-few may select the problem's keys alone"):
        kdecore.attention(*rng.standard_normal((3, 30, 4)), method="every-few", budget=20, mask=rng.random((30, 30)) < 0.5)


def test_blocks_that_are_restricted_have_a_size():
    stages = Stages(lambda *given: None, lambda *given: None, restrict=lambda *given: None)
    with pytest.raises(kdecore.OptionError, match="stages must say rows where they say restrict"):
        register(Method(EveryFew, select, stages=stages))
    assert "every-few" not in METHODS


def test_auto_is_a_method_like_others(rng):
    q, k, v = rng.standard_normal((3, 300, 4))
    auto = METHODS["auto"].options
    for options in ({"budget": 50}, {"rtol": 0.3}):
        np.testing.assert_array_equal(
            kdecore.attention(q, k, v, method=auto(), **options), kdecore.attention(q, k, v, **options)
        )
    assert [auto(30).resolve(x).budget for x in (None, 30)] == [30, 30]
    with pytest.raises(kdecore.OptionError, match="budget must be None or num_keys = 30, got 40"):
        kdecore.attention(q, k, v, method=auto(30), budget=40)
    with pytest.raises(kdecore.OptionError, match="num_keys must be an integer of at least 1, got -5"):
        auto(-5)
