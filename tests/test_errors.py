"""Every error that `attention` documents: its type, and a message with the argument, what was expected and what came."""

import importlib.util
import json
import re
import types
import warnings
from functools import partial

import array_api_strict
import numpy as np
import pytest
import torch
from torch.masked import as_masked_tensor

from kdecore import (
    DeviceError,
    DTypeError,
    Exact,
    Hyper,
    KdecoreError,
    KDEformer,
    KernelUnavailable,
    KeyIndex,
    OptionError,
    ShapeError,
    SortLSH,
    Treecode,
    attention,
    packed_attention,
)
from kdecore.arrays.errors import did_you_mean
from kdecore.engine.restrictions import integers
from kdecore.kde import log_gaussian_kde, log_weighted_exponential_kde
from kdecore.kernels import registry

A = np.zeros((2, 5, 3))
T = torch.zeros((2, 5, 3), dtype=torch.float64)
META = torch.zeros((2, 5, 3), dtype=torch.float64, device="meta")
STRICT = array_api_strict.zeros((2, 5, 3))
ELSEWHERE = array_api_strict.zeros((2, 5, 3), device=array_api_strict.Device("device1"))

ARRAYS = {
    # name: (q, k, v), error, what the message says, in order
    "q of rank 1": ((A[0, 0], A, A), ShapeError, ["q ", "at least 2 dim", r"\(3,\)"]),
    "k of rank 0": ((A, A[0, 0, 0], A), ShapeError, ["k ", "at least 2 dim", r"\(\)"]),
    "v of rank 1": ((A, A, A[0, 0]), ShapeError, ["v ", "at least 2 dim", r"\(3,\)"]),
    "d differs": ((A, A[..., :2], A), ShapeError, ["k ", "d = 3", r"\(2, 5, 2\)"]),
    "n_k differs": ((A, A, A[:, :4]), ShapeError, ["v ", "n_k = 5", r"\(2, 4, 3\)"]),
    "lead of k": ((A, A[[0, 1, 1]], A), ShapeError, ["k ", r"leading dimensions.*\(2,\)", r"\(3, 5, 3\)"]),
    "lead of grouped k": ((A, A[:1], A), ShapeError, ["v ", r"leading dimensions of k.*\(1,\)", r"k \(1, 5, 3\)"]),
    "lead of v": ((A, A, A[0]), ShapeError, ["v ", r"leading dimensions.*\(2,\)", r"v \(5, 3\)"]),
    "no keys": ((A, A[:, :0], A[:, :0]), ShapeError, ["k ", "at least one", r"\(2, 0, 3\)"]),
    "d is 0": ((A[..., :0], A[..., :0], A), ShapeError, ["q ", "at least 1", r"\(2, 5, 0\)"]),
    "q a list": ((A.tolist(), A, A), DTypeError, ["q ", "array", "list"]),
    "k None": ((A, None, A), DTypeError, ["k ", "array", "NoneType"]),
    "v a float": ((A, A, 1.0), DTypeError, ["v ", "array", "float"]),
    "q int": ((A.astype(int), A, A), DTypeError, ["q ", "float16.*float64", "int64; cast it to float32$"]),
    "q uint": ((A.astype(np.uint8), A, A), DTypeError, ["q ", "float16.*float64", "uint8; cast it to float32$"]),
    "k complex": ((A, A.astype(complex), A), DTypeError, ["k ", "float16.*float64", "complex128; .*not defined$"]),
    "v bool": ((A, A, A.astype(bool)), DTypeError, ["v ", "float16.*float64", "bool; cast it to float32$"]),
    "q object": ((A.astype(object), A, A), DTypeError, ["q ", "float16.*float64", "object$"]),
    "torch int": ((T.int(), T.int(), T.int()), DTypeError, ["q ", "float16.*float64", "int32; cast it to float32$"]),
    "torch bool": ((T, T, T > 0), DTypeError, ["v ", "float16.*float64", "bool; cast it to float32$"]),
    "torch complex": ((T.cfloat(),) * 3, DTypeError, ["q ", "float16.*float64", "complex64; .*not defined$"]),
    "matrix q": ((A[0].view(np.matrix), A[0], A[0]), DTypeError, ["q ", "plain", r"matrix; pass np\.asarray\(q\)$"]),
    "mixed k": ((A, A.astype(np.float32), A), DTypeError, ["k ", "float64", "float32"]),
    "mixed v": ((T, T, T.bfloat16()), DTypeError, ["v ", "float64", "bfloat16"]),
    "masked q": ((np.ma.array(A), A, A), DTypeError, ["q ", "plain", "MaskedArray"]),
    "masked v": ((A, A, np.ma.array(A)), DTypeError, ["v ", "plain", "MaskedArray"]),
    "torch k": ((A, T, A), DeviceError, ["k ", "numpy", "torch"]),
    "NumPy v": ((T, T, A), DeviceError, ["v ", "torch", "numpy"]),
    "strict v": ((A, A, STRICT), DeviceError, ["v ", "numpy", "array_api_strict"]),
    "k on meta": ((T, META, T), DeviceError, ["k ", "cpu", "meta"]),
    "v on meta": ((T, T, META), DeviceError, ["v ", "cpu", "meta"]),
    "q on meta": ((META, T, T), DeviceError, ["k ", "meta", "cpu"]),
    "strict devices": ((STRICT, STRICT, ELSEWHERE), DeviceError, ["v ", "CPU_DEVICE", "device1"]),
}
OPTIONS = {
    "budget 0": ({"budget": 0}, ["budget", "at least 1", "got 0"]),
    "budget -3": ({"budget": -3}, ["budget", "at least 1", "got -3"]),
    "budget 2.5": ({"budget": 2.5}, ["budget", "integer", "got 2.5"]),
    "budget a": ({"budget": "a"}, ["budget", "integer", "got 'a'"]),
    "budget nan": ({"budget": float("nan")}, ["budget", "integer", "got nan"]),
    "budget 0, exact": ({"budget": 0, "method": "exact"}, ["budget", "at least 1", "got 0"]),
    "unknown method": ({"method": "magic"}, ["method", "auto", "exact", "sortlsh", "hyper", "got 'magic'"]),
    "method 3": ({"method": 3}, ["method", "name", "got 3"]),
    "method None": ({"method": None}, ["method", "name", "got None"]),
    "method a class": ({"method": SortLSH}, ["method", "options object", "SortLSH"]),
    "scale nan": ({"scale": float("nan")}, ["scale", "finite", "got nan"]),
    "scale inf": ({"scale": float("inf")}, ["scale", "finite", "got inf"]),
    "scale -inf": ({"scale": -np.inf}, ["scale", "finite", "got -inf"]),
    "scale x": ({"scale": "x"}, ["scale", "finite number", "got 'x'"]),
    "scale '1.5'": ({"scale": "1.5"}, ["scale", "finite number", "got '1.5'"]),
    "scale complex": ({"scale": 1j}, ["scale", "finite number", "got 1j"]),
    "scale an array": ({"scale": np.ones(2)}, ["scale", "finite number", "array"]),
    "scale too large": ({"scale": 10**400}, ["scale", "finite number", "got"]),
    "seed -1": ({"seed": -1}, ["seed", r"\[0, 2\*\*64\)", "got -1"]),
    "seed 2**64": ({"seed": 2**64}, ["seed", r"\[0, 2\*\*64\)", f"got {2**64}"]),
    "seed 1.5": ({"seed": 1.5}, ["seed", "integer", "got 1.5"]),
    "seed None": ({"seed": None}, ["seed", "integer", "got None"]),
    "contradiction": ({"method": SortLSH(2, 1), "budget": 4}, ["budget", "block_size", "= 3", "got 4"]),
    "contradiction, hyper": ({"method": Hyper(2, 1), "budget": 2}, ["budget", "block_size", "= 3", "got 2"]),
    "no room for samples": ({"method": SortLSH(block_size=4), "budget": 4}, ["budget", "exceed", "block_size=4", "got 4"]),
    "no room for a block": ({"method": SortLSH(num_samples=5), "budget": 4}, ["budget", "exceed", "=5", "got 4"]),
    "unknown kernels": ({"kernels": "abacus"}, ["kernels", "auto", "array-api", "got 'abacus'"]),
    "kernels None": ({"kernels": None}, ["kernels", "auto", "got None"]),
}
FIELDS = {
    "block_size -1": ({"block_size": -1}, ["block_size", "at least 0", "got -1"]),
    "block_size 1.5": ({"block_size": 1.5}, ["block_size", "integer", "got 1.5"]),
    "num_samples 0": ({"num_samples": 0}, ["num_samples", "at least 1", "got 0"]),
    "num_hashes 0": ({"num_hashes": 0}, ["num_hashes", "at least 1", "got 0"]),
    "num_hashes 31": ({"num_hashes": 31}, ["num_hashes", "at most 30", "got 31"]),
    "num_hashes a": ({"num_hashes": "a"}, ["num_hashes", "integer", "got 'a'"]),
}


class Wrapped:
    """Numbers that NumPy can read, as pandas has them."""

    def __array__(self, dtype=None, copy=None):
        return A


class OtherLibrary(Wrapped):
    """An array of a library that follows the array API: nothing of it may be asked for."""

    def __array_namespace__(self, api_version=None):
        return types.SimpleNamespace()


class ForeignSparse(OtherLibrary):
    def todense(self):
        return A


class SparseLikeSciPy(ForeignSparse):
    toarray = ForeignSparse.todense


class ClaimsNumPy(OtherLibrary):
    """An array that takes NumPy's functions for its own."""

    def __array_namespace__(self, api_version=None):
        return np


AS_ARRAY = "np.asarray({}) makes one"
NO_ARRAYS = {
    # name: object, what its type is called, what is to be done; {} is the argument
    "list": (A.tolist(), "list", AS_ARRAY),
    "tuple": (tuple(A.tolist()), "tuple", AS_ARRAY),
    "number": (1.0, "float", AS_ARRAY),
    "text": ("q", "str", AS_ARRAY),
    "class": (np.ndarray, "type", AS_ARRAY),
    "like pandas": (Wrapped(), "tests.test_errors.Wrapped", AS_ARRAY),
    "array API": (OtherLibrary(), "tests.test_errors.OtherLibrary", AS_ARRAY),
    "claims NumPy": (ClaimsNumPy(), "tests.test_errors.ClaimsNumPy", AS_ARRAY),
    "sparse": (ForeignSparse(), "tests.test_errors.ForeignSparse", "pass {}.todense()"),
    "like SciPy": (SparseLikeSciPy(), "tests.test_errors.SparseLikeSciPy", "pass {}.toarray()"),
    "strict dtype": (array_api_strict.float64, "array_api_strict._dtypes.DType", AS_ARRAY),
}
SPECIAL = {
    # name: function that makes it, what it is said to be, what is to be done; {} is the argument
    "COO": (T.to_sparse, "a tensor of layout torch.sparse_coo", "pass {}.to_dense()"),
    "CSR": (lambda: T[0].to_sparse_csr(), "a tensor of layout torch.sparse_csr", "pass {}.to_dense()"),
    "oneDNN": (lambda: T.float().to_mkldnn(), "a tensor of layout torch._mkldnn", "pass {}.to_dense()"),
    "nested": (
        lambda: torch.nested.nested_tensor(list(T)),
        "a nested tensor",
        "pass torch.nested.to_padded_tensor({}, 0.0)",
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor(list(T), layout=torch.jagged),
        "a nested tensor",
        "pass torch.nested.to_padded_tensor({}, 0.0)",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(T.float(), 0.1, 0, torch.qint8),
        "a quantized tensor",
        "pass {}.dequantize()",
    ),
    "masked tensor": (
        lambda: as_masked_tensor(T, T > 0),
        "MaskedTensor, whose operations are its own",
        "pass a tensor of plain numbers",
    ),
}


def as_each_argument(x, like):
    """Return a call with ``x`` for each argument that is an array of rows: name it has for the caller → call."""
    return {
        "q": [lambda: attention(x, like, like), lambda: KeyIndex(like, like).attend(x)],
        "k": [lambda: attention(like, x, like), lambda: KeyIndex(x, like), lambda: KeyIndex(like, like).append(x, like)],
        "v": [
            lambda: attention(like, like, x),
            lambda: KeyIndex(like, x),
            lambda: KeyIndex(like, like).append(like, x),
            lambda: packed_attention(like, like, x, [0, 5]),
        ],
        "mask": [lambda: attention(like, like, like, mask=x)],
        "queries": [lambda: KeyIndex(like, like, queries=x)],
        "x": [lambda: log_gaussian_kde(x, like)],
        "weights": [lambda: log_weighted_exponential_kde(like, like, x)],
    }


def assert_raises(call, error, words):
    with pytest.raises(KdecoreError) as caught:
        call()
    assert type(caught.value) is error
    assert re.search(".*".join(words), str(caught.value)), str(caught.value)


@pytest.mark.parametrize("method", ["auto", "exact", "sortlsh", "hyper"])
@pytest.mark.parametrize(("arrays", "error", "words"), ARRAYS.values(), ids=ARRAYS)
def test_arrays(arrays, error, words, method):
    assert_raises(partial(attention, *arrays, method=method), error, words)


@pytest.mark.parametrize(("x", "kind", "advice"), NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array_of_a_supported_library_is_refused_at_once(x, kind, advice):
    for name, calls in as_each_argument(x, A).items():
        said = f"{name} must be an array of one of NumPy, CuPy, PyTorch, array-api-strict, got {kind}; {advice.format(name)}"
        for call in calls:
            assert_raises(call, DTypeError, [f"^{re.escape(said)}"])


@pytest.mark.parametrize("library", ["jax.numpy", "dask.array", "sparse", "ndonnx"])
def test_other_libraries_themselves_are_refused(library):
    if importlib.util.find_spec(library.partition(".")[0]) is None:
        pytest.skip(f"{library} is not installed")
    x = importlib.import_module(library).asarray(A)
    assert_raises(partial(attention, x, x, x), DTypeError, ["^q must be an array of one of NumPy", "; "])


@pytest.mark.parametrize(("make", "kind", "advice"), SPECIAL.values(), ids=SPECIAL)
def test_tensors_that_are_no_numbers_in_rows_are_refused_in_our_words(make, kind, advice):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of prototypes and of what will go
        x = make()
    for name, calls in as_each_argument(x, T).items():
        said = f"{re.escape(kind)}; {re.escape(advice.format(name))}"
        for call in calls:
            assert_raises(call, DTypeError, [f"^{name} must be a plain array, got ", said])
    for name in ("key_lengths", "cu_seqlens_q"):
        assert_raises(partial(integers, name, x), DTypeError, [f"^{name} must be a plain array, got ", re.escape(kind)])


def test_plain_subclasses_are_arrays():
    class Own(np.ndarray):
        pass

    class OwnTensor(torch.Tensor):
        pass

    for x in (A.view(Own), T.as_subclass(OwnTensor), torch.nn.Parameter(T)):
        assert attention(x, x, x).shape == A.shape


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (np.ma.array([3, 4], mask=[True, False]), ["plain array", "MaskedArray, whose mask would be ignored"]),
        (torch.empty(2, dtype=torch.int64, device="meta"), ["integers", "got torch.Tensor$"]),
        ([[3], [4, 5]], ["integers in rows of one length", r"got \[\[3\], \[4, 5\]\]"]),
        (OtherLibrary(), ["integers", "float64"]),
        ([True, False], ["integers", "bool"]),
        (3.0, ["integers", "float64"]),
    ],
)
def test_lengths(lengths, words):
    assert_raises(partial(attention, A, A, A, key_lengths=lengths), DTypeError, ["^key_lengths must ", *words])
    assert_raises(partial(packed_attention, A, A, A, lengths), DTypeError, ["^cu_seqlens_q must ", *words])


def test_a_mask_of_integers_is_to_be_boolean():
    words = ["^mask must be boolean", "float16.*float64", "int64; cast it to bool, True for what is seen$"]
    assert_raises(partial(attention, A, A, A, mask=np.ones((5, 5), int)), DTypeError, words)


@pytest.mark.parametrize(("options", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, words):
    assert_raises(partial(attention, A, A, A, **options), OptionError, words)


@pytest.mark.parametrize("method", [SortLSH, Hyper])
@pytest.mark.parametrize(("fields", "words"), FIELDS.values(), ids=FIELDS)
def test_options_objects(method, fields, words):
    assert_raises(partial(method, **fields), OptionError, words)


def test_errors_are_also_the_builtin_kind():
    """A caller who knows nothing of kdecore can catch ValueError, TypeError and RuntimeError."""
    kinds = {ShapeError: ValueError, DTypeError: TypeError, DeviceError: ValueError, OptionError: ValueError}
    for error, builtin in {**kinds, KernelUnavailable: RuntimeError}.items():
        assert issubclass(error, builtin)
        assert issubclass(error, KdecoreError)


def test_kernels_that_cannot_run_say_why(monkeypatch):
    spare = registry.Implementation("abacus", lambda: None, lambda site: f"no beads for {site.library}")
    kernels = {name: (spare, *found) for name, found in registry.KERNELS.items()}
    monkeypatch.setattr(registry, "KERNELS", kernels)
    monkeypatch.setattr(registry, "TARGETS", ("abacus", *registry.TARGETS))
    assert_raises(
        partial(attention, A, A, A, kernels="abacus"), KernelUnavailable, ["attend_dense", "abacus", "no beads for numpy"]
    )
    _, report = attention(A, A, A, kernels="auto", return_report=True)
    assert "no beads for numpy" in report.kernels["attend_dense"]


def test_the_budget_may_repeat_what_the_options_say():
    assert attention(A, A, A, method=SortLSH(2, 1), budget=3).shape == A.shape
    assert attention(A, A, A, method=Exact(), budget=3).shape == A.shape
    assert attention(A, A, A, budget=np.int32(3), seed=np.uint64(2**64 - 1), method="sortlsh").shape == A.shape


TRUE = {"bool": True, "NumPy": np.True_, "0-d array": np.array(True), "tensor": torch.tensor(True)}


@pytest.mark.parametrize("true", TRUE.values(), ids=TRUE)
@pytest.mark.parametrize(
    "name", ["budget", "seed", "threads", "max_memory", "window", "diagonal", "scale", "rtol", "certificate"]
)
def test_true_is_no_number(name, true):
    assert_raises(partial(attention, A, A, A, **{name: true}), OptionError, [f"^{name} must ", re.escape(f"got {true!r}")])


@pytest.mark.parametrize("true", TRUE.values(), ids=TRUE)
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (SortLSH, "block_size"),
        (SortLSH, "num_samples"),
        (SortLSH, "num_hashes"),
        (Treecode, "num_slots"),
        (Treecode, "block_size"),
        (KDEformer, "num_samples"),
        (KDEformer, "eps"),
    ],
)
def test_true_is_no_number_in_options_objects(method, name, true):
    assert_raises(partial(method, **{name: true}), OptionError, [f"^{name} must ", re.escape(f"got {true!r}")])


@pytest.mark.parametrize("value", ["no", 1.5, 1, 0, None, [], np.array(True), torch.tensor(True)], ids=repr)
def test_only_booleans_are_true_or_false(value):
    index = KeyIndex(A, A)
    for name, calls in {
        "causal": [attention, packed_attention],
        "return_lse": [attention, packed_attention, index.attend, index.attend_and_append],
        "return_report": [attention, packed_attention, log_gaussian_kde, log_weighted_exponential_kde],
        "check_finite": [attention, packed_attention],
    }.items():
        for call in calls:
            arrays = {index.attend: [A], packed_attention: [A, A, A, [0, 5]], log_gaussian_kde: [A, A]}.get(call, [A, A, A])
            arrays = [A, A] if call is log_weighted_exponential_kde else arrays
            words = [f"^{name} must be True or False, got {re.escape(repr(value))}$"]
            assert_raises(partial(call, *arrays, **{name: value}), OptionError, words)
    assert index.n_k == 5


def test_booleans_of_numpy_are_booleans():
    out, lse, report = attention(A, A, A, return_lse=np.True_, return_report=np.True_, check_finite=np.True_)
    assert (out.shape, lse.shape, report.method) == ((2, 5, 3), (2, 5), "exact")
    assert isinstance(attention(A, A, A, return_lse=np.False_, return_report=np.False_), np.ndarray)


INTEGERS = {"int": 3, "int16": np.int16(3), "0-d array": np.array(3), "tensor": torch.tensor(3)}


@pytest.mark.parametrize("three", INTEGERS.values(), ids=INTEGERS)
def test_integers_of_any_library_are_integers(rng, three):
    q = rng.standard_normal((2, 40, 3))
    for method in (
        SortLSH(block_size=three, num_samples=three, num_hashes=three),
        Treecode(num_slots=three, block_size=three),
        KDEformer(num_samples=three),
    ):
        same = type(method)(**{name: 3 for name, value in vars(method).items() if isinstance(value, int)})
        out, report = attention(q, q, q, method=method, seed=three, threads=three, return_report=True)
        np.testing.assert_array_equal(out, attention(q, q, q, method=same, seed=3))
        json.dumps(report.to_dict())
    np.testing.assert_array_equal(
        KeyIndex(q, q, method=Treecode(num_slots=three)).attend(q), KeyIndex(q, q, budget=3, seed=three).attend(q)
    )
    np.testing.assert_array_equal(attention(q, q, q, window=three), attention(q, q, q, window=3))


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        ("Treecode", ("auto", "treecode"), "; did you mean 'treecode'?"),
        ("sort-lsh", ("auto", "sortlsh"), "; did you mean 'sortlsh'?"),
        ("AUTO", ("auto", "sortlsh"), "; did you mean 'auto'?"),
        ("q", ("Q", "K"), "; did you mean 'Q'?"),
        (Treecode, ("auto", "treecode"), "; did you mean 'treecode'?"),
        ("magic", ("auto", "treecode"), ""),
        (3, ("auto", "treecode"), ""),
        (None, (), ""),
    ],
)
def test_did_you_mean(given, known, said):
    assert did_you_mean(given, known) == said


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (partial(attention, A, A, A, method="Treecode"), ["^method ", "got 'Treecode'; did you mean 'treecode'"]),
        (partial(attention, A, A, A, method="sort-lsh"), ["^method ", "got 'sort-lsh'; did you mean 'sortlsh'"]),
        (partial(attention, A, A, A, method="tree", rtol=0.1), ["^method ", "got 'tree'; did you mean 'treecode'"]),
        (partial(attention, A, A, A, method=Treecode), ["^method ", "class", "; did you mean 'treecode'"]),
        (partial(attention, A, A, A, method=KDEformer), ["^method ", "class", "; did you mean 'kdeformer'"]),
        (partial(packed_attention, A, A, A, [0, 5], method=SortLSH), ["^method ", "class", "did you mean 'sortlsh'"]),
        (partial(KeyIndex, A, A, method="tree"), ["^method ", "got 'tree'; did you mean 'treecode'"]),
        (partial(KeyIndex, A, A, method=Treecode), ["^method ", "class", "; did you mean 'treecode'"]),
        (partial(KeyIndex, A, A, method=np.array(["a", "b"])), ["^method ", "treecode", "got array"]),
        (partial(attention, A, A, A, kernels="array_api"), ["^kernels ", "; did you mean 'array-api'"]),
        (partial(attention, A, A, A, rtol=0.1, rtol_norm="Frobenius"), ["^rtol_norm ", "; did you mean 'frobenius'"]),
        (partial(Treecode, far_field="means"), ["^far_field ", "; did you mean 'mean'"]),
        (partial(Treecode, ordering=np.array(["sort", "tree"])), ["^ordering ", "got array"]),
        (partial(KDEformer, normaliser="sample"), ["^normaliser ", "; did you mean 'sampled'"]),
        (partial(log_gaussian_kde, A, A, primitive="HBE"), ["^primitive ", "; did you mean 'hbe'"]),
        (partial(packed_attention, A, A, A, [0, 5], budgett=3), ["budget, rtol", "'budgett'; did you mean 'budget'"]),
        (partial(packed_attention, A, A, A, [0, 5], key_lenghts=[5]), ["certificate", "got 'key_lenghts'$"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_misspelt_names_get_a_hint(call, words):
    assert_raises(call, OptionError, words)


def test_packed_attention_checks_every_option_whatever_the_samples_are():
    """Samples without queries or keys evaluate nothing."""
    empty = partial(packed_attention, A[:, :0], A, A, [0, 0], [0, 5])
    assert empty().shape == (2, 0, 3)
    for name, value in {"rtol": -1, "certificate": "x", "max_memory": 0, "window": 0, "check_finite": 1}.items():
        assert_raises(partial(empty, **{name: value}), OptionError, [f"^{name} must "])
