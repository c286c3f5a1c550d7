"""`rtol=`: what is tried, that it is kept, and that exact is the last resort."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import kdecore
from kdecore import Certificate, Exact, KDEformer, OptionError, SortLSH, Treecode
from kdecore.accuracy.metrics import errors
from kdecore.accuracy.search import FURTHER, MOST_REFUSED, THINNED_SHARE
from kdecore.accuracy.trial import Trial, thinned
from kdecore.api.run import find
from kdecore.arrays.namespace import host
from kdecore.core.key_ranges import sliding
from kdecore.core.problem import canonicalise
from kdecore.engine.attend import attend
from kdecore.engine.restrictions import check_restrictions
from kdecore.engine.split import subproblems
from kdecore.methods import METHODS
from kdecore.methods.base import expected_cost
from kdecore.methods.plan import make_plan


def clustered(rng, groups, n, d, spread=0.3, dtype=np.float32):
    centres = rng.standard_normal((groups, 60, d))
    q, k, v = (centres[:, rng.integers(0, 60, n)] + spread * rng.standard_normal((groups, n, d)) for _ in range(3))
    # Values with a mean, so that the result is no difference of large sums.
    return [x.astype(dtype) for x in (0.5 * q, k, v + 2.0)]


def error(out, arrays, norm):
    return getattr(errors(host, out, kdecore.attention(*arrays, method="exact")), norm)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("rtol", [0.05, 0.2, 0.5])
def test_the_error_asked_for_is_kept(rng, norm, rtol):
    """A certificate's upper limit is too low for at most 1 in 20 fresh seeds by its own account; none of 102 was."""
    arrays = clustered(rng, 2, 12000, 24)
    out, report = kdecore.attention(*arrays, rtol=rtol, rtol_norm=norm, return_report=True)
    assert report.method != "exact"
    last = report.rounds[-1]
    assert (last.step, last.method) == ("certified", report.method)
    assert last.upper <= rtol
    assert report.certificate.upper(norm) == last.upper
    assert error(out, arrays, norm) <= rtol
    assert "certified" in report.details()
    assert last.spent < 1
    again = kdecore.attention(*arrays, method=report.method, budget=last.budget)
    np.testing.assert_array_equal(out, again)


def test_refused_budgets_grow_and_looser_tolerances_cost_less(rng):
    arrays = clustered(rng, 1, 16000, 24)
    costs = []
    for rtol in (0.3, 0.1, 0.03):
        _, report = kdecore.attention(*arrays, rtol=rtol, return_report=True)
        budgets = [one.budget for one in report.rounds if one.step == "certified"]
        assert budgets == sorted(set(budgets))
        assert report.rounds[0].step == "pilot"
        problem = canonicalise(*arrays)
        options = {"sortlsh": SortLSH, "treecode": Treecode, "exact": Exact}[report.method]()
        costs.append(expected_cost(problem, options.resolve(report.rounds[-1].budget)).total)
    assert costs == sorted(costs)


def test_exact_where_nothing_else_is_cheaper(rng):
    small = rng.standard_normal((3, 300, 8), dtype=np.float32)
    out, report = kdecore.attention(*small, rtol=0.1, return_report=True)
    assert (report.method, report.rounds, report.certificate) == ("exact", (), None)
    np.testing.assert_array_equal(out, kdecore.attention(*small, method="exact"))
    # Nothing stands out and the answer is near zero: no estimate is any good.
    random = rng.standard_normal((3, 12000, 32), dtype=np.float32)
    out, report = kdecore.attention(*random, rtol=0.02, return_report=True)
    assert report.method == "exact"
    assert "rtol 0.02" in report.reason
    assert {one.step for one in report.rounds} <= {"pilot"}
    assert report.rounds[0].spent <= THINNED_SHARE
    assert report.rounds[-1].spent <= FURTHER * THINNED_SHARE
    np.testing.assert_array_equal(out, kdecore.attention(*random, method="exact"))


@pytest.mark.parametrize("method", ["sortlsh", "hyper", "treecode", Treecode(block_size=32), SortLSH(num_hashes=8)])
def test_a_method_by_name_is_the_only_one_tried(rng, method):
    arrays = clustered(rng, 1, 12000, 24)
    name = method if isinstance(method, str) else method.name
    _, report = kdecore.attention(*arrays, method=method, rtol=0.5, return_report=True)
    assert report.method == name
    assert {one.method for one in report.rounds} == {name}
    if not isinstance(method, str):
        kept = {"block_size": 32} if name == "treecode" else {"num_hashes": 8}
        assert kept.items() <= report.options.items()


def test_the_same_choice_on_every_library_and_in_every_run(rng):
    arrays = clustered(rng, 1, 12000, 24)
    call = {"rtol": 0.2, "seed": 4, "return_report": True}
    (first, one), (second, two) = (kdecore.attention(*arrays, **call) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert one.rounds == two.rounds
    out, report = kdecore.attention(*map(torch.from_numpy, arrays), **call)
    assert [(x.method, x.budget, x.step) for x in report.rounds] == [(x.method, x.budget, x.step) for x in one.rounds]
    np.testing.assert_allclose(out.numpy(), first, rtol=1e-4, atol=1e-4)


def test_no_answer_that_keeps_the_tolerance_is_thrown_away(rng):
    """Rows in clusters, each query among the keys: half as many keys as there are would do, and exact takes longer."""
    centres = rng.standard_normal((100, 64))
    x = (centres[rng.integers(0, 100, 8000)] + 0.3 * rng.standard_normal((8000, 64))).astype(np.float32)
    out, report = kdecore.attention(x, x, x, rtol=0.2, return_report=True)
    assert report.method == "treecode"
    assert error(out, (x, x, x), "frobenius") <= 0.2


def test_a_slow_fall_of_errors_ends_the_search(rng, monkeypatch):
    """Errors that hardly fall: the budget that would do is foretold from how they fell, and is dearer than exact."""
    errors_found = iter(0.3 * 0.99**i for i in range(100))

    def promised(*arguments):
        found = next(errors_found)
        return Certificate(40, 0.95, found, (found, found), found, (found, found))

    monkeypatch.setattr("kdecore.accuracy.trial.estimate_errors", promised)
    _, report = kdecore.attention(*clustered(rng, 1, 12000, 24), rtol=0.2, return_report=True)
    assert report.method == "exact"
    assert len([one for one in report.rounds if one.step == "certified"]) <= MOST_REFUSED
    budgets = [one.budget for one in report.rounds]
    assert budgets[-1] > 4 * budgets[-2]


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize(("diagonal", "window"), [(0, None), (5, None), (-7, 20), (1, 9)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_thinned_queries_see_those_of_their_keys_that_are_left(rng, stride, diagonal, window, repeats):
    q, k, v = rng.standard_normal((1, repeats, 50, 4)), *rng.standard_normal((2, 1, 1, 61, 4))
    problem = canonicalise(q, k, v).standing_at(diagonal)
    by_position = sliding(50, 61, True, window, diagonal)
    problem = replace(problem, visible=by_position.rows(np.repeat(np.arange(50), repeats)))
    some = thinned(problem, stride)
    first = int(np.flatnonzero((problem.k[0] == some.k[0, 0]).all(axis=1))[0])
    queries = (np.arange(0, 50, stride)[:, None] * repeats + np.arange(repeats)).ravel()
    np.testing.assert_array_equal(some.q, problem.q[:, queries])
    np.testing.assert_array_equal(some.k, problem.k[:, first::stride])
    np.testing.assert_array_equal(some.v, problem.v[:, first::stride])
    seen = (x.visible.bias(0, x.n_k)[0] == 0 for x in (problem, some))
    np.testing.assert_array_equal(next(seen)[queries, first::stride], next(seen))
    own = problem.own[0, queries]
    # The stride divides what lies between two queries, so that all that had a key of their own still have it.
    np.testing.assert_array_equal(some.own[0], np.where(own < 0, -1, (own - first) // stride))
    assert (some.own[0] >= 0).any()


@pytest.mark.parametrize("options", [SortLSH(), Treecode()], ids=lambda options: options.name)
def test_what_is_tried_is_what_all_queries_get(rng, options):
    """The rows of a trial are those of the whole result, to rounding: lists are made block by block."""
    arrays = clustered(rng, 2, 1500, 12, dtype=np.float64)
    problem = canonicalise(*arrays)

    trial = Trial(problem, partial(make_plan, seed=2), options, 1)
    found = trial.measure(96, "certified")
    sample, plan = trial._samples["certified"], trial.plan(96)
    _, part = trial.evaluate(96)
    exact = kdecore.attention(*arrays, method="exact")
    if METHODS[options.name].staged.restrict is not None:
        stages = METHODS[options.name].staged
        of_blocks, prepared, _ = stages.restrict(problem, trial.prepared(96), sample.numbers)
        some = attend(of_blocks, plan, stages.select(of_blocks, plan, prepared))
        tried = np.stack([x[place] for x, place in zip(some.out, sample.place, strict=True)])
        distance = np.linalg.norm(part.out[:, None] - tried[:, :, None], axis=-1)
        whole = distance.argmin(axis=2)
        assert distance.min(axis=2).max() < 1e-9
        for group in range(2):
            np.testing.assert_allclose(exact[group][whole[group]], sample.exact[group].reshape(-1, 12), rtol=0, atol=1e-9)
            assert len(set(whole[group])) == whole.shape[1]
    assert found.frobenius == pytest.approx(errors(host, part.out, exact).frobenius, rel=0.5)


def test_gradients_flow_through_what_was_found(rng):
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in clustered(rng, 1, 9000, 16))
    out, report = kdecore.attention(q, k, v, method="sortlsh", rtol=0.5, return_report=True)
    assert report.method == "sortlsh"
    out.sum().backward()
    assert torch.isfinite(v.grad).all()
    assert v.grad.abs().sum() > 0


def test_arrays_without_elements(rng):
    q, k, v = rng.standard_normal((3, 50, 4))
    assert kdecore.attention(q[:0], k, v, rtol=0.1).shape == (0, 4)
    assert kdecore.attention(q, k, v[:, :0], rtol=0.1).shape == (50, 0)


def test_a_certificate_is_about_the_numbers_that_are_finite(rng):
    arrays = clustered(rng, 1, 12000, 24)
    arrays[2][0, 5, 3] = np.inf
    arrays[0][0, ::7] = np.nan
    out, report = kdecore.attention(*arrays, rtol=0.2, return_report=True)
    assert report.method != "exact"
    assert report.certificate.frobenius < 0.2
    assert np.isnan(out[0, ::7]).all()
    out, exact = (np.delete(x, slice(None, None, 7), axis=1) for x in (out, kdecore.attention(*arrays, method="exact")))
    np.testing.assert_array_equal(out[0, :, 3], np.inf)
    others = [np.delete(x, 3, axis=2) for x in (out, exact)]
    assert errors(host, *others).frobenius <= 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0}, "rtol must be a positive finite number or None, got 0"),
        ({"rtol": -0.1}, "rtol must be"),
        ({"rtol": np.nan}, "rtol must be"),
        ({"rtol": "small"}, "rtol must be"),
        ({"rtol": 0.1, "rtol_norm": "nuclear"}, "rtol_norm must be one of frobenius, spectral, got 'nuclear'"),
        ({"rtol": 0.1, "budget": 100}, "budget must be None with rtol"),
        ({"rtol": 0.1, "method": "kdeformer"}, "method must be one of auto, exact, sortlsh, hyper, treecode with rtol"),
        ({"rtol": 0.1, "method": KDEformer()}, "method must be one of"),
        ({"rtol": 0.1, "method": Treecode(num_slots=5)}, "its budget open"),
        ({"rtol": 0.1, "method": SortLSH(block_size=16)}, "its budget open"),
        ({"rtol": 0.1, "method": Treecode(far_field="sample")}, "no far_field sampled"),
        ({"rtol": 0.1, "method": "nonsense"}, "method must be one of"),
    ],
)
def test_wrong_arguments(rng, options, message):
    with pytest.raises(OptionError, match=message):
        kdecore.attention(*rng.standard_normal((3, 20, 4)), **options)


def test_what_is_certified_was_not_in_the_pilot(rng, monkeypatch):
    monkeypatch.setattr("kdecore.accuracy.trial.PILOT_PART", 1)
    problem = canonicalise(*clustered(rng, 1, 3000, 8))
    trial = Trial(problem, make_plan, Treecode(), 1)
    for kind in ("pilot", "certified"):
        trial.measure(96, kind)
    pilot, certified = (trial._samples[kind].exact for kind in ("pilot", "certified"))
    assert pilot.shape == certified.shape
    assert np.mean(np.all(pilot == certified, axis=-1)) < 0.2


def test_every_budget_has_its_own_threshold(rng):
    """What a budget needs is kept for the result, and for no other budget."""
    problem = canonicalise(*clustered(rng, 1, 3000, 8))
    trial, fresh = (Trial(problem, make_plan, Treecode(), 1) for _ in range(2))
    few = trial.measure(64, "certified")
    many = trial.measure(400, "certified")
    assert many == fresh.measure(400, "certified")
    assert many.frobenius < 0.7 * few.frobenius
    np.testing.assert_array_equal(trial.evaluate(400)[1].out, fresh.evaluate(400)[1].out)


def test_the_upper_limit_decides(rng, monkeypatch):
    promised = Certificate(40, 0.95, 0.1, (0.05, 0.3), 0.1, (0.05, 0.3))
    monkeypatch.setattr("kdecore.accuracy.trial.estimate_errors", lambda *arguments: promised)
    arrays = clustered(rng, 1, 12000, 24)
    _, report = kdecore.attention(*arrays, rtol=0.2, return_report=True)
    assert report.method == "exact"
    assert "certified" in {one.step for one in report.rounds}
    _, report = kdecore.attention(*arrays, rtol=0.31, return_report=True)
    assert report.method != "exact"


def test_samples_of_different_lengths_draw_different_numbers(rng):
    """Each is searched by itself: the first as if there were no others."""
    problem = canonicalise(*clustered(rng, 3, 400, 8))
    lengths = np.array([400, 390, 380])
    restrictions = check_restrictions(problem, False, None, None, lengths, None, problem.q)
    settings = {"seed": 5, "kernels": "auto", "threads": 1}
    found = [
        result
        for one in subproblems(problem, restrictions)
        for result in find(one, settings, SortLSH(), 0.3, "frobenius", math.inf)
    ]
    assert [result.subproblem.groups for result in found] == [(0,), (1,), (2,)]
    assert [result.plan.piece for result in found] == [(), (1, 0), (2, 0)]
    assert len({result.plan.draw_seed for result in found}) == 3
