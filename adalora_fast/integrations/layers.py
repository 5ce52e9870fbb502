"""PEFT's AdaLoRA layers with the fused op inside; same parameters, same state dict, same methods."""

from functools import cache, partial

import torch
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adalora_fast.nn import Factors
from adalora_fast.nn.calls import keep_called
from adalora_fast.nn.plain import PLAIN_LINEARS, PLAIN_TENSORS, calls_its_own, calls_more
from adalora_fast.ops import adalora_delta_, adalora_linear

PLAIN_BASES = (*PLAIN_LINEARS, Conv1D)
PLAIN_DROPOUTS = (nn.Dropout, nn.Identity)
QUANTISED = ("peft.tuners.adalora.bnb", "peft.tuners.adalora.gptq")  # modules of layers over such bases


class FusedLayer:
    """What ``fuse`` adds to one of PEFT's layers: the adapter as one op, onto whatever the base returns."""

    precision = "default"
    trained_adapter: str | None = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer plus every active adapter, scaled by lora_alpha / (ranknum + 1e-5)."""
        names = [name for name in self.active_adapters if name in self.lora_A and self.r[name] > 0]
        if self.disable_adapters or self.merged or args or kwargs or any(map(self._drops_otherwise, names)):
            return super().forward(x, *args, **kwargs)
        weight = self._weight() if names else None
        if weight is None:
            result = self.base_layer(x)
        else:
            result = adalora_linear(x, weight, self.base_layer.bias, *self._adapter(names.pop(0)))
        for name in names:
            result = adalora_delta_(result, x, *self._adapter(name))
        return result

    def _weight(self) -> Tensor | None:
        """The base's weight [out, in], where its product may be part of the op."""
        return None

    def _drops_otherwise(self, name: str) -> bool:
        """Whether the adapter's dropout is not PEFT's any more, so that only a call of it is right."""
        dropout = self.lora_dropout[name]
        return type(dropout) not in PLAIN_DROPOUTS or calls_its_own(dropout)

    def _adapter(self, name: str) -> tuple:
        """The arguments of the op after the base's: factors, scale, dropout, mode.

        The mode is the dropout's own: it may be on in evaluation (Monte Carlo dropout), or off in training.
        """
        dropout = self.lora_dropout[name]
        return (
            self.lora_A[name],
            self.lora_E[name],
            self.lora_B[name],
            self.scaling[name] / self._denominator[name],
            getattr(dropout, "p", 0.0),
            dropout.training,
            self.precision,
        )

    def merge(self, *args, **kwargs) -> None:
        """PEFT's, where the base's weight can take ΔW.

        Raises:
            NotImplementedError: the base is quantised.
        """
        if (reason := merge_refusal(self)) is not None:
            raise NotImplementedError(f"this layer cannot be merged: {reason}")
        super().merge(*args, **kwargs)

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


class FusedSVDLinear(FusedLayer, SVDLinear):
    """``SVDLinear`` whose forward and backward are one op; ``fuse`` gives it to existing layers."""

    def _weight(self) -> Tensor | None:
        base = self.base_layer
        # A quantised weight (torchao's is a tensor subclass in a plain nn.Linear) knows its own product only.
        # Hooks, a forward and another base may have been put there after ``fuse``.
        if type(base) not in PLAIN_BASES or type(base.weight) not in PLAIN_TENSORS or calls_more(base):
            return None
        return base.weight.t() if isinstance(base, Conv1D) else base.weight


@cache
def _fused_class(cls: type[AdaLoraLayer]) -> type[AdaLoraLayer]:
    """The fused form of a layer over a quantised base; PEFT has such classes only where their library is."""
    return type(f"Fused{cls.__name__}", (FusedLayer, cls), {"__module__": __name__})


def __getattr__(name: str):
    """The classes made by ``fuse_layer`` by name, so that their layers can be copied and pickled."""
    if name.startswith("FusedSVD"):
        from peft.tuners import adalora

        return _fused_class(getattr(adalora, name.removeprefix("Fused")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def factors_of(layer: AdaLoraLayer, adapter_name: str | None) -> Factors | None:
    """The named adapter's factors in any of PEFT's AdaLoRA layers, or None where it has none."""
    if adapter_name is None or adapter_name not in layer.lora_A:
        return None
    return Factors(layer.lora_A[adapter_name], layer.lora_E[adapter_name], layer.lora_B[adapter_name])


def merge_refusal(layer: AdaLoraLayer) -> str | None:
    """Why ΔW cannot be added to the base's weight, or None if it can."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if weight is not None and weight.is_floating_point() and type(weight).__module__.split(".")[0] == "torch":
        return None
    kind = type(base if weight is None or type(weight) in PLAIN_TENSORS else weight).__name__
    return (
        f"its base is quantised ({kind}) and takes no merged adapter; export it with to_lora, or load it "
        "onto the unquantised base and merge there"
    )


def set_factors(layer: AdaLoraLayer, adapter_name: str, factors: Factors) -> None:
    """Give the adapter factors of another rank; the scale stays that of the initial rank."""
    layer.lora_A[adapter_name], layer.lora_E[adapter_name], layer.lora_B[adapter_name] = factors
    layer.r[adapter_name] = len(factors.lora_E)


def refusal(layer: AdaLoraLayer) -> str | None:
    """Why ``layer`` keeps PEFT's forward, or None if it can be fused."""
    if type(layer).__module__ in QUANTISED:
        return None
    if type(layer) is not SVDLinear:
        return f"{type(layer).__name__} has no fused form"
    if type(layer.base_layer) not in PLAIN_BASES:
        return f"its base is a {type(layer.base_layer).__name__}, not a plain linear"
    return None


def fuse_layer(layer: AdaLoraLayer, precision: str, trained_adapter: str | None) -> str | None:
    """Give ``layer`` its fused class in place; returns why not where that cannot be."""
    if isinstance(layer, FusedLayer):
        layer.precision, layer.trained_adapter = precision, trained_adapter
        return None
    keep_called(layer.lora_A)  # a container that is never called: the hook on it costs nothing
    reason = refusal(layer)
    if reason is None:
        layer.__class__ = FusedSVDLinear if type(layer) is SVDLinear else _fused_class(type(layer))
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
