"""Checks of kdecore_adapters.distributed in processes of their own: `python -m tests.ranks NUMBER` starts so many, by gloo.

Every process runs every check of that number, and prints its name once all have come through.
"""

import os
import sys
import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import kdecore
from kdecore import OptionError
from kdecore.accuracy.certificate import estimate_errors, sample_rows
from kdecore.accuracy.metrics import errors
from kdecore.arrays.errors import DTypeError, ShapeError
from kdecore.arrays.namespace import host, namespace_of
from kdecore.arrays.random import piece_seed
from kdecore.compare.cases import glove_case
from kdecore.core.state import AttentionState, merge_states
from kdecore_adapters.distributed import ProcessGroupError, ring, ring_attention, ulysses, ulysses_attention
from kdecore_adapters.distributed.parts import asked, parts_of
from kdecore_adapters.distributed.ranks import Layout, Shard

TIMEOUT = timedelta(seconds=120)
HEADS, N, D, D_V = 4, 90, 6, 5
RESTRICTIONS = (
    {},
    {"causal": True},
    {"diagonal": 0},
    {"key_lengths": [N, 31]},
    {"causal": True, "window": 20, "key_lengths": [N, 70]},
)
FULL = ({"method": "exact"}, {"method": "treecode", "budget": N})


def rank():
    return dist.get_rank()


def count():
    return dist.get_world_size()


def edges(n):
    """Return where shards begin and end: of different lengths."""
    return [n * (3 * i + i * i) // (3 * count() + count() ** 2) for i in range(count() + 1)]


def cut(x):
    """Return this rank's rows of (…, n, width)."""
    ends = edges(x.shape[-2])
    return x[..., ends[rank()] : ends[rank() + 1], :]


def whole(x):
    """Return the rows of all ranks."""
    parts = [None] * count()
    dist.all_gather_object(parts, x.detach())
    return torch.cat(parts, dim=-2)


def summed(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def tensors(*shapes, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype).requires_grad_() for shape in shapes]


def words(n, heads=HEADS):
    """Return words that attend to each other, (1, heads, n, 25): q, k and v."""
    found = glove_case(4 * n).v[:, :25].reshape(n, heads, 25).transpose(1, 0, 2)[None].astype(np.float64)
    return [torch.from_numpy(0.6 * found.copy()).requires_grad_() for _ in range(3)]


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def compare(call, key_heads, dtype=torch.float64, atol=1e-10):
    """Compare results and gradients at a full budget with exact attention in this process."""
    q, k, v, grad = tensors((2, HEADS, N, D), (2, key_heads, N, D), (2, key_heads, N, D_V), (2, HEADS, N, D_V), dtype=dtype)
    for hidden in RESTRICTIONS:
        out, lse = kdecore.attention(q, k, v, method="exact", return_lse=True, **hidden)
        expected = torch.autograd.grad((out * grad).sum() + lse.exp().log1p().sum(), (q, k, v))
        for method in FULL:
            found, of_rows = call(*(cut(x) for x in (q, k, v)), return_lse=True, **method, **hidden)
            assert found.dtype == dtype
            close(found, cut(out), atol)
            close(of_rows, cut(lse[..., None])[..., 0], atol)
            loss = (found * cut(grad)).sum() + of_rows.exp().log1p().sum()
            for one, other in zip(torch.autograd.grad(loss, (q, k, v)), expected, strict=True):
                close(summed(one), other, 10 * atol)


def check_ulysses_is_attention_of_one_process():
    for key_heads in (HEADS, 2, 1):
        compare(ulysses_attention, key_heads)
    compare(ulysses_attention, 2, torch.bfloat16, 0.04)


def check_ulysses_takes_one_exchange_there_and_one_back():
    """And so do gradients, whatever is returned: results and log-sum-exps of another dtype go together."""
    arrays = tensors((2, HEADS, N, D), (2, 2, N, D), (2, 2, N, D_V), dtype=torch.float16)
    rows, exchange, calls = [cut(x) for x in arrays], dist.all_to_all_single, []

    def counted(*args, **options):
        calls.append(args)
        return exchange(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        for return_lse in (False, True):
            found = ulysses_attention(*rows, method="exact", return_lse=return_lse)
            assert len(calls) == 2
            torch.autograd.grad(sum(x.sum() for x in found) if return_lse else found.sum(), arrays)
            assert len(calls) == 4
            calls.clear()


def check_ring_is_attention_of_one_process():
    for key_heads in (HEADS, 1):
        compare(ring_attention, key_heads)
    compare(ring_attention, 2, torch.bfloat16, 0.06)


def check_inputs_without_heads_and_queries_of_another_length():
    q, k, v = (x.detach() for x in tensors((50, D), (N, D), (N, D_V)))
    for hidden in ({}, {"causal": True}, {"causal": True, "diagonal": -30}, {"window": 9, "diagonal": 3}):
        out = ring_attention(*(cut(x) for x in (q, k, v)), method="exact", **hidden)
        close(out, cut(kdecore.attention(q, k, v, method="exact", **hidden)))
        many = [x.expand(HEADS, -1, -1) for x in (q, k, v)]
        out = ulysses_attention(*(cut(x) for x in many), method="exact", **hidden)
        close(out, cut(kdecore.attention(*many, method="exact", **hidden)))


def check_certificate(found, out, exact):
    """Say that it is the same on all ranks, and holds for what all of them returned."""
    everywhere = [None] * count()
    dist.all_gather_object(everywhere, found)
    assert all(one == found for one in everywhere)
    true = errors(host, out.numpy(), exact.numpy())
    for norm in ("frobenius", "spectral"):
        low, high = getattr(found, f"{norm}_interval")
        # Where all rows were evaluated, the two are the error but for rounding.
        assert 0.0 < low * (1 - 1e-9) <= getattr(true, norm) <= high * (1 + 1e-9)


def check_arrays_without_elements_and_ranks_without_queries():
    q, k, v = (x.detach() for x in tensors(*((2, HEADS, N, D),) * 3))
    exact = kdecore.attention(q, k, v, method="exact")
    given = cut(k), cut(v)
    for call in (ulysses_attention, ring_attention):
        options = {"method": "sortlsh", "budget": 12, "return_report": True}
        out, report = call(cut(q)[:0], *(x[:0] for x in given), **options)
        assert (out.shape, report.certificate) == (cut(q)[:0].shape, None)
        out, report = call(cut(q), given[0], given[1][..., :0], **options)
        assert (out.shape, report.certificate) == (cut(q)[..., :0].shape, None)
        for having in range(count()):
            rows = slice(None) if rank() == having else slice(0)
            close(call(q[:, :, rows], *given, method="exact"), exact[:, :, rows])
            out, report = call(q[:, :, rows], *given, **options)
            check_certificate(report.certificate, whole(out), exact)


def check_ulysses_estimates_as_for_its_heads_alone():
    """Bit by bit where nothing is drawn, and of the first rank where something is."""
    q, k, v = words(600)
    (grad,) = tensors(q.shape)
    mine = slice(rank() * HEADS // count(), (rank() + 1) * HEADS // count())
    for options in ({"method": "treecode"}, {"method": "sortlsh", "seed": 3}, {"method": "treecode", "causal": True}):
        found = ulysses_attention(*(cut(x) for x in (q, k, v)), budget=48, **options)
        seed = piece_seed(options.get("seed", 0), (mine.start, 0) if mine.start else ())
        heads = [x[:, mine].detach().requires_grad_() for x in (q, k, v)]
        expected = kdecore.attention(*heads, budget=48, **{**options, "seed": seed})
        assert torch.equal(whole(found)[:, mine], expected)
        gradients = torch.autograd.grad((found * cut(grad)).sum(), (q, k, v))
        alone = torch.autograd.grad((expected * grad[:, mine]).sum(), heads)
        for one, other in zip(gradients, alone, strict=True):
            close(summed(one)[:, mine], other)
    _, report = ulysses_attention(*(cut(x.detach()) for x in (q, k, v)), method="exact", return_report=True)
    assert report.certificate is None
    assert report.shape[:3] == (HEADS // count(), 600, 600)


def check_certificates_are_of_all_ranks():
    q, k, v = (x.detach() for x in words(600))
    exact = kdecore.attention(q, k, v, method="exact")
    for call in (ulysses_attention, ring_attention):
        out, report = call(*(cut(x) for x in (q, k, v)), method="treecode", budget=48, return_report=True)
        check_certificate(report.certificate, whole(out), exact)
        none = call(*(cut(x) for x in (q, k, v)), method="treecode", budget=48, return_report=True, certificate=0)[1]
        assert none.certificate is None


def check_tolerances_are_kept_by_ulysses():
    q, k, v = (x.detach() for x in words(600))
    out = ulysses_attention(*(cut(x) for x in (q, k, v)), method="treecode", rtol=0.1)
    exact = kdecore.attention(q, k, v, method="exact").numpy()
    assert errors(host, whole(out).numpy(), exact).frobenius <= 0.1


def layout(n_q, n_k):
    return Layout(*(tuple(np.diff(edges(n)).tolist()) for n in (n_q, n_k)))


def by_parts(q, k, v, options):
    """Return ring attention of this rank's queries in this process, recorded by PyTorch: q (G, n, d)."""
    shard = Shard((q.shape, k.shape, v.shape), q.dtype, "cpu", False, options, {})
    rows = layout(q.shape[-2], k.shape[-2])
    state = None
    for source, parts in parts_of(asked(shard, rows), rank()).items():
        first = rows.first_key(source)
        for part in parts:
            assert part.groups == tuple(range(len(q)))
            keys = slice(first, first + part.keys)
            found = kdecore.attention(cut(q), k[:, keys], v[:, keys], return_lse=True, **part.options)
            one = AttentionState(*found)
            state = one if state is None else merge_states(namespace_of(q), state, one)
    return state


def check_ring_merges_its_parts_and_their_gradients():
    q, k, v = (x[0] for x in words(600))
    grad, grad_lse = tensors(q.shape, q.shape[:-1], seed=1)
    for options in ({"method": "treecode", "causal": True}, {"method": "sortlsh", "seed": 3}, {"method": "treecode"}):
        options = {**options, "budget": 48}
        out, lse = ring_attention(*(cut(x) for x in (q, k, v)), return_lse=True, **options)
        expected = by_parts(q, k, v, options)
        close(out, expected.out)
        close(lse, expected.lse)
        rest = cut(grad), cut(grad_lse[..., None])[..., 0]
        found = torch.autograd.grad((out, lse), (q, k, v), rest)
        for one, other in zip(found, torch.autograd.grad((expected.out, expected.lse), (q, k, v), rest), strict=True):
            close(summed(one), summed(other))


def check_ring_spends_the_budget_and_errs_little_more():
    q, k, v = (x.detach() for x in words(2048))
    for hidden in ({}, {"causal": True}):
        exact = kdecore.attention(q, k, v, method="exact", **hidden).numpy()
        options = {"method": "treecode", "budget": 96, "return_report": True, "certificate": 0, **hidden}
        single, of_single = kdecore.attention(q, k, v, **options)
        out, report = ring_attention(*(cut(x) for x in (q, k, v)), **options)
        rows = cut(q).shape[-2]
        spent = float(summed(torch.tensor(report.keys_per_query * rows))) / 2048
        assert spent <= 1.1 * of_single.keys_per_query
        ratio = errors(host, whole(out).numpy(), exact).frobenius / errors(host, single.numpy(), exact).frobenius
        assert ratio <= 1.5


def check_certificates_of_the_ring_are_of_the_rows_of_one_process():
    """Grouped heads, padding and causal attention among them: exact rows are merged from all ranks."""
    q, k, v = (x.detach() for x in tensors((2, HEADS, 400, D), (2, 2, 400, D), (2, 2, 400, D_V)))
    for hidden in ({}, {"causal": True}, {"key_lengths": [400, 150]}, {"window": 90, "causal": True}):
        options = {"method": "sortlsh", "budget": 24, "seed": 5}
        out, report = ring_attention(*(cut(x) for x in (q, k, v)), return_report=True, **options, **hidden)
        exact = kdecore.attention(q, k, v, method="exact", **hidden)
        rows = sample_rows(host, 4, 800, report.certificate.rows, 5, "cpu")
        taken = []
        for x in (whole(out), exact):
            by_groups = x.reshape(4, 2, 400, D_V).transpose(1, 2).reshape(4, 800, 1, D_V).numpy()
            taken.append(np.take_along_axis(by_groups, rows[:, :, None, None], axis=1))
        expected = estimate_errors(*taken, 800)
        assert report.certificate.rows == expected.rows
        assert report.certificate.frobenius == pytest.approx(expected.frobenius, rel=1e-9)
        assert report.certificate.frobenius_interval == pytest.approx(expected.frobenius_interval, rel=1e-9)


def refused(call, error, match, arrays, **options):
    """Say that every rank raises the same error."""
    with pytest.raises(error, match=match) as raised:
        call(*arrays, **options)
    messages = [None] * count()
    dist.all_gather_object(messages, str(raised.value))
    assert len(set(messages)) == 1


def check_every_rank_raises_the_same_error():
    arrays = [cut(x.detach()) for x in tensors((2, HEADS, N, D), (2, HEADS, N, D), (2, HEADS, N, D_V))]
    q, k, v = arrays
    last = rank() == count() - 1
    for call in (ulysses_attention, ring_attention):
        refused(call, DTypeError, "dtype and device", [x.float() for x in arrays] if last else arrays)
        refused(call, DTypeError, f"q must be a PyTorch tensor.*on rank {count() - 1}", [[1] if last else q, k, v])
        refused(call, ShapeError, "shape of v must, but for its rows", [q, k, v[..., 1:] if last else v])
        refused(call, OptionError, "budget must be the same on all ranks", arrays, budget=9 if last else 8)
        refused(call, OptionError, "budget must be an integer", arrays, budget=0 if last else 8)
        refused(call, OptionError, "record gradients on all ranks", [q.clone().requires_grad_(last), k, v])
        refused(call, OptionError, "mask must be None", arrays, mask=torch.ones(N, N, dtype=torch.bool))
        refused(call, OptionError, "key_lengths must lie in", arrays, key_lengths=[N + 1, 3])
        refused(call, ShapeError, "key_lengths must have", arrays, key_lengths=[N] * 3)
        # Where each rank would get as many as it has heads.
        refused(call, ShapeError, r"k or the first of them, \(2, 4\), got \(2, 5\)$", arrays, key_lengths=[[N] * 5] * 2)
        refused(call, OptionError, rf"in 0 … {N}, the keys of all ranks, got \[91, 91\]$", arrays, key_lengths=[N + 1] * 2)
        refused(call, OptionError, "did you mean 'budget'", arrays, budgit=9)
        refused(call, OptionError, "return_lse must be True or False", arrays, return_lse=1)
        for name in ("return_lse", "return_report"):
            refused(call, OptionError, f"{name} must be the same on all ranks", arrays, **{name: last})
        spoilt = k.clone()
        spoilt[1, -1, 0, 0] = np.nan if last else 1.0
        refused(call, OptionError, "k must be finite", [q, spoilt, v], check_finite=True)
    refused(ring_attention, OptionError, "rtol must be None", arrays, rtol=0.1)
    odd = [x[:, :3] for x in arrays]
    refused(ulysses_attention, ShapeError, f"3 heads by {count()}", odd)
    refused(ulysses_attention, ShapeError, "at least 3 dimensions", [x[0, 0] for x in arrays])
    six = [q.repeat(1, 3, 1, 1), *(x[:, :3] for x in (k, v))]
    refused(ulysses_attention, ShapeError, f"3 heads, {count()} ranks", six)


def check_another_error_of_one_rank_ends_all():
    arrays = [cut(x.detach()) for x in tensors(*((2, HEADS, N, D),) * 3)]

    def fail(*args, **options):
        raise ArithmeticError("no numbers left")

    for call, module in ((ulysses_attention, ulysses), (ring_attention, ring)):
        with pytest.MonkeyPatch.context() as patch:
            if rank() == 1:
                patch.setattr(module, "attention", fail)
            with pytest.raises(ArithmeticError if rank() == 1 else ProcessGroupError, match="no numbers left"):
                call(*arrays)
        # And none is left behind.
        assert call(*arrays).shape == arrays[0].shape


def check_groups_of_some_of_the_ranks():
    q, k, v = (x.detach() for x in tensors(*((2, HEADS, N, D),) * 3))
    size = count() // 2
    halves = [dist.new_group(list(range(first, first + size))) for first in (0, size)]
    mine, other = halves if rank() < size else halves[::-1]
    ends = [0, N] if size == 1 else [0, 40, N]
    rows = slice(*ends[rank() % size :][:2])
    for call in (ulysses_attention, ring_attention):
        out = call(*(x[..., rows, :] for x in (q, k, v)), method="exact", group=mine)
        close(out, kdecore.attention(q, k, v, method="exact")[..., rows, :])
        with pytest.raises(OptionError, match="group must be None or a ProcessGroup"):
            call(q, k, v, group=other)


def check_a_rank_that_does_not_come():
    arrays = [x.detach() for x in tensors(*((2, HEADS, N, D),) * 3)]
    impatient = dist.new_group(timeout=timedelta(seconds=1))
    if rank() > 0:
        with pytest.raises(ProcessGroupError, match="within the group's timeout"):
            ring_attention(*arrays, group=impatient)
    dist.barrier()


def check_a_process_that_ends():
    """Others end with an error that says so, wherever it was."""
    arrays = [cut(x.detach()) for x in tensors(*((2, HEADS, N, D),) * 3)]
    with pytest.MonkeyPatch.context() as patch:
        if rank() == count() - 1:
            patch.setattr(ring, "attention", lambda *args, **options: os._exit(0))
        with pytest.raises(ProcessGroupError, match=rf"on rank {rank()} of {count()}: another process has ended"):
            ring_attention(*arrays)


# Hugging Face


@cache
def models():
    """Return small decoders of transformers, and its functions of attention."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 400,
    }
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=24))
    for one in (llama, mistral):
        for name, parameter in one.named_parameters():
            # So that attention is far from uniform, and counts.
            if "q_proj" in name or "k_proj" in name:
                parameter.data *= 10
    return llama.double(), mistral.double(), transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS


def sharded_by_deepspeed(core):
    """Return what DeepSpeed puts in place of a function of attention: whole sequences, some heads, and no mask.

    As `deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF` calls it in 0.19.8, on the same tensors.
    """

    def to_heads(x):
        parts = x.chunk(count(), dim=1)
        came = ulysses.exchanged(all_ranks(), [[part] for part in parts], [[parts[0].shape]] * count())
        return torch.cat([part for (part,) in came], dim=2)

    def wrapper(module, query, key, value, attention_mask, *args, **kwargs):
        positions = [torch.empty_like(kwargs["position_ids"]) for _ in range(count())]
        dist.all_gather(positions, kwargs["position_ids"].contiguous())
        kwargs["position_ids"] = torch.cat(positions, dim=1)
        query, key, value = (to_heads(x).contiguous() for x in (query, key, value))
        context, weights = core(module, query, key, value, None, *args, **kwargs)
        batch, rows = context.shape[:2]
        (back,) = ulysses.to_rows(all_ranks(), [context.transpose(1, 2)], [rows // count()] * count())
        return back.transpose(1, 2).reshape(batch, rows // count(), -1), weights

    return wrapper


def all_ranks():
    from kdecore_adapters.distributed.ranks import joined

    return joined(None)


def check_the_registered_name_under_deepspeeds_ulysses():
    from kdecore_adapters.transformers_adapter import register

    llama, mistral, functions = models()
    calls = register("kdecore", method="treecode", budget=1000, min_keys=1, packed=True)
    functions["kdecore"] = sharded_by_deepspeed(functions["kdecore"])
    ids = torch.randint(0, 100, (2, 80), generator=torch.Generator().manual_seed(0))
    one_sample = torch.arange(80).expand(2, -1)
    packed = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((50, 30), (17, 33, 30))])
    half = slice(40 * rank(), 40 * rank() + 40)
    for model, positions in ((llama, one_sample), (llama, packed), (mistral, one_sample), (mistral, packed)):
        found = []
        for implementation, rows in (("sdpa", slice(None)), ("kdecore", half)):
            model.set_attn_implementation(implementation)
            model.zero_grad()
            out = model(input_ids=ids[:, rows], position_ids=positions[:, rows], use_cache=False).logits
            out[..., 0].square().sum().backward()
            found.append((out.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
        (expected, whole_gradients), (out, gradients) = found
        close(out, expected[:, half])
        for one, other in zip(gradients, whole_gradients, strict=True):
            close(summed(one), other, 1e-8)
    # A sample of 17 is so short that PyTorch computes it.
    assert {outcome for _, outcome in calls.counts} == {"exact", "fewer than 32 queries"}


EVERYWHERE = (
    check_ulysses_is_attention_of_one_process,
    check_ulysses_takes_one_exchange_there_and_one_back,
    check_ring_is_attention_of_one_process,
    check_ulysses_estimates_as_for_its_heads_alone,
    check_certificates_are_of_all_ranks,
    check_ring_merges_its_parts_and_their_gradients,
    check_every_rank_raises_the_same_error,
    check_groups_of_some_of_the_ranks,
)
CHECKS = {
    2: (
        *EVERYWHERE,
        check_inputs_without_heads_and_queries_of_another_length,
        check_arrays_without_elements_and_ranks_without_queries,
        check_tolerances_are_kept_by_ulysses,
        check_ring_spends_the_budget_and_errs_little_more,
        check_another_error_of_one_rank_ends_all,
        check_the_registered_name_under_deepspeeds_ulysses,
        check_a_rank_that_does_not_come,
    ),
    4: (
        *EVERYWHERE,
        check_certificates_of_the_ring_are_of_the_rows_of_one_process,
        check_a_process_that_ends,
    ),
}
"""Number of processes → what they check; in the last check they may be lost to each other."""


def run(number, processes, folder):
    """Run all checks as one of so many processes."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=processes, timeout=TIMEOUT)
    for check in CHECKS[processes]:
        check()
        if check is not CHECKS[processes][-1]:
            dist.barrier()
        if number == 0:
            print(check.__name__, flush=True)


def main(processes):
    """Start so many processes, and wait for them."""
    os.environ["NUMBA_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="kdecore-ranks-") as folder:
        multiprocessing.spawn(run, (processes, Path(folder)), nprocs=processes)


if __name__ == "__main__":
    main(int(sys.argv[1]))
