"""Backends of array libraries: by entry points, by hand, and where there is none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kdecore
from kdecore.arrays import backend
from kdecore.arrays.backend import Backend, backend_named, backend_of, common_namespace, register, unusable
from kdecore_adapters import register_backends, torch_backend


@pytest.fixture
def nothing_known(monkeypatch):
    """Forget what was loaded."""
    monkeypatch.setattr(backend, "_BY_NAME", {"numpy": backend._BY_NAME["numpy"]})
    monkeypatch.setattr(backend, "_BY_TYPE", {})


def entries(monkeypatch, *found):
    monkeypatch.setattr(backend, "entry_points", lambda group, name: [one for one in found if one.name == name])
    monkeypatch.setattr("kdecore_adapters.entry_points", backend.entry_points)


def test_entry_points_bring_backends(nothing_known):
    assert backend_of(torch.ones(2)) is torch_backend.BACKEND
    assert backend_named("torch") is torch_backend.BACKEND


def test_where_kdecore_is_not_installed(monkeypatch, nothing_known):
    entries(monkeypatch)
    with pytest.raises(
        kdecore.OptionError, match=r"no entry point of the group kdecore\.backends brings a backend for torch"
    ):
        kdecore.attention(*torch.ones(3, 4, 2))
    assert "no entry point" in unusable("torch")
    register_backends()
    assert kdecore.attention(*torch.ones(3, 4, 2)).shape == (4, 2)


def test_a_backend_can_be_replaced(nothing_known):
    assert backend_of(torch.ones(2)) is torch_backend.BACKEND
    register("torch", other := torch_backend.TorchBackend())
    assert backend_of(torch.ones(2)) is other


def test_one_backend_of_a_library(monkeypatch, nothing_known):
    entries(monkeypatch, SimpleNamespace(name="torch", value="a:B"), SimpleNamespace(name="torch", value="c:D"))
    with pytest.raises(kdecore.OptionError, match="one backend for torch is needed, got a:B, c:D"):
        backend_of(torch.ones(2))


class Brought:
    """An array of a library that nobody has heard of."""

    def __array_namespace__(self, api_version=None):
        return np


Brought.__module__ = "unheard_of.arrays"


def test_arrays_of_other_libraries(nothing_known):
    with pytest.raises(kdecore.DTypeError, match=r"q must be an array of one of NumPy.*got unheard_of\.arrays\.Brought"):
        common_namespace(q=Brought())
    register("unheard_of", Backend())
    assert common_namespace(q=Brought()) is np
