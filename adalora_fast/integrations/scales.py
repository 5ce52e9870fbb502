"""``alpha_pattern`` and ``use_rslora``, which PEFT's AdaLoRA ignores: a scale of its own for every layer.

PEFT multiplies ΔW by α / (ranknum + 1e-5) whatever its config says. A fused layer multiplies by f_k times
that: α_k / α for a layer in ``alpha_pattern``, (init_r + 1e-5) / √init_r with ``use_rslora`` (so that the
scale is α / √init_r). State dicts hold f_k λ instead of λ, and loading one divides by f_k: what is saved
computes the same in PEFT, which knows no f_k, and what PEFT saved computes the same here.
"""

import math

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn


def check_scales(config: AdaLoraConfig) -> None:
    """Refuse what AdaLoRA's layers cannot honour.

    Raises:
        ValueError: ``lora_bias``, or an α in ``alpha_pattern`` that is no positive number.
    """
    if config.lora_bias:
        raise ValueError(
            "lora_bias=True has no meaning in AdaLoRA, whose factors have no bias; set lora_bias=False, or "
            "bias='lora_only' to train the base's biases"
        )
    for name, alpha in (config.alpha_pattern or {}).items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ValueError(
                f"alpha_pattern gives {name!r} the value {alpha!r}; it must be a positive number"
            )


def scale_factor(config: AdaLoraConfig, layer: str) -> float:
    """f of a layer: what it multiplies PEFT's scale by."""
    alpha, pattern = _alpha(config), config.alpha_pattern or {}
    factor = pattern.get(get_pattern_key(pattern, layer), alpha) / alpha
    return factor * (config.init_r + 1e-5) / math.sqrt(config.init_r) if config.use_rslora else factor


def set_scales(layers: dict[str, AdaLoraLayer], config: AdaLoraConfig, adapter: str) -> None:
    """Give every layer of the adapter its scale; to be called again whenever PEFT has set its own."""
    for name, layer in layers.items():
        factor = scale_factor(config, name)
        if adapter not in layer.lora_A or (factor == 1.0 and not hasattr(layer, "scale_factors")):
            continue
        if not hasattr(layer, "scale_factors"):
            layer.scale_factors = {}
            layer.register_state_dict_post_hook(_to_files)
            layer.register_load_state_dict_pre_hook(_from_files)
        layer.scale_factors[adapter] = factor
        layer.scaling[adapter] = _alpha(config) * factor


@torch.no_grad()
def take_over(layers: dict[str, AdaLoraLayer], config: AdaLoraConfig, adapter: str) -> None:
    """:meth:`set_scales` for layers that PEFT made: λ is divided by f, so that their outputs stay."""
    set_scales(layers, config, adapter)
    for layer in layers.values():
        if adapter in getattr(layer, "scale_factors", {}):
            layer.lora_E[adapter].div_(layer.scale_factors[adapter])


def peft_scale(layer: AdaLoraLayer, adapter: str) -> float:
    """The scale that belongs to the λ of state dicts and files: PEFT's."""
    scaling = layer.scaling[adapter] / getattr(layer, "scale_factors", {}).get(adapter, 1.0)
    return scaling / (layer.ranknum[adapter].item() + 1e-5)


def _alpha(config: AdaLoraConfig) -> float:
    return config.lora_alpha if config.lora_alpha > 0 else float(config.init_r)  # as PEFT's layers take it


def _to_files(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for adapter, factor in layer.scale_factors.items():
        key = f"{prefix}lora_E.{adapter}"
        if factor != 1.0 and key in state_dict:
            state_dict[key] = state_dict[key] * factor


def _from_files(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *arguments) -> None:
    for adapter, factor in layer.scale_factors.items():
        key = f"{prefix}lora_E.{adapter}"
        if factor != 1.0 and key in state_dict:
            state_dict[key] = state_dict[key] / factor
