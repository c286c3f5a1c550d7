"""PyTorch: its backend."""

from os import PathLike
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdecore.arrays.backend import Backend


def forward_differentiated(*tensors: Tensor) -> bool:
    """Return whether forward-mode derivatives of any of the tensors are recorded, which no operator passes on."""
    unpack: Any = torch.autograd.forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)


class TorchBackend(Backend):
    """Tensors on the CPU and on CUDA devices, with gradients."""

    recorded_kernels: ClassVar[str | None] = "kdecore_adapters.torch_gradients"

    def version(self) -> str:
        """Return PyTorch's version."""
        return str(torch.__version__)

    def devices(self) -> list[str]:
        """Return the names of the devices that arrays can lie on."""
        cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return ["cpu", *(f"cuda:{index}" for index in cuda)]

    def card(self, device: str) -> str:
        """Return the name of a CUDA device's card; of another device its own name."""
        return str(torch.cuda.get_device_name(device)) if device.startswith("cuda") else device

    def threads(self) -> int | None:
        """Return how many threads the library uses on the CPU; None where it doesn't tell."""
        return torch.get_num_threads()

    def gradient_mode(self, *tensors: Any) -> str:
        """Return ``"forward"`` or ``"reverse"`` where what is done with any of the tensors is differentiated, else ""."""
        if forward_differentiated(*tensors):
            return "forward"
        return "reverse" if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) else ""

    def operations_traced(self) -> bool:
        """Return whether torch.compile or torch.jit follows each operation, to do it again with other numbers."""
        return bool(torch.compiler.is_compiling() or torch._C._is_tracing())

    def operations_watched(self) -> bool:
        """Return whether someone else than autograd follows each operation: compilers, tracers and modes."""
        return self.operations_traced() or bool(torch._C._len_torch_dispatch_stack())

    def to_numpy(self, array: Any) -> Any:
        """Return a NumPy array: a view of a tensor on the CPU, a copy of any other; bfloat16 becomes float32."""
        tensor = array.detach()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.to(torch.float32)
        return tensor.cpu().numpy()

    def load(self, path: str | PathLike[str]) -> Any:
        """Return what a file of `torch.save` holds, tensors on the CPU; pickled objects are never loaded.

        Raises
        ------
        OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError
            The file cannot be read, is no such file, or holds objects.
        """
        return torch.load(path, map_location="cpu", weights_only=True)

    def from_numpy(self, array: Any, device: str | None = None) -> Any:
        """Return a NumPy array as a tensor, on the CPU without a copy where PyTorch can share the memory."""
        # PyTorch cannot share negative strides, and would let read-only memory be written to.
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return torch.from_numpy(array).to(device or "cpu")

    def device_context(self, device: int) -> Any:
        """Return a context in which the CUDA device of that number is the current one."""
        return torch.cuda.device(device)

    def current_stream(self, device: int) -> int:
        """Return the pointer to the stream that PyTorch works on now, on the CUDA device of that number."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def synchronize(self) -> None:
        """Wait until all work on the current device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def exact_attention(self, q: Any, k: Any, v: Any, scale: float) -> Any:
        """Return exact attention by PyTorch's fused kernels, what one would otherwise call; without gradients.

        Parameters
        ----------
        q, k, v
            (…, n_q, d), (…, n_k, d), (…, n_k, d_v): tensors, or NumPy arrays, which are shared and not copied. The last
            leading dimension of k and v may divide q's: grouped heads.
        scale
            Factor on ⟨q, k⟩.

        Returns
        -------
        Array
            (…, n_q, d_v), a tensor for tensors and a NumPy array for NumPy arrays. O(n_q n_k (d + d_v)) time; no n_q × n_k
            array is made where PyTorch has a fused kernel for the dtype and device.
        """
        from_host = isinstance(q, np.ndarray)
        if from_host:
            q, k, v = self.from_numpy(q), self.from_numpy(k), self.from_numpy(v)
        lead, d, d_v = q.shape[:-2], q.shape[-1], v.shape[-1]

        # The fused kernels want (batch, heads, n, d) and d_v = d; zero columns change neither logits nor the other values.
        def fused_form(x: Any) -> Any:
            padded = functional.pad(x, (0, max(d, d_v) - x.shape[-1])) if d != d_v else x
            return padded.reshape(1, -1, *padded.shape[-2:])

        # Samples become heads too: those of keys are as many times fewer then as before.
        grouped = lead != k.shape[:-2]
        with torch.no_grad():
            out = functional.scaled_dot_product_attention(
                fused_form(q), fused_form(k), fused_form(v), scale=scale, enable_gqa=grouped
            )
            out = out[..., :d_v].reshape(*lead, q.shape[-2], d_v)
        return self.to_numpy(out) if from_host else out


BACKEND = TorchBackend()
