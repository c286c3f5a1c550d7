"""What `torch_modules.replace_attention` knows of Hugging Face diffusers: models of a pipeline, and attention processors.

diffusers is not imported: its attention modules, and no others, have ``get_processor``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from kdecore.arrays.errors import OptionError


def models_of(model: Any) -> dict[str, nn.Module]:
    """Return a module, by the name "", or those models of a pipeline that denoise, by their names there.

    These have attention of diffusers, and don't decode: autoencoders err where every pixel shows, and text is short.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    parts = {name: part for name, part in getattr(model, "components", {}).items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in parts.items() if any(map(attends, part.modules())) and not hasattr(part, "decode")}
    if not found:
        raise OptionError(
            f"model must be a PyTorch module, or a pipeline of diffusers that has one, got {type(model).__name__}"
        )
    return found


def named_parts(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield models and all of their parts, each once, by their names."""
    seen: set[nn.Module] = set()
    for name, model in models.items():
        yield from model.named_modules(seen, name)


def attends(module: nn.Module) -> bool:
    """Return whether a module is one of diffusers' attention."""
    return hasattr(module, "get_processor")


def processor_of(module: Any) -> str:
    """Return what computes a module's attention: its processor, and the backend that was set there."""
    processor = module.get_processor()
    backend = getattr(processor, "_attention_backend", None)
    name = type(processor).__name__
    return name if backend is None else f"{name}, backend {getattr(backend, 'value', backend)}"
