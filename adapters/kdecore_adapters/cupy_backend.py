"""CuPy: its backend. Importing it needs no device; using arrays does."""

from functools import cache
from typing import Any

import cupy as cp

from kdecore.arrays.backend import Backend


@cache
def card_name(number: int) -> str:
    """Return the name of a CUDA device's card, which takes long to ask for."""
    return str(cp.cuda.runtime.getDeviceProperties(number)["name"].decode())


class CupyBackend(Backend):
    """Arrays on CUDA devices, whose gradients nobody records."""

    def version(self) -> str:
        """Return CuPy's version."""
        return str(cp.__version__)

    def unusable(self) -> str | None:
        """Return why no device can be used, or None where one can."""
        try:
            available = cp.cuda.is_available()
        except Exception as error:  # a broken driver raises errors of many kinds
            return f"CUDA does not start: {error}"
        return None if available else "no CUDA device or driver found"

    def devices(self) -> list[str]:
        """Return the names of the devices that arrays can lie on."""
        if self.unusable() is not None:
            return []
        return [f"cuda:{index}" for index in range(cp.cuda.runtime.getDeviceCount())]

    def card(self, device: str) -> str:
        """Return the name of a CUDA device's card."""
        return card_name(int(device.removeprefix("cuda:")))

    def to_numpy(self, array: Any) -> Any:
        """Return a NumPy copy; bfloat16 becomes float32."""
        host = cp.asnumpy(array)
        return host.astype("float32") if host.dtype.name == "bfloat16" else host

    def from_numpy(self, array: Any, device: str | None = None) -> Any:
        """Return a copy of a NumPy array on a device, the current one if None."""
        with cp.cuda.Device(None if device is None else int(device.removeprefix("cuda:"))):
            return cp.asarray(array)

    def synchronize(self) -> None:
        """Wait until all work on the current device is done."""
        cp.cuda.Device().synchronize()

    def device_context(self, device: int) -> Any:
        """Return a context in which the device of that number is the current one."""
        return cp.cuda.Device(device)

    def current_stream(self, device: int) -> int:
        """Return the pointer to the stream that CuPy works on now, on the device of that number."""
        return int(cp.cuda.get_current_stream(device).ptr)


BACKEND = CupyBackend()
