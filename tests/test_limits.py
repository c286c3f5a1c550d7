"""What sizes implementations take: stated for each, checked while planning, and kept by every call that follows the plan."""

import dataclasses
import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdecore
from kdecore.accuracy import search
from kdecore.arrays.errors import KernelUnavailable
from kdecore.core import problem as problems
from kdecore.core.problem import canonicalise
from kdecore.core.tree import node_count
from kdecore.engine import nonfinite
from kdecore.engine.restrictions import check_restrictions
from kdecore.engine.split import subproblems
from kdecore.kernels import registry
from kdecore.kernels.attend_blocks import contract as attend_blocks
from kdecore.kernels.balanced_view import contract as balanced_view
from kdecore.kernels.node_summaries import contract as node_summaries
from kdecore.kernels.open_tree import contract as open_tree
from kdecore.kernels.rank_codes import contract as rank_codes
from kdecore.kernels.registry import KERNELS, choose
from kdecore.kernels.scaled_nodes import contract as scaled_nodes
from kdecore.kernels.site import Largest, Site
from kdecore.methods import auto, choices, memory, treecode
from kdecore.methods.treecode import Treecode

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CUDA = Site("torch", "cuda:0", "float32")
HALF, SINGLE = {"item_bytes": 2}, {"item_bytes": 4}
TREE = {"directions": 16, "leaf_size": 4}
LISTS = {"d": 128, "directions": 16, "rows": 64, "nodes": 2**24 - 1, **SINGLE}
LIMITS = {
    "attention": attend_blocks.triton_limit,
    "gradients": attend_blocks.backward_limit,
    "view": balanced_view.numba_cuda_limit,
    "codes": rank_codes.numba_cuda_limit,
    "summaries": node_summaries.triton_limit,
    "scaled nodes": scaled_nodes.numba_cuda_limit,
    "lists": open_tree.triton_limit,
}
EDGES = [
    ("attention", {"d": 256, "d_v": 256, **SINGLE}, {"d_v": 257}, "≤ 2048 bytes, padded, got 2112 (d = 256, d_v = 257, 4 "),
    ("attention", {"d": 512, "d_v": 512, **HALF}, {"d": 513}, "≤ 2048 bytes, padded, got 2080 (d = 513, d_v = 512, 2 "),
    ("gradients", {"d": 64, "d_v": 80, **SINGLE}, {"d_v": 81}, "≤ 576 bytes, padded, got 640"),
    ("gradients", {"d": 128, "d_v": 144, **HALF}, {"d": 145}, "≤ 576 bytes, padded, got 608"),
    ("view", {"d": 256, "directions": 16}, {"d": 257}, "takes d ≤ 256, got 257"),
    ("view", {"d": 256, "directions": 16}, {"directions": 17}, "takes directions ≤ 16, got 17"),
    ("codes", {"directions": 64}, {"directions": 65}, "takes directions ≤ 64, got 65"),
    ("summaries", {"d": 1024, "d_v": 1024, **TREE}, {"d": 1025}, "takes d ≤ 1024, got 1025"),
    ("summaries", {"d": 1024, "d_v": 1024, **TREE}, {"d_v": 1025}, "takes d_v ≤ 1024, got 1025"),
    ("summaries", {"d": 1024, **TREE}, {"leaf_size": 5}, "takes d ≤ 512, got 1024"),
    ("summaries", {"n_k": 2**30, "nodes": 2**30 - 1, **TREE}, {"nodes": 2**30}, "nodes and keys ≤ 2147483647, got 21474836"),
    ("scaled nodes", {"d": 1200, "directions": 32}, {"directions": 33}, "takes directions ≤ 32, got 33"),
    ("lists", LISTS, {"d": 129}, "takes d ≤ 128, got 129"),
    ("lists", LISTS, {"rows": 65}, "takes bytes of a block's queries ≤ 32768, got 33280"),
    ("lists", LISTS | {"rows": 128, **HALF}, {"rows": 129}, "takes queries of a block ≤ 128, got 129"),
    ("lists", LISTS, {"nodes": 2**24}, "takes nodes ≤ 16777215, got 16777216"),
]


@pytest.mark.parametrize(("name", "most", "more", "said"), EDGES, ids=lambda x: x if isinstance(x, str) else "")
def test_limits(name, most, more, said):
    assert LIMITS[name](Largest(**most)) is None
    assert said in LIMITS[name](Largest(**most | more))


@pytest.fixture
def numba_there(monkeypatch):
    """Let Numba compile for a device, as far as planning knows."""
    monkeypatch.setattr(registry, "cuda_problem", lambda: None)


SIZES = st.builds(
    Largest,
    d=st.integers(1, 1200),
    d_v=st.integers(1, 1200),
    item_bytes=st.sampled_from([2, 4]),
    directions=st.integers(1, 80),
    leaf_size=st.integers(2, 8),
    nodes=st.integers(1, 2**25),
    n_k=st.integers(1, 2**31),
    rows=st.integers(1, 200),
)


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@given(SIZES, SIZES)
def test_what_is_taken_is_taken_in_every_smaller_size(limit, first, second):
    """On which rests that the largest sizes of a call stand for all of its pieces."""
    names = [field.name for field in dataclasses.fields(Largest)]
    smaller = Largest(**{name: min(getattr(first, name), getattr(second, name)) for name in names})
    if limit(first) is None:
        assert limit(smaller) is None


RECORDED = ("finite_rows", "spoil_groups", "spoil_rows", "shrink_matrices", "project_rows", "node_summaries", "gap_moments")


@pytest.mark.parametrize("kernel", [*RECORDED, "attend_tree", "attend_blocks", "attend_dense"])
def test_no_kernel_of_a_device_cuts_gradients_off(numba_there, kernel):
    """Those whose results carry them; all others are given what carries none."""
    on_devices = [one for one in KERNELS[kernel] if one.target in ("triton", "numba-cuda")]
    assert {one.unsupported(CUDA) for one in on_devices} == {None}
    assert {one.unsupported(replace(CUDA, gradient="reverse")) for one in on_devices} == {"records no gradients"}


# registry.choose

WIDE = replace(CUDA, largest=Largest(n_q=1000, n_k=100, d=300, d_v=300, item_bytes=4))
MANY = "takes rows of all groups ≤ 2147483647"
REFUSED = [
    ("attend_blocks", WIDE, "triton: takes a key and a value of ≤ 2048 bytes, padded, got 2560 (d = 300, d_v = 300"),
    ("attend_dense", WIDE, "triton: takes a key and a value of ≤ 2048 bytes, padded, got 2560 (d = 300, d_v = 300"),
    ("open_tree", WIDE, "triton: takes d ≤ 128, got 300"),
    ("node_summaries", replace(CUDA, largest=Largest(d=1025, leaf_size=4)), "triton: takes d ≤ 1024, got 1025"),
    ("project_rows", replace(CUDA, largest=Largest(groups=2**16, n_q=2**15)), f"triton: {MANY}, got 2147483648"),
    ("rank_codes", replace(CUDA, largest=Largest(groups=2**27)), f"triton: {MANY}, got 4294967296"),
]


@pytest.mark.parametrize(("kernel", "site", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_target_asked_for_by_name_that_does_not_take_so_much_is_refused(kernel, site, said):
    assert choose(kernel, replace(site, largest=Largest()), "triton").target == "triton"
    with pytest.raises(KernelUnavailable) as error:
        choose(kernel, site, "triton")
    assert f"kernel {kernel} cannot run: {said}" in str(error.value)


@pytest.mark.parametrize(("kernel", "site", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_another_target_is_chosen_and_the_reason_says_why(kernel, site, said):
    assert choose(kernel, replace(site, largest=Largest())).target == "triton"
    choice = choose(kernel, site)
    others = (one.target for one in KERNELS[kernel][1:] if one.unsupported(site) is None)
    assert choice.target == choice.computed_by == next(others)
    assert choice.reason.startswith(said)


@pytest.mark.parametrize("kernel", ["attend_blocks", "attend_dense"])
@pytest.mark.parametrize(
    ("d_v", "forward", "backward"),
    [
        (64, "forward triton (first choice)", "backward triton"),
        (200, "forward triton (first choice)", "backward PyTorch (triton: takes a key and a value of ≤ 576 bytes"),
        (600, "forward numba-cuda (triton: takes a key and a value of ≤ 2048 bytes", "backward PyTorch (triton: takes"),
    ],
)
def test_what_computes_recorded_attention_is_said(numba_there, kernel, d_v, forward, backward):
    choice = choose(kernel, replace(CUDA, gradient="reverse", largest=Largest(n_q=256, d=64, d_v=d_v, item_bytes=4)))
    assert choice.target == "torch-autograd"
    assert choice.computed_by == ("numba-cuda" if d_v == 600 else "triton")
    assert choice.reason.startswith("gradients are recorded: ")
    assert forward in choice.reason
    assert backward in choice.reason


@pytest.mark.parametrize("library", ["cupy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_without_triton_is_computed_by_numba(numba_there, library, dtype):
    """Of any width; by matrix products where there are few queries for all keys."""
    site = Site(library, "cuda:0", dtype, largest=Largest(groups=4, n_q=64, n_k=2**20, d=4096, d_v=4096, item_bytes=8))
    few = replace(site, largest=replace(site.largest, n_q=63))
    assert [choose(kernel, site).target for kernel in ("attend_blocks", "attend_dense")] == ["numba-cuda"] * 2
    assert choose("attend_blocks", few).target == "numba-cuda"
    choice = choose("attend_dense", few)
    assert choice.target == "array-api"
    assert "numba-cuda: matrix products are expected to be faster for 252 queries" in choice.reason
    assert choose("attend_dense", few, "numba-cuda").target == "numba-cuda"


def test_what_computes_recorded_summaries_is_said():
    site = replace(CUDA, gradient="reverse", largest=Largest(d=64, d_v=64, leaf_size=4))
    assert choose("node_summaries", site).reason == "gradients are recorded: forward triton (first choice), backward PyTorch"


def test_a_call_by_name_that_is_too_large_is_refused(monkeypatch):
    """As it would be on a CUDA device, of whose arrays planning reads nothing."""
    monkeypatch.setattr(choices, "device_name", lambda array: "cuda:0")
    q = torch.empty(2, 3000, 300, device="meta")
    with pytest.raises(KernelUnavailable, match=r"triton: takes a key and a value of ≤ 2048 bytes.*d = 300, d_v = 300"):
        kdecore.attention(q, q, q, method="sortlsh", kernels="triton")
    with pytest.raises(KernelUnavailable, match=r"pick_threshold.*triton: takes d ≤ 128, got 200"):
        kdecore.attention(*(q[..., :200],) * 3, method="treecode", kernels="triton")


# Sizes that a plan goes by


def planned(dtype="float32", d=64, d_v=64, n=3000, options=None, causal=False, window=None):
    """Return what is chosen for a treecode on a CUDA device."""
    q, k, v = (torch.empty(2, n, width, dtype=getattr(torch, dtype), device="meta") for width in (d, d, d_v))
    problem = canonicalise(q, k, v)
    (share,) = subproblems(problem, check_restrictions(problem, causal, window, None, None, None, q))
    options = (options or Treecode()).resolve(None).at(True)
    return choices.choices(share.problem, options, CUDA, "auto")


def test_values_of_tree_nodes_have_a_column_more(numba_there):
    """256 columns fit, and with a spread beside them they don't; samples have none."""
    assert planned(d=256, d_v=256)["attend_blocks"].target == "numba-cuda"
    assert planned(d=256, d_v=255)["attend_blocks"].target == "triton"
    assert planned(d=256, d_v=256, options=Treecode(far_field="sample"))["attend_blocks"].target == "triton"


def test_means_of_float16_are_stored_in_float32(numba_there):
    assert planned("bfloat16", d=300, d_v=300)["attend_blocks"].target == "triton"
    assert planned("float16", d=300, d_v=300)["attend_blocks"].target == "numba-cuda"
    assert planned("float16", d=300, d_v=300)["node_summaries"].target == "triton"


def test_opening_goes_by_how_means_are_stored():
    """In bfloat16 by the summaries in Triton, which take no rows so wide as the others."""
    options = Treecode(block_size=128)
    assert planned("bfloat16", d=128, options=options)["open_tree"].target == "triton"
    for more in ({"dtype": "float16"}, {"dtype": "float32"}, {"dtype": "bfloat16", "d_v": 1025}):
        assert "bytes of a block's queries" in planned(**{"d": 128, "options": options} | more)["open_tree"].reason


# Calls keep to them


def given_sizes(kernel, xp, *given):
    """Return the sizes of what a kernel is given that limits go by."""
    if kernel == "attend_blocks":
        q, _, v = given[:3]
        return {"d": q.shape[1], "d_v": v.shape[1], "item_bytes": q.dtype.itemsize}
    if kernel == "attend_dense":
        q, _, v = given[:3]
        return {"d": q.shape[2], "d_v": v.shape[2], "item_bytes": q.dtype.itemsize}
    if kernel == "node_summaries":
        k, v, coordinates, _, order, leaf_size, _ = given
        n = order.shape[1]
        found = {"d": k.shape[2], "d_v": v.shape[2], "directions": coordinates.shape[2], "leaf_size": leaf_size}
        return found | {"n_k": n, "nodes": node_count(n, leaf_size)}
    if kernel in ("open_tree", "pick_threshold"):
        (q, _, coordinates, index, _), tree, *_ = given
        found = {"d": q.shape[2], "directions": coordinates.shape[2], "rows": index.shape[2]}
        return found | {"nodes": tree.nodes, "item_bytes": tree.keys.dtype.itemsize}
    if kernel == "balanced_view":
        return {"d": given[0].shape[1], "directions": given[4]}
    if kernel == "scaled_nodes":
        nodes, _, directions, *_ = given
        return {"d": directions.shape[1], "directions": directions.shape[2], "nodes": nodes.spread.shape[1]}
    return {"directions": given[0].shape[2]} if kernel == "rank_codes" else {}


@pytest.fixture
def watched(monkeypatch):
    """Keep inputs as accelerators do, and check the sizes of every call of a kernel against those it was chosen for."""
    for module in (problems, nonfinite, choices, memory, auto, treecode):
        monkeypatch.setattr(module, "on_accelerator", lambda array: True)
    met = set()

    def choose_watched(kernel, site, target="auto"):
        choice = choose(kernel, site, target)

        def function(*given, **more):
            for name, size in given_sizes(kernel, *given).items():
                assert size <= getattr(site.largest, name), (kernel, name)
                met.add((kernel, name, size == getattr(site.largest, name)))
            return choice.function(*given, **more)

        return replace(choice, function=function)

    monkeypatch.setattr(choices, "choose", choose_watched)
    return met


CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 500, "causal": True},
    "lengths": {"key_lengths": [1100, 700]},
    "in parts": {"max_memory": 0.9},
    "mask": {"mask": True},
    "causal and a mask": {"causal": True, "mask": True},
}
METHODS = {"treecode": Treecode(), "sampled": Treecode(far_field="sample"), "sortlsh": kdecore.SortLSH()}


def random_inputs(dtype, n=1100):
    rng = np.random.default_rng(0)
    shapes = (2, n, 20), (2, n, 20), (2, n, 12)
    return [torch.tensor(rng.standard_normal(shape)).to(getattr(torch, dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", CALLS)
def test_no_piece_of_a_call_is_larger_than_planned(watched, call, method, dtype):
    attention = partial(kdecore.attention, *random_inputs(dtype), method=METHODS[method], budget=128, kernels="array-api")
    options = dict(CALLS[call])
    if "mask" in options:
        options["mask"] = torch.tensor(np.random.default_rng(1).random((1100, 1100)) < 0.8)
    if "max_memory" in options:
        _, report = attention(return_report=True)
        options["max_memory"] = int(report.temporary_bytes * options["max_memory"])
    attention(return_report=True, **options)
    assert ("attend_blocks", "d", True) in watched
    assert (("open_tree", "directions", True) in watched) == (method != "sortlsh")


@pytest.mark.parametrize("method", ["treecode", "sortlsh"])
def test_no_piece_of_a_search_is_larger_than_planned(watched, monkeypatch, method):
    for name in ("THINNED_SHARE", "WHOLE_SHARE"):
        monkeypatch.setattr(search, name, math.inf)
    call = {"method": method, "rtol": 0.8, "kernels": "array-api", "return_report": True}
    _, report = kdecore.attention(*random_inputs("bfloat16", 6000), **call)
    assert report.rounds
    assert ("attend_blocks", "d", True) in watched


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_piece_of_an_index_is_larger_than_planned(watched, dtype):
    q, k, v = random_inputs(dtype)
    index = kdecore.KeyIndex(k, v, budget=128, kernels="array-api")
    for first in range(0, 600, 150):
        index.append(*(x[:, first : first + 150] for x in (k, v)))
        index.attend(q[:, : first + 1])
    index.attend_and_append(q[:, :300], k[:, :300], v[:, :300])
    assert ("open_tree", "nodes", True) in watched
