"""The orthogonality regulariser of all adapters of a model, value and gradient, in its Frobenius form.

That form is what PEFT computes in its forward. The floor reads every factor and writes its gradient, 8 bytes
an entry; the copy moves as many.
"""

from functools import partial

import torch
from torch import Tensor

from adalora_fast.ops import orthogonality
from adalora_fast.ops.dispatch import backend
from adalora_fast.ops.dispatch.timing import input_sets
from benchmarks.adapters import Model, make_parameters, model_for
from benchmarks.suites import Case, Contestant, Work

BYTES_PER_ENTRY = 8
GATE = 1e-4
CONTESTANTS = ("peft", "adalora_fast", "copy")


def cases(scale: str, device: torch.device) -> list[Case]:
    model = model_for(scale)
    return [
        Case(
            suite="orthogonality",
            name=f"value and gradient {model.name} r{model.rank}",
            what={
                "model": model.name, "rank": model.rank, "matrices": len(model.shapes), "penalty": "fro",
                "entries": model.entries, "backend": backend.choose("orthogonality", device.type).backend,
            },
            baseline="peft",
            build=partial(build, model, device),
            contestants=CONTESTANTS,
            moved=model.entries * BYTES_PER_ENTRY,
        )
    ]  # fmt: skip


def peft_loop(factors: list[Tensor]) -> Tensor:
    """The loop of PEFT's AdaLoraModel.forward: mean over the factors of ‖P' P'ᵀ - I‖."""
    total = 0
    for number, factor in enumerate(factors):
        cov = factor @ factor.T if number % 2 == 0 else factor.T @ factor  # lora_A, lora_B, lora_A, ...
        identity = torch.eye(*cov.size(), out=torch.empty_like(cov))
        identity.requires_grad = False
        total += torch.norm(cov - identity, p="fro")
    return total / len(factors)


def _ours(factors: list[Tensor]) -> Tensor:
    return orthogonality(factors[0::2], factors[1::2])[0]


LOSSES = {"peft": peft_loop, "adalora_fast": _ours}


def _gradient(loss, factors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(factors), factors)


def build(model: Model, device: torch.device) -> Work:
    moved = model.entries * BYTES_PER_ENTRY
    sets = input_sets(moved) if device.type == "cuda" else 1
    models = [
        [factor for number, factor in enumerate(make_parameters(model, device, seed)) if number % 3 != 1]
        for seed in range(sets)
    ]

    def gate(name: str) -> None:
        """Value and gradients against the formula in float64."""
        if name == "copy":
            return
        wide = [factor.detach().double().requires_grad_() for factor in models[0]]
        truth = peft_loop(wide)
        exact = [truth.detach(), *torch.autograd.grad(truth, wide)]
        value = LOSSES[name](models[0])
        found = [value.detach(), *torch.autograd.grad(value, models[0])]
        for number, (actual, right) in enumerate(zip(found, exact, strict=True)):
            error = ((actual.double() - right).norm() / right.norm()).item()
            what = f"the gradient of factor {number - 1}" if number else "the value"
            assert error <= GATE, f"the relative error of {what} is {error:.2g}, allowed is {GATE:g}"

    def make(name: str) -> Contestant:
        if name == "copy":
            pairs = [torch.ones(2, moved // 8, device=device) for _ in range(sets)]
            return Contestant([partial(target.copy_, source) for source, target in pairs])
        return Contestant([partial(_gradient, LOSSES[name], factors) for factors in models])

    return Work({name: partial(make, name) for name in CONTESTANTS}, gate)
