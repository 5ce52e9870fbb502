"""The same training run with PEFT's AdaLoRA and with the fused model, and what both are compared by."""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import Tensor

from adalora_fast import fuse
from tests.helpers.models import adapted, batch, trainable, trained_weights

STEPS = 66
BATCHES = 8
TOLERANCES = {
    "weights": 1e-10,  # max abs difference after a whole run in float64
    "loss": 2e-7,  # transformers computes DeBERTa's loss and Llama's norms in float32
    "layer": 1e-12,  # of one layer in float64, relative to the largest entry
}


@dataclass(kw_only=True)
class Run:
    """Per step the loss, which λ are zero, the rank pattern and PEFT's scores; the weights at the end."""

    losses: list[float] = field(default_factory=list)
    pruned: list[list[bool]] = field(default_factory=list)
    patterns: list[dict[str, list[bool]] | None] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)


def train(
    family: str,
    *,
    fused: bool,
    steps: int = STEPS,
    perturbation: float = 0.0,
    learning_rate: float = 2e-2,
    clip: float | None = None,
    base_dropout: float = 0.0,
    **config,
) -> Run:
    """PEFT's loop in float64: backward, optimizer.step(), update_and_allocate(step), zero_grad()."""
    model = adapted(family, total_step=steps, **config).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and base_dropout:
            module.p = module.p or base_dropout
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.add_(perturbation)
    if fused:
        fuse(model)
    run = Run(initial=trained_weights(model))
    optimizer = torch.optim.AdamW(trainable(model), lr=learning_rate)
    model.train()
    torch.manual_seed(17)
    for step in range(steps):
        loss = model(**batch(step % BATCHES)).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.pruned.append((singular_values(model) == 0).tolist())
        run.patterns.append(pattern(model, fused))
        if not fused and step < steps - model.peft_config["default"].tfinal:
            run.scores.append(peft_scores(model.base_model.rankallocator))
    run.weights = trained_weights(model)
    return run


def singular_values(model: PeftModel) -> Tensor:
    """λ of every layer, one after the other."""
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_E" in name])


def pattern(model: PeftModel, fused: bool) -> dict[str, list[bool]] | None:
    """The rank pattern under PEFT's keys; None before the first mask."""
    if not fused:
        return model.peft_config["default"].rank_pattern
    found = model.base_model.peft_rank_pattern()
    return None if all(all(kept) for kept in found.values()) else found


def peft_scores(allocator: PeftAllocator) -> Tensor:
    """Every triplet's score from PEFT's own statistics: s(λ) + mean s(P) + mean s(Q), with s = Ī Ū."""
    parts = []
    for name in allocator.name_set:
        a, e, b = (
            allocator.exp_avg_ipt[name % kind] * allocator.exp_avg_unc[name % kind]
            for kind in ("lora_A", "lora_E", "lora_B")
        )
        parts.append(e.flatten() + a.mean(1) + b.mean(0))
    return torch.cat(parts)


def distance(left: Run, right: Run) -> float:
    """The largest absolute difference of any trained weight at the end."""
    assert left.weights.keys() == right.weights.keys()
    return max((left.weights[name] - right.weights[name]).abs().max().item() for name in left.weights)


def loss_distance(left: Run, right: Run) -> float:
    """The largest absolute difference of the losses of one step."""
    return max(abs(a - b) for a, b in zip(left.losses, right.losses, strict=True))
