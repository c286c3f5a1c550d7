"""PyTorch: attention of sequences that are sharded across the processes of a `torch.distributed` group."""

from kdecore_adapters.distributed.ranks import ProcessGroupError
from kdecore_adapters.distributed.ring import RingReport, ring_attention
from kdecore_adapters.distributed.ulysses import ulysses_attention

__all__ = ["ProcessGroupError", "RingReport", "ring_attention", "ulysses_attention"]
