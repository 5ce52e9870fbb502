"""PEFT's AdaLoRA layer with the fused op inside; same parameters, same state dict, same methods."""

from functools import partial

import torch
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adalora_fast.nn import Factors
from adalora_fast.ops import adalora_delta_, adalora_linear


class FusedSVDLinear(SVDLinear):
    """``SVDLinear`` whose forward and backward are one op; ``fuse`` gives it to existing layers."""

    precision = "default"
    trained_adapter: str | None = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer plus every active adapter, scaled by lora_alpha / (ranknum + 1e-5)."""
        names = [name for name in self.active_adapters if name in self.lora_A and self.r[name] > 0]
        if self.disable_adapters or self.merged or not names or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if _calls_more_than_its_product(base):
            result = base(x)
        else:
            weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
            result = adalora_linear(x, weight, base.bias, *self._adapter(names.pop(0)))
        for name in names:
            result = adalora_delta_(result, x, *self._adapter(name))
        return result

    def _adapter(self, name: str) -> tuple:
        """The arguments of the op after the base's: factors, scale, dropout, mode."""
        dropout = self.lora_dropout[name]
        return (
            self.lora_A[name],
            self.lora_E[name],
            self.lora_B[name],
            self.scaling[name] / self._denominator[name],
            getattr(dropout, "p", 0.0),
            self.training,
            self.precision,
        )

    def update_layer(self, adapter_name: str, r: int, *args, **kwargs) -> None:
        """PEFT's, and the rank as a plain number (reading ``ranknum`` in every forward would wait for the
        device).
        """
        super().update_layer(adapter_name, r, *args, **kwargs)
        self._denominator[adapter_name] = r + 1e-5

    @torch.no_grad()
    def set_ranknum(self, adapter_name: str, rank: int) -> None:
        """Scale the adapter as one of this initial rank."""
        self.ranknum[adapter_name].fill_(float(rank))
        self._denominator[adapter_name] = rank + 1e-5

    @torch.no_grad()
    def resize(self, adapter_name: str, rank: int, config) -> None:
        """Give the adapter ``rank`` fresh triplets and leave its scale as it is."""
        ranknum = self.ranknum[adapter_name].clone()
        denominator = self._denominator[adapter_name]
        self.update_layer(adapter_name, rank, self.lora_alpha[adapter_name], config=config)
        self.ranknum[adapter_name].copy_(ranknum)
        self._denominator[adapter_name] = denominator

    def factors(self) -> Factors | None:
        """The parameters of the adapter under training, for the RankAllocator."""
        return factors_of(self, self.trained_adapter)


def _calls_more_than_its_product(base: nn.Module) -> bool:
    """Whether the base layer carries hooks or a forward of its own, which only a call of it respects."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks) or "forward" in base.__dict__


def factors_of(layer: AdaLoraLayer, adapter_name: str | None) -> Factors | None:
    """The named adapter's factors in any of PEFT's AdaLoRA layers, or None where it has none."""
    if adapter_name is None or adapter_name not in layer.lora_A:
        return None
    return Factors(layer.lora_A[adapter_name], layer.lora_E[adapter_name], layer.lora_B[adapter_name])


def refusal(layer: AdaLoraLayer) -> str | None:
    """Why ``layer`` keeps PEFT's forward, or None if it can be fused."""
    if type(layer) is not SVDLinear:
        return f"{type(layer).__name__} has no fused form"
    if type(layer.base_layer) not in (nn.Linear, Conv1D, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"its base is a {type(layer.base_layer).__name__}, not a plain linear"
    return None


def fuse_layer(layer: AdaLoraLayer, precision: str, trained_adapter: str | None) -> str | None:
    """Turn ``layer`` into a :class:`FusedSVDLinear` in place; returns why not where that cannot be."""
    if isinstance(layer, FusedSVDLinear):
        return None
    reason = refusal(layer)
    if reason is None:
        layer.__class__ = FusedSVDLinear
        layer.precision, layer.trained_adapter = precision, trained_adapter
        layer._denominator = {name: ranknum.item() + 1e-5 for name, ranknum in layer.ranknum.items()}
    return reason


def adapter_layers(model: nn.Module) -> dict[str, AdaLoraLayer]:
    """Every AdaLoRA layer of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaLoraLayer)}


def factor_finders(model: nn.Module, adapter_name: str) -> dict[str, partial]:
    """For a RankAllocator: name → function returning the adapter's factors, for every layer that has the
    adapter.
    """
    return {
        name: partial(factors_of, layer, adapter_name)
        for name, layer in adapter_layers(model).items()
        if adapter_name in layer.lora_A
    }
