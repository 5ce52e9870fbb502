"""One adapted layer as numbers: what every peer is made from, and what it must compute, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = {
    "svd": ("y", "dx", "dA", "dE", "dB"),  # trains lora_A, lora_E and lora_B
    "lora": ("y", "dx", "dA", "dB"),  # plain LoRA with lora_E * lora_A as its A
    "frozen": ("y", "dx"),  # no adapter
}


@dataclass(frozen=True)
class Layer:
    """One adapted layer: a frozen linear (Llama's have no bias) and its factors."""

    weight: Tensor
    bias: Tensor | None
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
        bias: bool = True,
    ) -> "Layer":
        """Random numbers of the sizes that training meets; the factors are float32."""

        def normal(*shape: int, std: float, to: torch.dtype) -> Tensor:
            return (torch.randn(shape, device=device) * std).to(to)

        factors = (
            normal(rank, inner, std=inner**-0.5, to=torch.float32),
            normal(rank, 1, std=1.0, to=torch.float32),
            normal(outer, rank, std=rank**-0.5, to=torch.float32),
        )
        weight = normal(outer, inner, std=inner**-0.5, to=dtype)
        offset = normal(outer, std=1.0, to=dtype) if bias else None
        return cls(weight, offset, *(factor.requires_grad_() for factor in factors), 0.5, dropout_p)


@dataclass(frozen=True)
class Peer:
    """Somebody's form of a layer: call it with x.

    Args:
        run: x [..., in] → y [..., out].
        trained: its parameters in the order of ``FORMS[form]``.
        form: one of ``FORMS``.
    """

    run: Callable[[Tensor], Tensor]
    trained: tuple[Tensor, ...] = ()
    form: str = "svd"

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


def folded(layer: Layer) -> Tensor:
    """lora_E * lora_A as a parameter: the A of a plain LoRA that computes the same."""
    return (layer.lora_A * layer.lora_E).detach().requires_grad_()


def truth(layer: Layer, x: Tensor, dy: Tensor, form: str = "svd") -> list[Tensor]:
    """``FORMS[form]`` by the formula in float64, without dropout."""
    x = x.detach().double().requires_grad_()
    y = F.linear(x, layer.weight.double(), None if layer.bias is None else layer.bias.double())
    inputs = [x]
    if form != "frozen":
        A, E, B = (factor.detach().double().requires_grad_() for factor in layer.factors)
        low = (A * E).detach().requires_grad_() if form == "lora" else A * E
        y = y + (x @ low.t()) @ B.t() * layer.scaling
        inputs += [low, B] if form == "lora" else [A, E, B]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.double())]


def errors(peer: Peer, x: Tensor, dy: Tensor, exact: list[Tensor]) -> dict[str, float]:
    """‖found - exact‖ / ‖exact‖ of what ``FORMS`` lists; ``exact`` is :func:`truth` of the same form."""
    x = x.detach().requires_grad_()
    y = peer(x)
    found = [y.detach(), *torch.autograd.grad(y, [x, *peer.trained], dy)]
    return {
        what: ((actual.double() - value).norm() / value.norm()).item()
        for what, actual, value in zip(FORMS[peer.form], found, exact, strict=True)
    }
