"""Where scores tie, PEFT prunes all at the threshold; here exactly the budget is kept, in a fixed order."""

import pytest
import torch

from adalora_fast import fuse
from tests.helpers.models import BASES, adapt


def step_with_constant_scores(model, steps: int, value: float = 0.5) -> None:
    """Allocator steps in which every entry of every factor has the same weight and gradient."""
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    for step in range(steps):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)
                parameter.grad = torch.full_like(parameter, value)
        model.base_model.update_and_allocate(step)


# Layers of one shape: means over different numbers of equal entries differ in the last bit, no ties then.
TARGETS = {"bert": ["query", "value"], "deberta": ["query_proj", "key_proj"]}


def kept(model) -> list[bool]:
    return (
        torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_E" in n]) != 0
    ).tolist()


@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_all_scores_tie(family):
    config = {"tinit": 2, "tfinal": 4, "total_step": 16, "targets": TARGETS[family]}
    peft, ours = adapt(BASES[family](), **config), fuse(adapt(BASES[family](), **config))
    steps = 8
    step_with_constant_scores(peft, steps)
    step_with_constant_scores(ours, steps)
    budget = ours.base_model.rankallocator.budget
    total = len(kept(ours))
    assert peft.base_model.rankallocator.budget_schedule(steps - 1)[0] == budget
    assert 0 < budget < total
    assert kept(peft) == [False] * total  # PEFT over-prunes
    assert kept(ours) == [True] * budget + [False] * (total - budget)  # lower layer first, then lower triplet


def test_ties_at_the_threshold_only():
    config = {"tinit": 0, "tfinal": 2, "total_step": 8, "targets": TARGETS["bert"]}
    peft, ours = adapt(BASES["bert"](), **config), fuse(adapt(BASES["bert"](), **config))
    for model in (peft, ours):
        for step in range(2):
            for number, (name, parameter) in enumerate(
                (n, p) for n, p in model.named_parameters() if "lora_" in n
            ):
                with torch.no_grad():
                    parameter.fill_(1.0 + number % 2 if "lora_E" in name else 1.0)
                parameter.grad = torch.ones_like(parameter)
            model.base_model.update_and_allocate(step)
    budget = ours.base_model.rankallocator.budget
    assert sum(kept(ours)) == budget
    assert sum(kept(peft)) < budget
    assert all(
        ours_keeps for ours_keeps, peft_keeps in zip(kept(ours), kept(peft), strict=True) if peft_keeps
    )
