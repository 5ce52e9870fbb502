"""PyTorch's code that reads a layer's ``weight`` instead of calling the layer, where an adapter does nothing.

``nn.TransformerEncoderLayer`` in evaluation gives the weights of its layers to one kernel, unless one of its
modules has a forward hook; ``nn.TransformerEncoder`` hands it nested tensors there if there is a padding mask
(in evaluation alone, and only the kernel takes them with gradients). ``nn.MultiheadAttention`` reads
``out_proj.weight`` in training, too.
"""

import warnings

from torch import nn


def is_called(module: nn.Module, inputs: tuple) -> None:
    """A forward pre-hook that does nothing: that it is there turns PyTorch's fast path off."""


def keep_called(module: nn.Module) -> None:
    """Let no ``nn.TransformerEncoderLayer`` around ``module`` go around the modules in it."""
    if is_called not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(is_called)


def is_adapted(module: nn.Module) -> bool:
    """Whether ``module`` is an adapted layer, of this package or of PEFT's."""
    return hasattr(module, "lora_E")


def call_every_layer(model: nn.Module) -> None:
    """Let PyTorch's encoders call the adapted layers in evaluation as they do in training, and name, in one
    warning, the adapted layers that ``nn.MultiheadAttention`` never calls.
    """
    never = []
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and any(map(is_adapted, module.modules())):
            module.use_nested_tensor = False
        if isinstance(module, nn.MultiheadAttention) and is_adapted(module.out_proj):
            never.append(f"{name}.out_proj".lstrip("."))
    if never:
        warnings.warn(
            f"{len(never)} adapted layers do nothing and are never trained: nn.MultiheadAttention reads the "
            f"weight of its out_proj and never calls it; leave these out: {', '.join(never)}",
            UserWarning,
            stacklevel=3,
        )
