"""PEFT's own layers with a :class:`Layer`'s tensors: AdaLoRA, AdaLoRA compiled, and plain LoRA."""

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from benchmarks.peers.layer import Layer, Peer, folded

FACTORS = ("lora_A", "lora_E", "lora_B")


def _base(layer: Layer) -> nn.Linear:
    outer, inner = layer.weight.shape
    base = nn.Linear(inner, outer, layer.bias is not None, device="meta").requires_grad_(False)
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    if layer.bias is not None:
        base.bias = nn.Parameter(layer.bias, requires_grad=False)
    return base


def _adalora(layer: Layer) -> SVDLinear:
    rank = layer.lora_A.shape[0]
    options = {"lora_alpha": rank, "lora_dropout": layer.dropout_p}
    config = AdaLoraConfig(total_step=100, init_r=rank, target_r=1, **options)
    module = SVDLinear(_base(layer), "default", config, r=rank, **options)
    for name in FACTORS:
        getattr(module, name)["default"] = nn.Parameter(getattr(layer, name).detach())
    module.scaling["default"] = layer.scaling
    with torch.no_grad():
        module.ranknum["default"].fill_(1.0 - 1e-5)  # PEFT divides the scale by ranknum + 1e-5
    return module.train()


def _trained(module: SVDLinear) -> tuple[nn.Parameter, ...]:
    return tuple(getattr(module, name)["default"] for name in FACTORS)


def peft(layer: Layer) -> Peer:
    """PEFT's SVDLinear in training mode."""
    module = _adalora(layer)
    return Peer(module, _trained(module))


def peft_compiled(layer: Layer) -> Peer:
    """The same under ``torch.compile``.

    Raises:
        RuntimeError: on a CPU, where compiling takes a C++ compiler and minutes.
    """
    if not layer.weight.is_cuda:
        raise RuntimeError("compiled for a GPU only: for a CPU it takes a C++ compiler and minutes")
    # Without this the compiler, at its limit of variants, runs the layer eagerly and says nothing.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    module = _adalora(layer)
    return Peer(torch.compile(module, dynamic=False), _trained(module))


def peft_lora(layer: Layer) -> Peer:
    """PEFT's plain LoRA of the same rank, with lora_E * lora_A as its A: what AdaLoRA's extra costs."""
    rank = layer.lora_A.shape[0]
    options = {"lora_alpha": rank, "lora_dropout": layer.dropout_p}
    module = LoraLinear(_base(layer), "default", LoraConfig(r=rank, **options), r=rank, lora_alpha=rank)
    module.lora_A["default"].weight = nn.Parameter(folded(layer).detach())
    module.lora_B["default"].weight = nn.Parameter(layer.lora_B.detach())
    module.scaling["default"] = layer.scaling
    trained = module.lora_A["default"].weight, module.lora_B["default"].weight
    return Peer(module.train(), trained, "lora")
