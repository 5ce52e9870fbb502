"""Whole runs: the fused model takes PEFT's decisions at every step and ends with PEFT's weights."""

from collections import Counter
from functools import cache

import pytest
import torch

from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.models import adapted, batch
from tests.helpers.parity_runs import BATCHES, STEPS, TOLERANCES, Run, distance, loss_distance, train

FAMILIES = ("bert", "deberta", "llama")
# tinit, tfinal, deltaT; 66 - 13 = 53 is no multiple of 3, so the last mask falls outside its rhythm
SCHEDULES = {"every step": (10, 15, 1), "every third step": (7, 13, 3), "no warm-up": (0, 14, 1)}
CASES = [
    *((family, schedule) for family in FAMILIES for schedule in ("every step", "every third step")),
    ("bert", "no warm-up"),
]


@cache
def runs(family: str, schedule: str) -> tuple[Run, Run]:
    """(PEFT's, ours)."""
    tinit, tfinal, deltaT = SCHEDULES[schedule]
    config = {"tinit": tinit, "tfinal": tfinal, "deltaT": deltaT}
    return train(family, fused=False, **config), train(family, fused=True, **config)


both = pytest.mark.parametrize(("family", "schedule"), CASES)


@both
def test_the_run_is_worth_comparing(family, schedule):
    peft, _ = runs(family, schedule)
    tinit, tfinal, deltaT = SCHEDULES[schedule]
    assert sum(peft.losses[-BATCHES:]) < sum(peft.losses[:BATCHES])
    for name, weight in peft.weights.items():  # (λ of a layer that lost its last triplet is zero again)
        assert "lora_E" in name or not torch.equal(weight, peft.initial[name]), name
    patterns = {tuple(pruned) for pruned in peft.pruned}
    assert len(patterns) >= 12 // deltaT  # the pattern moves
    ranks = {sum(kept) for kept in peft.patterns[-1].values()}
    assert len(ranks) >= 3  # and the layers end with different ranks
    if deltaT == 1:
        returned = [
            any(was and not now for was, now in zip(before, after, strict=True))
            for before, after in zip(peft.pruned, peft.pruned[1:], strict=False)
        ]
        assert any(returned[tinit : STEPS - tfinal])  # a pruned triplet came back


def test_deberta_uses_its_query_and_key_layers_twice_per_forward():
    model, calls = adapted("deberta"), Counter()
    for name, layer in adapter_layers(model).items():
        kind = name.rpartition(".")[2]
        layer.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
    model(**batch(0))
    assert calls["query_proj"] == calls["key_proj"] == 2 * calls["value_proj"] == 4


@both
def test_no_scores_tie(family, schedule):
    # PEFT prunes too much where scores tie, so parity is defined where they do not: that must be so here.
    peft, _ = runs(family, schedule)
    tinit, tfinal, deltaT = SCHEDULES[schedule]
    assert len(peft.scores) == STEPS - tfinal
    masked = [step for step in range(tinit + 1, STEPS - tfinal) if step % deltaT == 0] + [STEPS - tfinal - 1]
    for step in masked:
        ordered = peft.scores[step].sort().values
        gaps = (ordered[1:] - ordered[:-1]) / ordered[1:]
        assert gaps.min() > 1e-9, f"step {step}: relative gap {gaps.min():.1e}"


@both
def test_same_pruned_triplets_at_every_step(family, schedule):
    peft, ours = runs(family, schedule)
    for step in range(STEPS):
        assert ours.pruned[step] == peft.pruned[step], f"step {step}"


@both
def test_same_rank_pattern_at_every_step(family, schedule):
    peft, ours = runs(family, schedule)
    for step in range(STEPS):
        assert ours.patterns[step] == peft.patterns[step], f"step {step}"


@both
def test_same_losses(family, schedule):
    assert loss_distance(*runs(family, schedule)) <= TOLERANCES["loss"]


@pytest.mark.parametrize(("family", "schedule"), [case for case in CASES if case[0] != "llama"])
def test_same_weights(family, schedule):
    assert distance(*runs(family, schedule)) <= TOLERANCES["weights"]


def test_llama_stays_as_close_as_peft_to_itself():
    # Llama's norms round to float32, so differences grow: the yardstick is PEFT started 1e-12 beside itself.
    schedule = "every step"
    tinit, tfinal, deltaT = SCHEDULES[schedule]
    peft, ours = runs("llama", schedule)
    beside = train("llama", fused=False, perturbation=1e-12, tinit=tinit, tfinal=tfinal, deltaT=deltaT)
    assert distance(peft, beside) > 0
    assert distance(peft, ours) <= distance(peft, beside)


@pytest.mark.parametrize("clip", (None, 0.5))
def test_dropout_draws_the_same_numbers(clip):
    config = {"steps": 30, "tinit": 5, "tfinal": 8, "lora_dropout": 0.2, "base_dropout": 0.1, "clip": clip}
    peft, ours = train("bert", fused=False, **config), train("bert", fused=True, **config)
    without = train("bert", fused=False, **{**config, "lora_dropout": 0.0, "base_dropout": 0.0})
    assert loss_distance(peft, without) > 1e-3  # dropout was on
    assert ours.pruned == peft.pruned
    assert ours.patterns == peft.patterns
    assert loss_distance(peft, ours) <= TOLERANCES["loss"]
    assert distance(peft, ours) <= TOLERANCES["weights"]


def test_without_orthogonality():
    config = {"steps": 30, "tinit": 5, "tfinal": 8, "orth_reg_weight": 0.0}
    peft, ours = train("bert", fused=False, **config), train("bert", fused=True, **config)
    assert ours.pruned == peft.pruned
    assert distance(peft, ours) <= TOLERANCES["weights"]
