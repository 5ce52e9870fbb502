"""Adapter parameters of a whole model, random, and PEFT's allocator on them."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """The adapted linears of a model."""

    name: str
    shapes: tuple[tuple[int, int], ...]  # (in, out)
    rank: int = 16

    @property
    def triplets(self) -> int:
        return self.rank * len(self.shapes)

    @property
    def entries(self) -> int:
        """Numbers in all factors A and B."""
        return sum(self.rank * (inner + outer) for inner, outer in self.shapes)


DEBERTA = Model("deberta-v3-base", ((768, 768),) * 48 + ((768, 3072),) * 12 + ((3072, 768),) * 12)
TINY = Model("tiny", ((24, 24), (24, 40), (40, 24)), rank=3)


def model_for(scale: str) -> Model:
    return TINY if scale == "tiny" else DEBERTA


def make_parameters(model: Model, device: torch.device, seed: int = 0) -> list[Tensor]:
    """A_0, E_0, B_0, A_1, ..., float32, each with a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        parameter = nn.Parameter(torch.randn(*size, generator=generator).to(device))
        parameter.grad = torch.randn(*size, generator=generator).to(device)
        return parameter

    r = model.rank
    return [factor for k, n in model.shapes for factor in (draw(r, k), draw(r, 1), draw(n, r))]


def parameter_name(position: int) -> str:
    """The name of a parameter in :func:`peft_allocator`'s model, by its place in the list."""
    return f"layer{position // 3:05}.{('lora_A', 'lora_E', 'lora_B')[position % 3]}.default"


def peft_allocator(parameters: list[Tensor], beta: float = 0.85) -> tuple[RankAllocator, nn.Module]:
    """PEFT's own allocator, and a model that has the parameters under PEFT's names, and no others.

    In a real model its loops also pass over every parameter of the base.
    """
    model = nn.ModuleDict()
    for position, parameter in enumerate(parameters):
        layer, factor, adapter = parameter_name(position).split(".")
        if layer not in model:
            model[layer] = nn.ModuleDict()
        model[layer][factor] = nn.ParameterDict({adapter: parameter})
    config = SimpleNamespace(beta1=beta, beta2=beta, target_r=1)
    return RankAllocator(model, config, "default"), model
