"""Running every implementation of a kernel on every backend."""

import numpy as np
import pytest

from kdecore.arrays.namespace import device_name, namespace_name
from kdecore.core.state import AttentionState
from kdecore.kernels.registry import KERNELS
from kdecore.kernels.site import Site
from tests.conftest import BACKENDS


def implementations(kernel):
    """Parametrise a test over the implementations of one kernel."""
    return pytest.mark.parametrize("implementation", [x for x in KERNELS[kernel] if here(x)], ids=lambda found: found.target)


def on_host(kernel):
    """Parametrise a test over those that take NumPy arrays."""
    found = [x for x in KERNELS[kernel] if x.target not in ("numba-cuda", "triton", "torch-autograd")]
    return pytest.mark.parametrize("implementation", found, ids=lambda found: found.target)


def here(implementation):
    """Whether this machine has the device that an implementation is for; without one, the simulator and Triton's run it."""
    return implementation.target not in ("numba-cuda", "triton") or any("cuda" in backend.device for backend in BACKENDS)


def run(implementation, backend, *arguments, dtype="float64"):
    """Call an implementation with NumPy arguments on a backend, or skip where it says that it cannot run there."""

    def given(argument):
        if isinstance(argument, AttentionState):
            return AttentionState(given(argument.out), given(argument.lse))
        if isinstance(argument, tuple) and hasattr(argument, "_fields"):
            return type(argument)(*map(given, argument))
        return backend.array(argument) if isinstance(argument, np.ndarray) else argument

    arrays = [given(x) for x in arguments]
    flat = [x for one in arrays for x in (one if isinstance(one, tuple) else (one,))]
    device = next(device_name(x) for x in flat if hasattr(x, "device"))
    gradient = "reverse" if implementation.target == "torch-autograd" else ""
    reason = implementation.unsupported(Site(namespace_name(backend.xp), device, dtype, gradient))
    if reason is not None:
        pytest.skip(reason)
    found = implementation.function(backend.xp, *arrays)
    if hasattr(found, "lse"):
        return backend.numpy(found.out), backend.numpy(found.lse)
    return tuple(backend.numpy(x) for x in found) if isinstance(found, tuple) else backend.numpy(found)
