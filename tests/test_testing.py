"""What `kdecore.testing` and `kdecore verify` find, and that they find nothing where all is right."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdecore
from kdecore import KDEformer, SortLSH
from kdecore.compare import cli, verify
from kdecore.methods import METHODS
from kdecore.testing import AttentionProblem, PropertyFailed, check_backend, check_invariances, oracle, strategies
from kdecore.testing import check_spectral_bound as check_spectral
from kdecore.testing import check_unbiased as check_mean
from kdecore.testing.examples import figures_of
from kdecore.testing.spectral import reached_seldom
from kdecore_adapters.torch_backend import TorchBackend

QUICK = {"examples": 3}


def uniform(q, k, v, *, seed, scale):
    """Softmax over half the keys, drawn uniformly without replacement; the denominator counts each twice."""
    some = np.random.default_rng(seed).permutation(k.shape[-2])[: max(1, k.shape[-2] // 2)]
    out, lse = oracle.exact_attention(q, k[..., some, :], v[..., some, :], scale)
    return out, lse + math.log(k.shape[-2] / len(some))


def exact(q, k, v, *, seed, scale):
    return oracle.exact_attention(q, k, v, scale)[0].astype(q.dtype)


def weighed(select, factor):
    """Return a method's last step with log-weights of sampled keys that are off by a factor."""

    def selected(*arguments):
        found = select(*arguments)
        weight = found.log_weight
        return replace(found, log_weight=np.where(weight > 0, weight + math.log(factor), weight))

    return selected


@pytest.fixture
def broken_hyper(monkeypatch):
    """Let sampled keys of hyper count for a tenth more."""
    hyper = METHODS["hyper"]
    stages = hyper.stages._replace(select=weighed(hyper.stages.select, 1.1))
    monkeypatch.setitem(METHODS, "hyper", replace(hyper, select=weighed(hyper.select, 1.1), stages=stages))


@pytest.fixture
def few_checks(monkeypatch):
    """Let the command check hyper and exact alone: its time is shared out to as many as there are."""
    monkeypatch.setattr(verify, "METHODS", {name: verify.METHODS[name] for name in ("exact", "hyper")})


def run(capsys, *argv):
    status = cli.main(["verify", "--minutes", "0.05", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# The command


def test_the_command_is_green_and_fits_a_terminal(capsys, few_checks):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert [line.split()[-1] for line in out.splitlines() if " hyper " in line] == ["holds"] * 4
    assert out.splitlines()[-1].startswith("All 7 properties hold on numpy: ")


def test_the_command_as_json(capsys, few_checks):
    status, out, err = run(capsys, "--json", "--library", "torch")
    record = json.loads(out)
    assert (status, err, record["passed"], record["library"], record["minutes"]) == (0, "", True, "torch", 0.05)
    assert {(row["property"], row["method"]) for row in record["checks"]} >= {
        ("unbiased", "hyper"), ("spectral bound", "exact"), ("invariances", "hyper"), ("exact with all keys", "exact"),
    }  # fmt: skip
    for row in record["checks"]:
        assert row["passed"]
        assert row["examples"] >= 1
        assert 0.0 <= row["worst"] <= row["bound"]


def test_a_weight_that_is_off_is_red(capsys, few_checks, broken_hyper):
    status, out, _ = run(capsys)
    assert status == 1
    assert "hyper is not unbiased: over 100 seeds" in out
    assert "failing example: q of shape (20, 4)" in " ".join(out.split())
    assert out.splitlines()[-1] == "1 of 7 properties FAIL on numpy: unbiased, hyper."


def test_an_operation_that_is_off_is_red(capsys, monkeypatch, few_checks):
    copied = TorchBackend.from_numpy
    monkeypatch.setattr(TorchBackend, "from_numpy", lambda self, array, device=None: copied(self, array, device) * 1.001)
    status, out, _ = run(capsys, "--library", "torch", "--json")
    failed = [row for row in json.loads(out)["checks"] if not row["passed"]]
    assert status == 1
    assert ("exact with all keys", "exact") in [(row["property"], row["method"]) for row in failed]
    assert "exact on torch with a budget of all keys" in failed[0]["words"]


def test_a_method_that_raises_is_red(capsys, monkeypatch, few_checks):
    def fails(*arguments):
        raise RuntimeError("no such key")

    hyper = METHODS["hyper"]
    monkeypatch.setitem(METHODS, "hyper", replace(hyper, select=fails, stages=hyper.stages._replace(select=fails)))
    status, out, _ = run(capsys)
    assert status == 1
    assert "spectral bound, hyper: RuntimeError: no such key" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--library", "jax"], "invalid choice: 'jax'"),
        (["--minutes", "0"], "minutes must be positive and finite, got 0.0"),
        (["--minutes", "nan"], "minutes must be positive and finite, got nan"),
        (["--device", "0"], "device must be the number of a CUDA device of numpy, got 0; it has cpu"),
        (["--device", "-1"], "device must be an integer of at least 0, got -1"),
        (["extra"], "unknown arguments: extra"),
    ],
)
def test_wrong_arguments(capsys, argv, words):
    status, out, err = run(capsys, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_library_that_is_not_installed(capsys, no_torch):
    status, _, err = run(capsys, "--library", "torch")
    assert status == 2
    assert "library 'torch' cannot be used" in err


def test_without_hypothesis(capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else find(name))
    status, _, err = run(capsys)
    assert status == 2
    assert "kdecore verify needs hypothesis: pip install 'kdecore[verify]'" in err
    for name in [name for name in sys.modules if name.startswith("kdecore.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"kdecore\.testing needs Hypothesis: pip install 'kdecore\[verify\]'"):
        import kdecore.testing  # noqa: F401


# Methods from outside


def test_functions_that_are_right():
    found = check_mean(uniform, **QUICK)
    assert (found.property, found.subject, found.examples) == ("unbiased", "uniform", 3)
    assert 0.0 < found.worst < found.bound < 7.0
    assert check_spectral(uniform, budget=30, **QUICK).worst < 1.0
    assert check_invariances(uniform, **QUICK).examples == 3
    assert check_mean(exact, **QUICK).worst == 0.0


def test_a_biased_function():
    def uncounted(q, k, v, *, seed, scale):
        out, lse = uniform(q, k, v, seed=seed, scale=scale)
        return out, lse - 0.05

    with pytest.raises(
        AssertionError, match=r"uncounted is not unbiased: .*, column \d of 3 is off by -0\.0.*1e-06"
    ) as failed:
        check_mean(uncounted, **QUICK)
    assert isinstance(failed.value.problem, AttentionProblem)
    assert failed.value.worst > failed.value.bound


def test_a_ratio_of_estimates_is_biased():
    """Of out alone, out has to be right; one key of 60, weighed by itself, is any of them."""

    def one(q, k, v, *, seed, scale):
        return uniform(q, k[..., seed % 7 : seed % 7 + 4, :], v[..., seed % 7 : seed % 7 + 4, :], seed=seed, scale=scale)[0]

    with pytest.raises(PropertyFailed, match="of 2 is off by"):
        check_mean(one, **QUICK)


def test_the_false_alarm_rate_is_kept_by_symmetric_errors():
    """At a rate of at most 0.3, 43 and more of 80 runs come in fewer than 1 of 10⁵ series of them."""
    alarms = 0
    for run in range(80):

        def noisy(q, k, v, *, seed, scale, run=run):
            return exact(q, k, v, seed=seed, scale=scale) + np.random.default_rng((run, seed)).standard_normal()

        try:
            check_mean(noisy, examples=1, seeds=50, false_alarm=0.3)
        except PropertyFailed:
            alarms += 1
    assert alarms < 43


def test_spectral_bounds_that_are_broken():
    def twice(q, k, v, *, seed, scale):
        return 2.0 * exact(q, k, v, seed=seed, scale=scale)

    with pytest.raises(PropertyFailed, match=r"exceeds ε ‖A‖₂ ‖V‖₂ with 30 of 30 seeds, where \d+ may"):
        check_spectral(twice, eps=0.1, **QUICK)
    assert check_spectral(twice, eps=1.0, **QUICK).worst == pytest.approx(1.0, abs=0.3)
    assert check_spectral(KDEformer(eps=0.3), **QUICK).worst < 1.0


def test_how_many_seeds_may_fail():
    """Against sums of the binomial distribution by brute force."""
    for trials, probability, rate in ((5, 0.5, 0.1), (20, 0.1, 1e-3), (30, 0.1, 1e-7)):
        tails = [
            sum(math.comb(trials, i) * probability**i * (1 - probability) ** (trials - i) for i in range(h, trials + 1))
            for h in range(trials + 2)
        ]
        assert reached_seldom(trials, probability, rate) == next(h for h, tail in enumerate(tails) if tail <= rate)


BROKEN = {
    "a seed gives the same bits again": lambda out, q, k, v, seed: out + np.random.default_rng().standard_normal(),
    "values scale out": lambda out, q, k, v, seed: out + 1.0,
    "leading dimensions only reshape": lambda out, q, k, v, seed: out * q.ndim,
    "a factor on queries is one on the scale": lambda out, q, k, v, seed: out * (1.0 + np.abs(q).max()),
    "weights add up to one": lambda out, q, k, v, seed: 2.0 * out,
    "a vector added to all keys changes nothing": lambda out, q, k, v, seed: out * (1.0 + np.abs(k).max()),
}


@pytest.mark.parametrize("words", BROKEN)
def test_invariances_that_are_broken(words):
    def broken(q, k, v, *, seed, scale):
        return BROKEN[words](exact(q, k, v, seed=seed, scale=scale), q, k, v, seed)

    without = () if words == "weights add up to one" else ("ones",)
    with pytest.raises(PropertyFailed, match=f"broken breaks an invariance: {words}, seed"):
        check_invariances(broken, without=without, examples=20)


def test_other_shapes_are_broken():
    for check in (check_mean, check_spectral, check_invariances):
        more = {"budget": 9} if check is check_spectral else {}
        with pytest.raises(PropertyFailed, match="an array of shape"):
            check(lambda q, k, v, *, seed, scale: v, **more, **QUICK)


def test_options_and_problems_of_ones_own():
    problems = st.builds(
        lambda seed: AttentionProblem(*np.random.default_rng(seed).standard_normal((3, 12, 2)), {}), st.integers(0, 99)
    )
    assert check_mean(SortLSH(2, 4), problems=problems, **QUICK).examples == 3
    assert check_mean("hyper", budget=5, problems=problems, **QUICK).examples == 3


@pytest.mark.parametrize("check", [check_mean, check_spectral, check_invariances])
def test_problems_with_masks_are_refused(check):
    problems = strategies.problems().filter(lambda problem: problem.options.get("causal"))
    with pytest.raises(kdecore.OptionError, match="problems must have no options but scale here, got causal"):
        check("hyper", problems=problems, **QUICK)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check_mean("treecod"), "method must be one of"),
        (lambda: check_mean(3), "method must be a name, an options object or a function, got 3"),
        (lambda: check_mean("hyper", budget=0), "budget must be an integer of at least 1, got 0"),
        (lambda: check_mean("hyper", seeds=9), "seeds must be an integer of at least 50, got 9"),
        (lambda: check_mean("hyper", false_alarm=0.0), "false_alarm must lie strictly between 0 and 1"),
        (lambda: check_spectral("hyper", delta=1.0), "delta must lie strictly between 0 and 1"),
        (lambda: check_spectral("hyper", eps=-1.0), "eps must be positive"),
        (lambda: check_spectral("hyper", seeds=3), "seeds must be more for delta = 0.1"),
        (lambda: check_spectral(uniform), "eps or budget must be given for uniform"),
        (lambda: check_invariances("hyper", without=["shifts"]), "without must be one of .* did you mean 'shift'"),
        (lambda: check_mean("hyper", library="nonsense"), "library 'nonsense' cannot be used"),
        (lambda: check_mean("hyper", examples=0), "examples must be an integer of at least 1, got 0"),
        (lambda: check_backend("numpy", seconds=math.nan), "seconds must be positive, got nan"),
    ],
)
def test_arguments_out_of_range(call, words):
    with pytest.raises(kdecore.OptionError, match=words):
        call()


# Backends, strategies, the search for examples


def test_backends(backend):
    if backend.device == "cpu" and backend.name in ("numpy", "torch", "array_api_strict"):
        assert check_backend(backend.name, examples=10).worst < 1.0


def test_what_a_backend_may_not_do(monkeypatch):
    def in_place(q, *rest, **options):
        q *= 2.0
        return kdecore.attention(q / 2.0, *rest, **options)

    def other_dtype(q, *rest, **options):
        return kdecore.attention(q, *rest, **options).astype(np.float16).astype(np.float64) + 1.0

    for attention, words in ((in_place, "changes q"), (other_dtype, "is not exact")):
        monkeypatch.setattr("kdecore.testing.backends.attention", attention)
        with pytest.raises(PropertyFailed, match=words):
            check_backend("numpy", method="exact", **QUICK)


@given(strategies.problems())
def test_problems_are_calls(problem):
    out, lse = problem.exact()
    found = kdecore.attention(*problem[:3], method="exact", **problem.options)
    assert found.shape == out.shape
    assert (out[np.isneginf(lse)] == 0).all()


def test_the_smallest_failing_example_is_reported():
    def measure(problem):
        if problem.q.shape[-2] > 4:
            raise PropertyFailed("too long", problem)
        return 0.0

    with pytest.raises(PropertyFailed, match="too long; failing example: q") as failed:
        figures_of(st.tuples(strategies.problems()), measure, 100, 60.0)
    assert failed.value.problem.q.shape == (1, 1, 5, 1)


def test_one_example_is_measured_in_no_time():
    assert figures_of(st.tuples(st.integers(0, 9)), float, 10, 1e-9)[0] == 1
