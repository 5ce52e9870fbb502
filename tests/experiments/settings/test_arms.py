"""Short names for ways to train, and the nulls: allocations that look at nothing."""

from itertools import pairwise

import pytest
import torch

from adalora_fast import AdaLoraLinear, RankAllocator
from adalora_fast.allocator.scores import score_names
from adalora_fast.experiments.methods.nulls import by_lot, register_nulls, uniform
from adalora_fast.experiments.settings.arms import OTHER_METHODS, parse_arm
from adalora_fast.experiments.settings.settings import RunSettings


@pytest.mark.parametrize(
    "arm",
    [
        "sensitivity",
        "fisher+sum",
        "gsnr+task",
        "movement+ema_uncertainty+task",
        "uniform",
        "random",
        "lora-r4",
        "fisher+sum-slow",
        *OTHER_METHODS,
    ],
)
def test_an_arm_and_its_settings_say_the_same(arm):
    assert RunSettings(task="sst2", model="tiny", **parse_arm(arm)).arm == arm


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("fischer", "unknown arm 'fischer'; choose one of sensitivity, "),
        ("", "unknown arm ''"),
        ("lore-r4", "unknown arm 'lore'"),
        ("lora+sum", r"unknown arm 'lora\+sum'"),
        ("fisher+mean", r"unknown part 'mean' of the arm 'fisher\+mean'; choose ema_uncertainty, "),
        ("fisher+sum+ema", "unknown part 'ema'"),
        ("fisher+task+task", "unknown part 'task'"),
        ("uniform+task", "uniform looks at nothing"),
        ("random+sum", "random looks at nothing"),
    ],
)
def test_an_arm_that_does_not_exist(arm, message):
    with pytest.raises(ValueError, match=message):
        parse_arm(arm)


def test_the_nulls_are_registered_once():
    register_nulls()
    register_nulls()
    assert {"uniform", "random"} <= set(score_names())


def allocated(score, *, seed=0, target_r=3, steps=12, grow=1.0):
    """Rank patterns at every step of a run with this score on three layers of different shapes."""
    register_nulls()
    torch.manual_seed(seed)
    shapes = ((8, 8), (8, 20), (20, 8))
    model = torch.nn.ModuleList(
        AdaLoraLinear.from_linear(torch.nn.Linear(*shape), r=6, alpha=6) for shape in shapes
    )
    allocator = RankAllocator(
        model, target_r=target_r, tinit=1, tfinal=3, deltaT=1, total_step=steps, score=score
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1 * grow)
    torch.manual_seed(seed)
    patterns = []
    for t in range(steps):
        loss = sum(layer(torch.randn(4, layer.in_features)).square().mean() for layer in model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        allocator.step(t)
        patterns.append([kept for layer in allocator.rank_pattern().values() for kept in layer])
    return patterns, list(allocator.ranks().values())


def test_uniform_gives_every_matrix_the_same_rank_and_only_prunes():
    patterns, ranks = allocated("uniform")
    assert ranks == [3, 3, 3]
    for before, after in pairwise(patterns):
        assert all(b or not a for b, a in zip(before, after, strict=True))  # nothing comes back
        per_layer = [sum(after[i : i + 6]) for i in (0, 6, 12)]
        assert max(per_layer) - min(per_layer) <= 1


def test_random_depends_on_the_seed_and_on_nothing_else():
    (first, ranks), (again, _), (other, _) = (allocated("random", seed=seed) for seed in (0, 0, 1))
    assert sum(ranks) == 9 and first == again and first[-1] != other[-1]
    assert allocated("random", grow=3.0)[0] == first  # other weights and gradients, the same lot
    for before, after in pairwise(first):
        assert all(b or not a for b, a in zip(before, after, strict=True))


def test_the_lot_survives_a_checkpoint():
    """It lies in the state that belongs to the parameters, not in the generator."""
    w, state = torch.zeros(2, 5, 1), {}
    torch.manual_seed(3)
    drawn = by_lot(w, w, state)
    torch.manual_seed(4)
    assert torch.equal(by_lot(w, w, state), drawn) and not torch.equal(by_lot(w, w, {}), drawn)


@pytest.mark.parametrize("function", [uniform, by_lot])
def test_only_lambda_counts(function):
    w = torch.randn(2, 5, 7)
    assert not function(w, w, {}).any()
