"""Gradients of estimates: of the kernels that know theirs, and of the operator that evaluates again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import kdecore
from kdecore.arrays.namespace import namespace_of
from kdecore.core.problem import canonicalise
from kdecore.engine.attend import attend
from kdecore.kernels import registry
from kdecore.kernels.gap_moments.reference import gap_moments
from kdecore.kernels.second_moment.reference import second_moment
from kdecore.kernels.shrink_matrices.reference import shrink_matrices
from kdecore.methods import METHODS as ALL
from kdecore.methods import key_tree, tree_pilot, treecode
from kdecore.methods.first_order import first_order
from kdecore.methods.plan import make_plan
from kdecore.methods.view import query_moment
from kdecore_adapters import torch_gradients
from kdecore_adapters.torch_adapter import scaled_dot_product_attention
from tests.features import METHODS


def tensors(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]


ESTIMATES = {
    "exact": kdecore.Exact(),
    "sortlsh": kdecore.SortLSH(block_size=4, num_samples=6),
    "hyper": kdecore.Hyper(block_size=4, num_samples=6),
    "kdeformer": kdecore.KDEformer(num_samples=9),
    "kdeformer, sampled": kdecore.KDEformer(num_samples=9, normaliser="sampled"),
    "treecode": kdecore.Treecode(num_slots=11, block_size=4),
    "treecode, sampled": kdecore.Treecode(num_slots=11, block_size=4, far_field="sample"),
}


@pytest.fixture
def listed(monkeypatch):
    """Have gradients of the treecode taken through lists, as where no kernel knows those of a tree being opened."""
    known = tuple(one for one in registry.KERNELS["attend_tree"] if one.target != "torch-autograd")
    return lambda: monkeypatch.setitem(registry.KERNELS, "attend_tree", known)


@pytest.mark.parametrize("options", ESTIMATES.values(), ids=ESTIMATES)
def test_gradcheck_with_what_was_chosen_held_fixed(listed, options):
    """The means of tree nodes, and the first-order term, are functions of keys and values; lists and weights constants."""
    listed()
    q, k, v = tensors((2, 13, 3), (2, 29, 3), (2, 29, 4))
    problem = canonicalise(q, k, v)
    plan = make_plan(problem, method=options)
    chosen = ALL[plan.method].select(problem, plan)
    if isinstance(options, kdecore.Treecode) and options.far_field == "mean":
        fixed = problem.without_gradient()
        moment = query_moment(problem.xp, fixed.q, second_moment)
        view, coordinates, sizes, limits = key_tree.described_keys(fixed, plan, moment)
        prepared = treecode.prepare(fixed, plan)
        _, key_index, share = tree_pilot.open_pilot(fixed, plan, prepared)

    def estimate(q, k, v):
        found, selection = replace(problem, q=q, k=k, v=v), chosen
        if chosen.keys is not None:
            tree = key_tree.grow(found, plan, view, coordinates, sizes, limits, moment)
            slope = first_order(problem.xp, tree.nodes, key_index, share, gap_moments, shrink_matrices)
            selection = replace(chosen, keys=tree.nodes.keys, values=tree.nodes.values, slope=slope)
        part = attend(found, plan, selection)
        return part.out, part.lse

    assert torch.autograd.gradcheck(estimate, (q, k, v))


@pytest.mark.parametrize(
    "call", [{}, {"diagonal": 0}, {"causal": True}, {"causal": True, "window": 300}, {"key_lengths": True}]
)
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 700, 5, 7, 60), torch.float64),
        ((3, 900, 33, 3, 200), torch.float64),
        ((2, 800, 64, 64, 96), torch.float32),
        ((6, 500, 16, 20, 64), torch.bfloat16),
    ],
)
def test_gradients_of_trees_opened_again_are_those_of_their_lists(rng, listed, call, sizes, dtype):
    heads, n, d, d_v, budget = sizes
    centres = rng.standard_normal((heads, 40, d))
    q, k = (centres[:, rng.integers(0, 40, n)] + 0.3 * rng.standard_normal((heads, n, d)) for _ in range(2))
    arrays = [torch.tensor(x, dtype=dtype) for x in (q, k, rng.standard_normal((heads, n, d_v)))]
    of_out, of_lse = torch.tensor(rng.standard_normal((heads, n, d_v))), torch.tensor(rng.standard_normal((heads, n)))
    call = {"key_lengths": [n - 7 * head for head in range(heads)]} if "key_lengths" in call else call

    def results(kernel):
        inputs = [x.clone().requires_grad_() for x in arrays]
        out, lse, report = kdecore.attention(
            *inputs, method="treecode", budget=budget, return_lse=True, return_report=True, certificate=0, **call
        )
        assert (kernel in report.kernels) is (report.method == "treecode")
        return out.detach(), *torch.autograd.grad((out * of_out).sum() + (lse * of_lse).sum(), inputs)

    found = results("attend_tree")
    listed()
    expected = results("attend_blocks")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm((one - other).double()) < tolerance * torch.linalg.vector_norm(other.double())


def test_gradients_of_trees_depend_on_no_number_of_threads(rng):
    q, k, v = (torch.tensor(rng.standard_normal((1, 900, 8)), dtype=torch.float32, requires_grad=True) for _ in range(3))
    first, second = (
        torch.autograd.grad(kdecore.attention(q, k, v, method="treecode", budget=64, threads=threads).sum(), (q, k, v))
        for threads in (1, 3)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gradients_where_all_values_are_alike():
    """Rounding takes results beyond the least and the largest value, where they are held: no gradient is lost by that."""
    q, k = tensors((1, 300, 8), (1, 300, 8))
    v = torch.ones(1, 300, 3, dtype=torch.float64, requires_grad=True)
    for kernels in ("auto", "array-api"):
        out = kdecore.attention(q, k, v, method="treecode", budget=60, kernels=kernels)
        (of_v,) = torch.autograd.grad(out.sum(), (v,))
        # Each result is a mean of values: its weights add up to 1.
        torch.testing.assert_close(of_v.sum(dim=1), torch.full((1, 3), 300.0, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("biased", ["for each block", "for all", ""])
@pytest.mark.parametrize("tile", [2**20, 40])
def test_gradcheck_of_blocks_with_hidden_slots_repeated_queries_and_tiles(monkeypatch, biased, tile):
    monkeypatch.setattr(torch_gradients, "TILE_LOGITS", tile)
    q, k, v = tensors((13, 3), (9, 3), (9, 2))
    rows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    if not biased:
        rows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 6], [7, 8, 9, 9]])
    keys = torch.tensor([[0, 1, 2, 3, 4], [8, 7, 6, 6, 6], [1, 3, 5, 7, 0]])
    weight = torch.zeros(3, 5, dtype=torch.float64)
    weight[1, 3:] = -torch.inf
    weight[2, 0] = 0.7
    shape = {"for each block": (3, 4, 5), "for all": (1, 4, 5)}.get(biased)
    bias = None if shape is None else tensors(shape, seed=1)[0]
    hidden = torch.zeros(shape or 0, dtype=torch.bool)
    if shape is not None:
        hidden[:, 2, 1:] = True
        hidden[0, 1] = True

    def call(q, k, v, bias=None):
        bias = None if bias is None else bias.masked_fill(hidden, -torch.inf)
        found = torch_gradients.attend_blocks(namespace_of(q), q, k, v, rows, keys, weight, 0.8, bias)
        # Query 12 is in no block, and others see nothing where all their slots are hidden: their lse has no gradient.
        return found.out, found.lse[torch.isfinite(found.lse)]

    assert torch.autograd.gradcheck(call, (q, k, v) if bias is None else (q, k, v, bias))


@pytest.mark.parametrize("tile", [2**20, 1000])
def test_gradcheck_of_exact_attention_in_tiles(monkeypatch, tile):
    monkeypatch.setattr(torch_gradients, "TILE_LOGITS", tile)
    monkeypatch.setattr(torch_gradients, "DENSE_ROWS", 128)
    xp = namespace_of(torch.ones(1))
    q, k, v = tensors((2, 7, 3), (2, 20, 3), (2, 20, 4))
    assert torch.autograd.gradcheck(lambda *x: tuple(vars(torch_gradients.attend_dense(xp, *x, 0.7)).values()), (q, k, v))


@pytest.mark.parametrize(("n", "size"), [(1, 1.0), (5, 1.0), (29, 1.0), (29, 0.01), (64, 5.0)])
def test_gradcheck_of_tree_nodes(n, size):
    """Of keys so far from each other that their spread is frozen, and of others."""
    xp = namespace_of(torch.ones(1))
    k, v, coordinates = tensors((2, n, 3), (2, n, 2), (2, n, 2))
    order = torch.stack([torch.randperm(n, generator=torch.manual_seed(i)) for i in range(2)])
    fixed = (coordinates.detach(), torch.ones(2, n, dtype=torch.float64), order, 4, torch.tensor([0.5, 2.0]).double())

    def nodes(k, v):
        found = torch_gradients.node_summaries(xp, 3.0 + k * size, v, *fixed)
        return found.keys, found.values

    assert torch.autograd.gradcheck(nodes, (k, v))


def test_gradcheck_of_gaps(rng):
    """Rows that are drawn several times, and means that are drawn too."""
    xp = namespace_of(torch.ones(1))
    keys, values = tensors((2, 12, 3), (2, 12, 4))
    lists = torch.tensor(rng.integers(0, 3, (2, 2, 5))), torch.tensor(rng.random((2, 2, 5)))
    assert torch.autograd.gradcheck(lambda *x: torch_gradients.gap_moments(xp, *x, *lists, 3, 32), (keys, values))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"enable_gqa": True}])
def test_the_operators_gradients_at_a_full_budget_are_pytorchs(method, call):
    heads = 2 if "enable_gqa" in call else 4
    arrays = tensors((2, 4, 40, 6), (2, heads, 40, 6), (2, heads, 40, 6))
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((out * weights).sum(), arrays)
        for out in (
            scaled_dot_product_attention(*arrays, method=method, budget=40, **call),
            functional.scaled_dot_product_attention(*arrays, **call),
        )
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [{}, {"causal": True}, {"mask": torch.ones(60, 60, dtype=torch.float64).tril(9) * 0.5}])
def test_the_operator_evaluates_what_it_evaluated_again(method, call):
    """Its gradients are those of a recorded call, and those of the array-API kernels, which PyTorch records step by step."""
    arrays = tensors((2, 60, 6), (2, 60, 6), (2, 60, 5))
    options = {"method": method, "budget": 16, "seed": 7}
    torch_call = {{"causal": "is_causal", "mask": "attn_mask"}[name]: value for name, value in call.items()}
    first, second, third = (
        torch.autograd.grad((out**2).sum(), arrays)
        for out in (
            scaled_dot_product_attention(*arrays, **torch_call, **options),
            kdecore.attention(*arrays, **call, **options),
            kdecore.attention(*arrays, **call, **options, kernels="array-api"),
        )
    )
    for x, *others in zip(first, second, third, strict=True):
        for y in others:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [{}, {"causal": True}, {"mask": torch.ones(60, 60, dtype=torch.float64).tril(9) * 0.5}])
def test_the_operators_log_sum_exp_is_recorded(method, call, kernels):
    """As the function records it, beside the result and alone: values play no part in it then."""
    arrays = tensors((2, 60, 6), (2, 60, 6), (2, 60, 5))
    options = {"method": method, "budget": 16, "seed": 7, "return_lse": True}
    torch_call = {{"causal": "is_causal", "mask": "attn_mask"}[name]: value for name, value in call.items()}
    results = (
        scaled_dot_product_attention(*arrays, **torch_call, **options, kernels=kernels),
        kdecore.attention(*arrays, **call, **options, kernels="array-api"),
    )
    for alone in (False, True):
        found, expected = (
            torch.autograd.grad(
                lse.sin().sum() + (0.0 if alone else (out**2).sum()),
                arrays,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for out, lse in results
        )
        assert not alone or (found[2] == 0).all()
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_log_sum_exps_of_queries_that_see_no_key_have_no_gradient():
    q, k, v = tensors((2, 4, 30, 6), (2, 4, 30, 6), (2, 4, 30, 5))
    out, lse = scaled_dot_product_attention(q, k, v, method="sortlsh", budget=9, key_lengths=[0, 25], return_lse=True)
    assert torch.isneginf(lse[0]).all()
    for slope in torch.autograd.grad(out.sum() + lse[1].sum(), (q, k, v)):
        assert (slope[0] == 0).all()
        assert slope.isfinite().all()


def test_a_learned_mask_gets_its_gradient_through_the_operator():
    q, k, v, mask, again = tensors((2, 40, 6), (2, 40, 6), (2, 40, 5), (40, 40), (40, 40))
    with torch.no_grad():
        again.copy_(mask)
    (scaled_dot_product_attention(q, k, v, mask, method="sortlsh", budget=40) ** 2).sum().backward()
    (functional.scaled_dot_product_attention(q, k, v, again) ** 2).sum().backward()
    torch.testing.assert_close(mask.grad, again.grad, rtol=1e-9, atol=1e-10)


UNBIASED = {name: ESTIMATES[name] for name in ("sortlsh", "hyper", "treecode, sampled")}


@pytest.mark.parametrize("options", UNBIASED.values(), ids=UNBIASED)
def test_gradients_of_sampled_sums_are_unbiased(options):
    """Of numerators and denominators, which are unbiased; a quotient's isn't. Twelve directions: false alarm below 1e-4."""
    q, k, v = tensors((24, 3), (40, 3), (40, 3))
    rng = np.random.default_rng(1)
    above, below = torch.from_numpy(rng.standard_normal((24, 3))), torch.from_numpy(rng.standard_normal(24))
    directions = [[torch.from_numpy(rng.standard_normal(x.shape)) for x in (q, k, v)] for _ in range(12)]

    def slopes(**call):
        out, lse = kdecore.attention(q, k, v, return_lse=True, **call)
        sums = torch.exp(lse)
        found = torch.autograd.grad((above * sums[:, None] * out).sum() + (below * sums).sum(), (q, k, v))
        return [float(sum((x * y).sum() for x, y in zip(found, some, strict=True))) for some in directions]

    drawn = np.array([slopes(method=options, seed=seed) for seed in range(300)])
    z = (drawn.mean(axis=0) - slopes(method="exact")) / (drawn.std(axis=0, ddof=1) / np.sqrt(300))
    assert np.abs(z).max() < 4.5
    assert (drawn.std(axis=0) > 0).all()


def kept_bytes(call):
    """Return the bytes that PyTorch keeps for a backward pass of a call, each memory once."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = call()
    return sum(kept.values()), out


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_kept_for_the_backward_pass_is_small(method, causal):
    """The operator keeps its inputs. A recorded call keeps lists and rows, O(n · budget): less than n × n."""
    arrays = [x.float().detach().requires_grad_() for x in tensors(*[(1, 2, 2048, 8)] * 3)]
    inputs = sum(x.untyped_storage().nbytes() for x in arrays)
    options = {"method": method, "budget": 128}
    kept, _ = kept_bytes(lambda: scaled_dot_product_attention(*arrays, is_causal=causal, **options))
    assert kept <= inputs
    if method != "kdeformer":
        kept, _ = kept_bytes(lambda: kdecore.attention(*arrays, causal=causal, **options))
        assert kept < 0.6 * 2 * 2048 * 2048 * 4


def test_second_derivatives_are_refused_and_left_to_the_array_api():
    q, k, v = tensors((2, 30, 4), (2, 30, 4), (2, 30, 4))
    for call in (scaled_dot_product_attention, kdecore.attention):
        (slope,) = torch.autograd.grad((call(q, k, v, method="sortlsh", budget=9) ** 2).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
            slope.sum().backward()
    out = kdecore.attention(q, k, v, method="sortlsh", budget=9, kernels="array-api")
    (slope,) = torch.autograd.grad((out**2).sum(), q, create_graph=True)
    slope.sum().backward()
    assert torch.isfinite(k.grad).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of PyTorch's own forward mode
@pytest.mark.parametrize("method", ["sortlsh", "exact"])
def test_forward_mode_takes_the_array_api(method):
    """Results are means of values: a step of 1 in all values is a step of 1 in all results."""
    q, k, v = (x.detach() for x in tensors((2, 30, 4), (2, 30, 4), (2, 30, 4)))
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        out = kdecore.attention(q, k, forward.make_dual(v, torch.ones_like(v)), method=method, budget=9)
        found = forward.unpack_dual(out).tangent
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("q", "k"), [((2, 0, 4), (2, 30, 4)), ((0, 5, 4), (0, 30, 4))])
def test_nothing_has_no_gradient(q, k):
    arrays = tensors(q, k, k)
    scaled_dot_product_attention(*arrays, method="sortlsh", budget=9).sum().backward()
    for x in arrays:
        assert (x.grad == 0).all()


HIDES_ALL = {
    "lengths": {"key_lengths": [0, 0]},
    "boolean mask": {"attn_mask": torch.zeros(30, 30, dtype=torch.bool)},
    "window": {"window": 3, "diagonal": 500},
    "learned mask": {"attn_mask": torch.full((30, 30), -torch.inf, dtype=torch.float64)},
    "lengths beside a learned mask": {"key_lengths": [0, 0], "attn_mask": torch.zeros(30, 30, dtype=torch.float64)},
}


@pytest.mark.parametrize("hides", HIDES_ALL.values(), ids=HIDES_ALL)
@pytest.mark.parametrize("method", ["sortlsh", "treecode"])
def test_queries_that_see_no_key_have_no_gradient(method, hides):
    arrays = tensors((2, 4, 30, 6), (2, 4, 30, 6), (2, 4, 30, 5))
    hides = {name: x.clone() if name == "attn_mask" else x for name, x in hides.items()}
    mask = hides.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        arrays.append(mask.requires_grad_())
    out = scaled_dot_product_attention(*arrays[:3], method=method, budget=20, **hides)
    assert (out == 0).all()
    for x, slope in zip(arrays, torch.autograd.grad(out.sum(), arrays), strict=True):
        assert slope.shape == x.shape
        assert (slope == 0).all()


@pytest.mark.parametrize("method", ["sortlsh", "treecode"])
def test_queries_that_see_no_key_beside_others_have_no_gradient(method):
    arrays = tensors((2, 4, 30, 6), (2, 4, 30, 6), (2, 4, 30, 5))
    out = scaled_dot_product_attention(*arrays, method=method, budget=20, key_lengths=[0, 25])
    for slope in torch.autograd.grad((out * torch.linspace(-1, 1, 5)).sum(), arrays):
        assert (slope[0] == 0).all()
        assert slope.isfinite().all()
        assert (slope[1] != 0).any()
    q, k, v = arrays
    # Queries stand before and behind the keys.
    out = scaled_dot_product_attention(q, k, v, method=method, budget=20, window=3, diagonal=15)
    (slope,) = torch.autograd.grad((out * torch.linspace(-1, 1, 5)).sum(), q)
    assert slope.isfinite().all()
    assert (slope[..., 17:, :] == 0).all()
    assert (slope[..., :15, :] != 0).any(dim=-1).all()


@pytest.mark.parametrize("bad", [0.0, torch.inf])
@pytest.mark.parametrize("packed", [False, True])
def test_results_of_no_keys_are_recorded(packed, bad):
    """In the function itself, whatever the keys hold that nobody sees."""
    q, k, v = tensors((2, 5, 4), (2, 30, 4), (2, 30, 3))
    mask = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        k[0, 0, 0] = bad
    if packed:
        arrays = [q, k, v]
        found = kdecore.packed_attention(q, k, v, [0, 5, 5], [0, 0, 30], return_lse=True)
    else:
        arrays = [q, k, v, mask]
        found = kdecore.attention(q, k, v, key_lengths=[0, 0], mask=mask, return_lse=True)
    for one in found:
        for x, slope in zip(arrays, torch.autograd.grad(one.sum(), arrays), strict=True):
            assert slope.shape == x.shape
            assert (slope == 0).all()


@pytest.mark.parametrize("kernels", ["auto", "array-api"])
@pytest.mark.parametrize("method", ["sortlsh", "treecode", "kdeformer"])
def test_calls_in_inference_mode_leave_nothing_that_training_cannot_record(method, kernels):
    """What a call keeps for others, such as hyperplanes, is no tensor of PyTorch's inference mode."""
    q, k, v = tensors((2, 60, 4), (2, 60, 4), (2, 60, 5))
    call = {"method": method, "budget": 20, "seed": 987_654_321, "kernels": kernels}
    with torch.inference_mode():
        first = kdecore.attention(q, k, v, **call)
        assert first.is_inference()
    out = kdecore.attention(q, k, v, **call)
    torch.testing.assert_close(out.detach(), first)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_index_built_in_inference_mode_serves_training(dtype):
    """Its trees and its copies of keys are recorded as any constants are; without inference mode it records no less."""
    q, k, v = (x.detach().to(dtype) for x in tensors((2, 30, 4), (2, 200, 4), (2, 200, 5)))
    with torch.inference_mode():
        index = kdecore.KeyIndex(k, v, budget=32)
        index.append(k, v)
        index.append(k[:, :9], v[:, :9])
        index.attend_and_append(q, k[:, :5], v[:, :5])
    q.requires_grad_()
    (found,) = torch.autograd.grad(index.attend(q).sum(), q)
    assert found.isfinite().all()
    k.requires_grad_()
    (found,) = torch.autograd.grad(kdecore.KeyIndex(k, v, budget=32).attend(q).sum(), k)
    assert found.abs().sum() > 0
