"""`kdecore.compare.cases`: every kind of file, and one clear line for everything that can be wrong with one."""

import sys

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import kdecore
from kdecore.compare import cases
from kdecore.compare.cases import InputFileError, glove_case, load_case


@pytest.fixture
def arrays():
    return dict(zip("qkv", np.random.default_rng(0).standard_normal((3, 2, 10, 4), dtype=np.float32), strict=True))


def save_npy(folder, arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [folder / f"{name}.npy" for name in arrays]


def save(path, arrays, scale=None):
    """Write a file of the kind that its name says, with a scale if given: a number, an array, or text for metadata."""
    if scale is not None and not isinstance(scale, str):
        arrays = arrays | {"scale": np.asarray(scale)}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(arrays, path, {"Scale": scale} if isinstance(scale, str) else None)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def assert_one_line(info, *parts):
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_npz(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays, other=np.zeros(3))
    case = load_case([tmp_path / "a.npz"], 0.5)
    assert (case.name, case.scale) == ("a.npz", 0.5)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(case, name), array)


def test_three_npy_in_order(tmp_path, arrays):
    case = load_case([str(path) for path in save_npy(tmp_path, arrays)])
    assert (case.name, case.scale) == ("q.npy, k.npy, v.npy", None)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(case, name), array)


def test_foreign_byte_order(tmp_path, arrays):
    case = load_case(save_npy(tmp_path, {name: array.astype(">f4") for name, array in arrays.items()}))
    assert case.q.dtype.isnative
    np.testing.assert_array_equal(case.v, arrays["v"])


def test_safetensors(tmp_path, arrays):
    safetensors.numpy.save_file(arrays | {"other": np.zeros(3)}, tmp_path / "a.safetensors")
    case = load_case([tmp_path / "a.safetensors"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(case, name), array)


def test_pt(tmp_path, arrays):
    tensors = {name: torch.from_numpy(array).bfloat16().requires_grad_() for name, array in arrays.items()}
    torch.save(tensors | {"other": [1, 2], 7: None}, tmp_path / "a.pt")
    case = load_case([tmp_path / "a.pt"])
    assert (case.name, case.scale, case.note, case.q.dtype) == ("a.pt", None, "", np.float32)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(getattr(case, name), tensor.detach().float().numpy())


@pytest.mark.parametrize("held", [[torch.zeros(3)], torch.zeros(3, 4), {"q": 1.0, "k": [2.0], "v": "3"}])
def test_pt_of_another_structure(tmp_path, held):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises((InputFileError, kdecore.DTypeError), match=r"must (hold a dictionary|be an array)") as info:
        load_case([tmp_path / "a.pt"])
    assert_one_line(info)


def test_pt_of_sparse_tensors(tmp_path, arrays):
    torch.save({name: torch.from_numpy(array).to_sparse() for name, array in arrays.items()}, tmp_path / "a.pt")
    with pytest.raises(InputFileError, match="cannot read") as info:
        load_case([tmp_path / "a.pt"])
    assert_one_line(info, tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
@pytest.mark.parametrize("names", ["Q K V", "Q k V", "query key value", "Query Key Value", "QUERY KEY VALUE"])
def test_names_in_files(tmp_path, arrays, suffix, names):
    renamed = dict(zip(names.split(), arrays.values(), strict=True))
    save(tmp_path / f"a.{suffix}", renamed | {"other": np.zeros(3)})
    case = load_case([tmp_path / f"a.{suffix}"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(case, name), array)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_short_names_in_lower_case_come_first(tmp_path, arrays, suffix):
    others = {name: np.zeros_like(arrays["q"]) for name in ("Q", "K", "V", "query", "key", "value")}
    save(tmp_path / f"a.{suffix}", others | arrays)
    case = load_case([tmp_path / f"a.{suffix}"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(case, name), array)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
@pytest.mark.parametrize(
    ("stored", "scale", "note"),
    [
        (0.5, 0.5, "0.5, as {} holds it."),
        (np.float32([0.25]), 0.25, "0.25, as {} holds it."),
        (2, 2.0, "2, as {} holds it."),
        (np.nan, None, "1/√d; what {} holds under that name is no finite number but nan."),
        (np.ones(3), None, "1/√d; what {} holds under that name is no finite number but an array of shape (3,)."),
        (True, None, "1/√d; what {} holds under that name is no finite number but True."),
    ],
)
def test_the_scale_that_a_file_holds(tmp_path, arrays, suffix, stored, scale, note):
    path = tmp_path / f"a.{suffix}"
    save(path, arrays, stored)
    case = load_case([path])
    assert (case.scale, case.note) == (scale, f"scale: {note.format(path.name)}")
    case = load_case([path], 0.125)
    assert (case.scale, case.note) == (0.125, f"scale: 0.125 as asked for, not what {path.name} holds.")


@pytest.mark.parametrize(
    ("text", "scale", "note"),
    [
        ("0.5", 0.5, "scale: 0.5, as a.safetensors holds it."),
        ("1/8", None, "scale: 1/√d; what a.safetensors holds under that name is no finite number but 1/8."),
    ],
)
def test_the_scale_in_metadata(tmp_path, arrays, text, scale, note):
    save(tmp_path / "a.safetensors", arrays, text)
    case = load_case([tmp_path / "a.safetensors"])
    assert (case.scale, case.note) == (scale, note)


def test_other_ways_to_store_a_scale(tmp_path, arrays):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(tensors | {"SCALE": 0.5}, tmp_path / "a.pt")
    assert load_case([tmp_path / "a.pt"]).scale == 0.5
    safetensors.torch.save_file(tensors | {"scale": torch.tensor(0.5).bfloat16()}, tmp_path / "a.safetensors")
    assert load_case([tmp_path / "a.safetensors"]).scale == 0.5
    np.savez(tmp_path / "a.npz", **arrays, scale=None)
    case = load_case([tmp_path / "a.npz"])
    assert case.scale is None
    assert "is no finite number but an object" in case.note


def test_safetensors_bfloat16_becomes_float32(tmp_path, arrays):
    tensors = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in arrays.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    case = load_case([tmp_path / "a.safetensors"])
    assert case.q.dtype == np.float32
    np.testing.assert_array_equal(case.q, tensors["q"].to(torch.float32).numpy())


@pytest.mark.parametrize(
    "names", [[], ["a.npy"], ["a.npy", "b.npy"], ["a.npz", "b.npz"], ["a.txt"], ["a.npy", "b.npy", "c.npz"]]
)
def test_wrong_number_or_kind_of_files(names):
    with pytest.raises(InputFileError, match=r"one \.npz, one \.safetensors, or three \.npy") as info:
        load_case(names)
    assert_one_line(info, *names)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "npy", "pt"])
def test_missing_file(tmp_path, suffix):
    path = tmp_path / f"none.{suffix}"
    with pytest.raises(InputFileError, match="No such file") as info:
        load_case([path] * (3 if suffix == "npy" else 1))
    assert_one_line(info, path)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "npy", "pt"])
@pytest.mark.parametrize("content", [b"", b"not an array file", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00"], ids=range(4))
def test_damaged_file(tmp_path, suffix, content):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputFileError) as info:
        load_case([path] * (3 if suffix == "npy" else 1))
    assert_one_line(info, path)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "npy", "pt"])
def test_truncated_file(tmp_path, arrays, suffix):
    path = tmp_path / f"bad.{suffix}"
    if suffix == "npy":
        np.save(path, arrays["q"])
    else:
        save(path, arrays)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputFileError) as info:
        load_case([path] * (3 if suffix == "npy" else 1))
    assert_one_line(info, path)


def test_folder_instead_of_file(tmp_path):
    for suffix in ("npz", "safetensors", "pt", "other"):
        path = tmp_path / f"folder.{suffix}"
        path.mkdir()
        with pytest.raises(InputFileError, match="it is a folder") as info:
            load_case([path])
        assert_one_line(info, path)


def test_content_unlike_name(tmp_path, arrays):
    np.save(tmp_path / "a.npy", arrays["q"])
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InputFileError, match="unlike its name"):
        load_case([tmp_path / "a.npz"])


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pt"])
def test_missing_key(tmp_path, arrays, suffix):
    del arrays["v"]
    arrays["value"] = arrays["q"]
    path = tmp_path / f"a.{suffix}"
    save(path, arrays)
    with pytest.raises(InputFileError, match="must hold arrays named q, k and v") as info:
        load_case([path])
    assert_one_line(info, path, "value")


class Trap:
    """Sets a flag when unpickled."""

    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt"])
def test_pickles_are_never_loaded(tmp_path, arrays, suffix):
    trap = np.array([Trap()], dtype=object)
    if suffix == "pt":
        torch.save(arrays | {"q": Trap()}, tmp_path / "a.pt")
        paths = [tmp_path / "a.pt"]
    elif suffix == "npz":
        np.savez(tmp_path / "a.npz", **(arrays | {"q": trap}))
        paths = [tmp_path / "a.npz"]
    else:
        paths = save_npy(tmp_path, arrays | {"q": trap})
    with pytest.raises(InputFileError, match="objects, which are never loaded") as info:
        load_case(paths)
    assert_one_line(info, paths[0])
    assert not Trap.sprung


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"k": np.zeros((2, 9, 4), np.float32)}, kdecore.ShapeError, "v must have as many rows as k"),
        ({"k": np.zeros((2, 10, 3), np.float32)}, kdecore.ShapeError, "last dimension"),
        ({"q": np.zeros(4, np.float32)}, kdecore.ShapeError, "at least 2 dimensions"),
        ({"v": np.zeros((10, 4), np.float32)}, kdecore.ShapeError, "leading dimensions"),
        ({"q": np.zeros((2, 10, 4), np.int64)}, kdecore.DTypeError, "int64"),
        ({"v": np.zeros((2, 10, 4))}, kdecore.DTypeError, "same dtype"),
        ({"q": np.array(["a"])}, kdecore.DTypeError, "q must have one of the dtypes"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, change, error, part):
    np.savez(tmp_path / "a.npz", **(arrays | change))
    with pytest.raises(error, match=part) as info:
        load_case([tmp_path / "a.npz"])
    assert_one_line(info)


def test_scale_must_be_finite(tmp_path, arrays):
    with pytest.raises(kdecore.OptionError, match="scale"):
        load_case(save_npy(tmp_path, arrays), float("nan"))


def test_without_safetensors(tmp_path, arrays, monkeypatch):
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputFileError, match="needs safetensors") as info:
        load_case([tmp_path / "a.safetensors"])
    assert_one_line(info, "pip install 'kdecore[cli]', or from a clone pip install '.[cli]'")


def test_without_torch(tmp_path, arrays, no_torch):
    save(tmp_path / "a.pt", arrays)
    with pytest.raises(InputFileError, match=r"needs PyTorch \(not installed\)") as info:
        load_case([tmp_path / "a.pt"])
    assert_one_line(info, "pip install 'kdecore[torch]', or from a clone pip install '.[torch]'")


@pytest.mark.parametrize("n", [1, 1000, 10922, 16384])
def test_glove_case(n):
    case = glove_case(n)
    assert case.q is case.k
    assert case.q.shape == case.v.shape == (n, 100)
    assert case.q.dtype == case.v.dtype == np.float32
    assert case.scale == pytest.approx(10**-0.5)
    assert not np.array_equal(case.q[0], case.v[0])
    if n == 1000:
        with np.load(cases.GLOVE) as sample:
            np.testing.assert_array_equal(case.v, sample["vectors"][2000:3000].astype(np.float32))


@pytest.mark.parametrize("n", [0, -1, 16385])
def test_glove_case_out_of_range(n):
    with pytest.raises(kdecore.OptionError, match="GloVe"):
        glove_case(n)
