"""AdaLoraLinear: a frozen linear layer with an adapter P Λ Q whose triplets a RankAllocator prunes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from adalora_fast.ops import adalora_linear
from adalora_fast.ops.adapter import PRECISIONS

from .calls import is_called, keep_called
from .plain import carry_hooks, carry_over, more_than_its_product


class Factors(NamedTuple):
    """Q [r, in], Λ [r, 1] and P [out, r] of one adapted matrix."""

    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter


class AdaLoraLinear(nn.Module):
    """``y = x Wᵀ + b + scaling · (dropout(x) Aᵀ ⊙ Eᵀ) Bᵀ`` with W, b frozen (AdaLoRA, arXiv 2303.10512, eq.
    1).

    scaling = alpha / (ranknum + 1e-5), and ``ranknum`` stays at the initial rank when triplets are pruned, as
    in PEFT. lora_A, lora_B ~ N(0, 0.02²), lora_E = 0: a new layer computes exactly what its linear layer
    computed.

    Args:
        in_features, out_features: K and N.
        r: initial rank, 0 or more (0: no adapter, the frozen linear alone).
        alpha: numerator of the scale.
        dropout: drop probability of the adapter's input while training.
        bias: whether the frozen layer has a bias.
        precision: ``"default"`` or ``"highest"``, see :func:`adalora_fast.ops.adalora_linear`.
        device, dtype: of the frozen weight; the adapter is float32 for half types, else the weight's type.

    Raises:
        ValueError: r < 0, dropout outside [0, 1], unknown precision.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        bias: bool = True,
        precision: str = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool) or r < 0:
            raise ValueError(f"r must be an integer of at least 0, got {r!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], got {dropout}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not one of {PRECISIONS}")
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.ranknum = r
        self.alpha, self.dropout, self.precision = alpha, dropout, precision
        self.merged = False
        dtype = dtype or torch.get_default_dtype()
        empty = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **empty), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **empty), requires_grad=False) if bias else None
        factor = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **factor))
        self.lora_E = nn.Parameter(torch.empty(r, 1, **factor))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **factor))
        self.reset_parameters()
        keep_called(self)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        precision: str = "default",
    ) -> "AdaLoraLinear":
        """The adapted form of ``linear``: same device, weight and bias (shared, not copied), frozen; its
        further attributes, buffers and parameters are kept.

        Args:
            linear: the layer to adapt.
            r, alpha, dropout, precision: as for the class.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear`` with floating-point weights, or does more than
                x Wᵀ + b: a subclass, hooks, parametrizations, a forward of its own. The message says what to
                do.
            ValueError: it has an attribute whose name means something else here.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear needs an nn.Linear with floating-point weights, got {linear}")
        if (more := more_than_its_product(linear)) is not None:
            raise TypeError(f"from_linear needs an nn.Linear and nothing more than that; this one {more}")
        if not linear.weight.is_floating_point():
            dtype = linear.weight.dtype
            raise TypeError(f"from_linear needs an nn.Linear with floating-point weights, this has {dtype}")
        out_features, in_features = linear.weight.shape
        layer = cls(
            in_features,
            out_features,
            r,
            alpha=alpha,
            dropout=dropout,
            bias=linear.bias is not None,
            precision=precision,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight = linear.weight.requires_grad_(False)
        if linear.bias is not None:
            layer.bias = linear.bias.requires_grad_(False)
        for name, factor in layer.factors()._asdict().items():
            setattr(layer, name, nn.Parameter(torch.empty_like(factor, device=linear.weight.device)))
        layer.reset_lora_parameters()
        carry_over(linear, layer, nn.Linear(1, 1, device="meta"))
        return layer.train(linear.training)

    @property
    def scaling(self) -> float:
        """alpha / (ranknum + 1e-5), with ranknum the initial rank."""
        return self.alpha / (self.ranknum + 1e-5)

    def factors(self) -> Factors:
        """The parameters a RankAllocator works on."""
        return Factors(self.lora_A, self.lora_E, self.lora_B)

    def to_linear(self) -> nn.Linear:
        """The frozen layer alone, on the same weight and bias, with this layer's hooks and other members."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        carry_over(self, linear, AdaLoraLinear(1, 1, 1, device="meta"))
        carry_hooks(self, linear, without=is_called)
        return linear.train(self.training)

    def set_factors(self, factors: Factors) -> None:
        """Take factors of another rank in place of these; the scale stays that of the initial rank."""
        self.lora_A, self.lora_E, self.lora_B = factors
        self.r = len(factors.lora_E)

    def reset_parameters(self) -> None:
        """Draw W and b as ``nn.Linear`` does, and the adapter anew."""
        if self.weight.device.type != "meta":
            nn.Linear.reset_parameters(self)  # pyright: ignore[reportArgumentType] - it has all of a Linear's parts
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A, lora_B ~ N(0, 0.02²), lora_E = 0."""
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        if self.merged or self.r == 0:
            return nn.functional.linear(x, self.weight, self.bias)
        return adalora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_E,
            self.lora_B,
            self.scaling,
            self.dropout,
            self.training,
            self.precision,
        )

    @torch.no_grad()
    def get_delta_weight(self) -> Tensor:
        """ΔW = scaling · B diag(E) A [out, in], in the adapter's type."""
        return self.lora_B @ (self.lora_A * (self.lora_E * self.scaling))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False) -> None:
        """Add ΔW to the frozen weight, so that the layer runs as a plain linear; a merged layer stays as it
        is.

        Args:
            safe_merge: check the sum first and change nothing if it is not finite.

        Raises:
            ValueError: ``safe_merge`` and the merged weight would not be finite.
        """
        if self.merged:
            return
        delta = self.get_delta_weight().to(self.weight.dtype)
        if safe_merge and not (self.weight + delta).isfinite().all():
            raise ValueError(
                "the merged weight would not be finite; the adapter is broken, the layer was left as it is"
            )
        self.weight += delta
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take ΔW out of the weight again, exact up to rounding; an unmerged layer stays as it is."""
        if self.merged:
            self.weight -= self.get_delta_weight().to(self.weight.dtype)
            self.merged = False

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha}, dropout={self.dropout}, bias={self.bias is not None}"
        )
