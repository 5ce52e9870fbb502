"""The reference policy of TRL's trainers: the adapter as it was at the start, or the base without it."""

import math

import pytest
import torch
from peft import PeftModel

from adalora_fast import fuse
from tests.helpers.checkpoints import STATE
from tests.helpers.models import awake
from tests.helpers.peft_models import same_weights

pytest.importorskip("trl", reason="trl is not installed")

from tests.integrations.trl_cases import STEPS, llama, make, peft_model, reloaded, settings

BETA = {"GRPO": {"beta": 0.1}, "RLOO": {"beta": 0.1}}
IDS = torch.arange(2, 14)[None]


def first_entry(run) -> dict[str, float]:
    """What TRL logs of the first step, in which policy and reference are still the same."""
    run.train()
    return run.state.log_history[0]


def outputs(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    model.set_adapter("default")
    return found


@pytest.mark.parametrize(
    ("kind", "figure", "value"),
    [("DPO", "loss", math.log(2)), ("KTO", "loss", 0.5), ("GRPO", "kl", 0.0)],
)
def test_it_is_the_trained_adapter_of_ragged_ranks(kind, figure, value, tmp_path):
    """So the margin, or the divergence, of the first step is zero; against the base model it is not."""
    model = reloaded(orth_reg_weight=0.0)
    assert len(set(model.base_model.rankallocator.ranks().values())) > 1
    base = model.get_base_model().lm_head.weight.clone()
    start = outputs(model, "default")
    run = make(kind, model, tmp_path, logging_steps=1, disable_dropout=True, **BETA.get(kind, {}))
    assert first_entry(run)[figure] == pytest.approx(value, abs=1e-6)
    assert torch.equal(outputs(model, "ref"), start) and not torch.allclose(outputs(model, "default"), start)
    assert torch.equal(model.get_base_model().lm_head.weight, base)


def test_against_the_base_model_the_first_margin_is_not_zero(tmp_path):
    """What a reference without the adapter's weights would give: the test above can tell."""
    run = make("DPO", reloaded(orth_reg_weight=0.0), tmp_path, logging_steps=1, ref_model=llama())
    assert abs(first_entry(run)["loss"] - math.log(2)) > 1e-4


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_a_plain_model_is_refused_by_peft_and_fused_is_the_way_out(kind, tmp_path):
    """TRL adds the reference before any callback is called, so the callback cannot help here."""
    model = peft_model()
    with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
        make(kind, model, tmp_path, **BETA.get(kind, {}))
    make(kind, fuse(model), tmp_path, **BETA.get(kind, {})).train()
    assert model.base_model.rankallocator.t == STEPS


def test_it_is_saved_beside_the_adapter(tmp_path):
    """The adapter's own files are where they are without it; plain PEFT reads both."""
    run = make("DPO", reloaded(), tmp_path, save_strategy="steps", save_steps=4)
    start = outputs(run.model, "ref")
    run.train()
    for folder in (tmp_path / "checkpoint-4", tmp_path / f"checkpoint-{STEPS}"):
        assert (folder / STATE).is_file() and not (folder / "ref" / STATE).exists()
        found = PeftModel.from_pretrained(llama(), folder / "ref").eval()(input_ids=IDS).logits
        torch.testing.assert_close(found, start, rtol=0, atol=1e-5)
    end = PeftModel.from_pretrained(llama(), folder).eval()(input_ids=IDS).logits
    torch.testing.assert_close(end, outputs(run.model, "default"), rtol=0, atol=1e-5)


def test_a_resumed_run_has_its_reference_from_the_checkpoint(tmp_path):
    """Whatever TRL copied when the trainer was made, the Trainer loads the reference of the run."""
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = make("DPO", reloaded(), tmp_path, **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    again = make("DPO", reloaded(), tmp_path, **options)
    with torch.no_grad():
        for name, parameter in again.model.named_parameters():
            if "ref" in name.split("."):
                parameter.add_(1.0)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same_weights(again.model, whole.model)
    assert torch.equal(outputs(again.model, "ref"), outputs(whole.model, "ref"))


@pytest.mark.parametrize("given", [True, False], ids=["fused", "peft_config"])
def test_precomputed_reference_log_probabilities_give_the_same_run(given, tmp_path):
    found = []
    for precompute in (False, True):
        model, config = (reloaded(), None) if given else (llama(), settings())
        torch.manual_seed(1)
        run = make(
            "DPO",
            model,
            tmp_path,
            peft_config=config,
            precompute_ref_log_probs=precompute,
            learning_rate=1e-3,
        )
        run.train()
        found.append(run.model)
    left, right = (dict(model.named_parameters()) for model in found)
    assert left.keys() == right.keys()
    for name, parameter in left.items():
        torch.testing.assert_close(parameter, right[name], rtol=0, atol=1e-5, msg=name)


def test_forwards_without_the_adapter_add_no_orthogonality_term_and_are_no_steps():
    """The reference of a new adapter: the adapter is turned off in a model in training mode."""
    model = fuse(awake(peft_model(orth_reg_weight=100.0)))
    tuner, plain = model.base_model, llama()
    expected = plain(input_ids=IDS, labels=IDS).loss
    model.train()
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, expected)
        model(input_ids=IDS)
    assert tuner._forgotten == 0
    assert model(input_ids=IDS, labels=IDS).loss > expected + 100
