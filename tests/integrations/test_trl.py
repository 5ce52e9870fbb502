"""TRL's trainers with AdaLoraCallback: the budget, saving, resuming, and who makes the PEFT model."""

import pytest
import torch
from peft import PeftModel

from adalora_fast import AdaLoraCallback, fuse
from adalora_fast.integrations.fused import is_fused
from tests.helpers.checkpoints import ADAPTER, STATE
from tests.helpers.models import trained_weights
from tests.helpers.peft_models import same_state, same_weights

pytest.importorskip("trl", reason="trl is not installed")

from tests.integrations.trl_cases import (
    STEPS,
    TOTAL,
    StopAt,
    llama,
    make,
    peft_model,
    reloaded,
    settings,
)

KINDS = ["SFT", "DPO", "KTO", "GRPO", "RLOO"]
REFERENCE = {kind: {"beta": 0.1} if kind in ("GRPO", "RLOO") else {} for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_reached_in_the_model_that_trl_makes(kind, tmp_path):
    callback = AdaLoraCallback(score="fisher")
    run = make(
        kind,
        llama(),
        tmp_path,
        callback=callback,
        peft_config=settings(),
        save_strategy="steps",
        save_steps=4,
    )
    assert is_fused(run.model)
    run.train()
    allocator = run.model.base_model.rankallocator
    assert allocator.score.name == "fisher" and allocator.t == STEPS and allocator.is_over
    assert sum(allocator.ranks().values()) == TOTAL and len(set(allocator.ranks().values())) > 1
    assert (tmp_path / "checkpoint-4" / STATE).is_file()
    run.save_model(tmp_path / "saved")
    plain = PeftModel.from_pretrained(llama(), tmp_path / "saved")
    ids = torch.arange(2, 14)[None]
    torch.testing.assert_close(plain.eval()(ids).logits, run.model.eval()(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_config_and_a_peft_model_give_the_same_run(kind, tmp_path):
    """TRL adds a reference beside a model that it is given, equal to the base of a new adapter."""
    weights, models = trained_weights(peft_model()), []
    for model, config in ((llama(), settings()), (fuse(peft_model()), None)):
        run = make(kind, model, tmp_path, peft_config=config, **REFERENCE[kind])
        with torch.no_grad():
            for name, weight in weights.items():
                run.model.get_parameter(name).copy_(weight)
        run.train()
        models.append(run.model)
    made, given = models
    assert list(made.peft_config) == ["default"]
    assert list(given.peft_config) == (["default"] if kind == "SFT" else ["default", "ref"])
    assert same_weights(made, given) and trained_weights(made).keys() == weights.keys()
    assert made.base_model.rankallocator.ranks() == given.base_model.rankallocator.ranks()


def test_plain_peft_models_are_fused_where_trl_adds_no_reference(tmp_path):
    for kind, options in (("SFT", {}), ("GRPO", {"beta": 0.0}), ("DPO", {"ref_model": llama()})):
        run = make(kind, peft_model(), tmp_path, **options)
        run.train()
        assert sum(run.model.base_model.rankallocator.ranks().values()) == TOTAL, kind


@pytest.mark.parametrize(
    ("kind", "accumulation"), [("SFT", 2), ("DPO", 2), ("KTO", 1), ("GRPO", 2), ("RLOO", 1)]
)
def test_a_resumed_run_is_the_whole_run(kind, accumulation, tmp_path):
    """New adapters; bit for bit, with the states of optimizer, random numbers and allocator."""
    options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": accumulation}
    options |= REFERENCE[kind]
    whole = make(kind, fuse(peft_model()), tmp_path, **options)
    whole.train()
    again = make(kind, fuse(peft_model()), tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == STEPS
    assert same_weights(again.model, whole.model)
    assert same_state(
        again.model.base_model.rankallocator.state_dict(), whole.model.base_model.rankallocator.state_dict()
    )
    assert sum(whole.model.base_model.rankallocator.ranks().values()) == TOTAL


def test_a_run_that_was_stopped_is_resumed_from_its_last_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "peft_config": settings(lora_dropout=0.1)}
    whole = make("SFT", llama(), tmp_path / "whole", **options)
    whole.train()
    with pytest.warns(UserWarning, match="pruned from"):
        make("SFT", llama(), tmp_path / "stopped", StopAt(3), **options).train()
    again = make("SFT", llama(), tmp_path / "stopped", **options)
    again.train(resume_from_checkpoint=True)
    assert same_weights(again.model, whole.model)


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_a_finished_adapter_is_trained_on_with_its_ranks(kind, tmp_path):
    model = reloaded()
    ranks = model.base_model.rankallocator.ranks()
    run = make(kind, model, tmp_path, save_strategy="steps", save_steps=4, **REFERENCE[kind])
    run.train()
    assert not same_weights(model, reloaded())
    assert model.base_model.rankallocator.ranks() == ranks and sum(ranks.values()) == TOTAL
    again = make(kind, reloaded(), tmp_path, **REFERENCE[kind])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(again.model, model)
    assert (tmp_path / "checkpoint-4" / ADAPTER).is_file()
