"""The adapter parameters of DeBERTa-v3-base (72 linears, r = 16, random), and PEFT's allocator on them."""

from types import SimpleNamespace

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

RANK = 16
SHAPES = [(768, 768)] * 48 + [(768, 3072)] * 12 + [(3072, 768)] * 12  # (in, out)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_parameters(dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> list[Tensor]:
    """A_0, E_0, B_0, A_1, ..., each with a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        parameter = nn.Parameter(torch.randn(*size, generator=generator).to(device, dtype))
        parameter.grad = torch.randn(*size, generator=generator).to(device, dtype)
        return parameter

    return [f for k, n in SHAPES for f in (draw(RANK, k), draw(RANK, 1), draw(n, RANK))]


def peft_allocator(parameters: list[Tensor], beta: float = 0.85) -> tuple[RankAllocator, nn.Module]:
    """PEFT's own allocator, and a model that has the parameters under PEFT's names, and no others.

    In a real model its loops also pass over every parameter of the base.
    """
    model = nn.ModuleDict()
    for number in range(len(parameters) // 3):
        layer = model[f"layer{number:03}"] = nn.ModuleDict()
        for name, parameter in zip(("lora_A", "lora_E", "lora_B"), parameters[3 * number :], strict=False):
            layer[name] = nn.ParameterDict({"default": parameter})
    config = SimpleNamespace(beta1=beta, beta2=beta, target_r=RANK // 2)
    return RankAllocator(model, config, "default"), model
