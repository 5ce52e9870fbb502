"""What one adapted layer is compared with: the frozen layer, PEFT, a function of ``addmm`` calls, and ours.

Every peer is made from one :class:`Layer`, so all compute with the same numbers; a benchmark's gate compares
each with the formula in float64 before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn

from adalora_fast.ops import adalora_linear

Module = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One adapted layer: a frozen linear and its factors."""

    weight: Tensor
    bias: Tensor
    lora_A: Tensor
    lora_E: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lora_A, self.lora_E, self.lora_B

    @classmethod
    def draw(
        cls,
        inner: int,
        outer: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        dropout_p: float = 0.0,
    ) -> "Layer":
        """Random numbers of the sizes that training meets; the factors are float32."""

        def normal(*shape: int, std: float, to: torch.dtype) -> Tensor:
            return (torch.randn(shape, device=device) * std).to(to)

        factors = (
            normal(rank, inner, std=inner**-0.5, to=torch.float32),
            normal(rank, 1, std=1.0, to=torch.float32),
            normal(outer, rank, std=rank**-0.5, to=torch.float32),
        )
        base = normal(outer, inner, std=inner**-0.5, to=dtype), normal(outer, std=1.0, to=dtype)
        return cls(*base, *(factor.requires_grad_() for factor in factors), 0.5, dropout_p)


class UnslothStyle(torch.autograd.Function):
    """The adapter as one function of matrix products: what one writes by hand without kernels of one's own.

    No dropout; the factors are cast to x's type, and ``x Aᵀ`` is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_E, lora_B, scaling):
        rows = x.view(-1, x.shape[-1])
        y = torch.addmm(bias, rows, weight.t())
        A, B = (lora_A * lora_E).to(x.dtype), lora_B.to(x.dtype)
        y.addmm_(rows @ A.t(), B.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, lora_A, lora_E, lora_B)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, lora_A, lora_E, lora_B = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        A, B = (lora_A * lora_E).to(dy.dtype), lora_B.to(dy.dtype)
        g = dy @ B
        dx = (dy @ weight).addmm_(g, A, alpha=ctx.scaling)
        V = (g.t() @ rows).float() * ctx.scaling
        dB = (dy.t() @ (rows @ A.t())).float() * ctx.scaling
        return dx.view(*grad.shape[:-1], -1), None, None, V * lora_E, (V * lora_A).sum(1, True), dB, None


def frozen(layer: Layer) -> Module:
    return lambda x: F.linear(x, layer.weight, layer.bias)


def peft(layer: Layer) -> Module:
    """PEFT's SVDLinear with the layer's own tensors, in training mode."""
    outer, inner = layer.weight.shape
    rank = layer.lora_A.shape[0]
    base = nn.Linear(inner, outer, device=layer.weight.device, dtype=layer.weight.dtype).requires_grad_(False)
    base.weight.data, base.bias.data = layer.weight, layer.bias
    options = {"lora_alpha": rank, "lora_dropout": layer.dropout_p}
    module = SVDLinear(
        base, "default", AdaLoraConfig(total_step=100, init_r=rank, target_r=1, **options), r=rank, **options
    )
    for name in ("lora_A", "lora_E", "lora_B"):
        getattr(module, name)["default"] = nn.Parameter(getattr(layer, name))
    module.scaling["default"] = layer.scaling
    with torch.no_grad():
        module.ranknum["default"].fill_(1.0 - 1e-5)  # PEFT divides the scale by ranknum + 1e-5
    return module.train()


def peft_compiled(layer: Layer) -> Module:
    return torch.compile(peft(layer), dynamic=False)


def unsloth_style(layer: Layer) -> Module:
    return lambda x: UnslothStyle.apply(x, layer.weight, layer.bias, *layer.factors, layer.scaling)


def ours(layer: Layer) -> Module:
    def run(x: Tensor) -> Tensor:
        base = layer.weight, layer.bias
        return adalora_linear(x, *base, *layer.factors, layer.scaling, layer.dropout_p, training=True)

    return run


PEERS: dict[str, Callable[[Layer], Module]] = {
    "frozen": frozen,
    "adalora_fast": ours,
    "peft": peft,
    "peft compiled": peft_compiled,
    "unsloth style": unsloth_style,
}
NO_DROPOUT = ("unsloth style",)  # they have none


def parameters_of(name: str, layer: Layer, module: Module) -> list[Tensor]:
    """The factors that a peer trains, lora_A, lora_E, lora_B."""
    if name == "frozen":
        return []
    if name.startswith("peft"):
        inside = getattr(module, "_orig_mod", module)
        return [getattr(inside, factor)["default"] for factor in ("lora_A", "lora_E", "lora_B")]
    return list(layer.factors)


def truth(layer: Layer, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dA, dE, dB of the formula in float64, without dropout."""
    x = x.double().requires_grad_()
    A, E, B = (factor.detach().double().requires_grad_() for factor in layer.factors)
    base = F.linear(x, layer.weight.double(), layer.bias.double())
    y = base + ((x @ A.t()) * E[:, 0]) @ B.t() * layer.scaling
    return [y.detach(), *torch.autograd.grad(y, [x, A, E, B], dy.double())]
