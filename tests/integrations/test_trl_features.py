"""What TRL does around a step: packing, masks, checkpointing, generation, weights for a generation server."""

import warnings

import pytest
import torch
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback

from adalora_fast import fuse, to_lora
from tests.helpers.models import awake, trained_weights
from tests.helpers.peft_models import same_weights

pytest.importorskip("trl", reason="trl is not installed")

from tests.integrations.trl_cases import STEPS, TOTAL, chats, finished, llama, make, peft_model, reloaded

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"data": chats, "assistant_only_loss": True},
        {"loss_type": "dft"},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_step_is_plain_peft_s(options, tmp_path):
    """On an adapter of ragged ranks, without the orthogonality term: the same losses, the same weights."""
    options = {**SGD, **options, "logging_steps": 1}
    if "data" in options:
        options["data"] = options["data"]()
    plain = PeftModel.from_pretrained(llama(), finished(), is_trainable=True)
    plain.peft_config["default"].orth_reg_weight = 0.0
    found = []
    for model, alone in ((plain, True), (reloaded(orth_reg_weight=0.0), False)):
        run = make("SFT", model, tmp_path, plain=alone, **{**options, "max_steps": 2})
        run.train()
        found.append((trained_weights(model), [entry.get("loss") for entry in run.state.log_history[:2]]))
    (expected, losses), (weights, ours) = found
    assert ours == pytest.approx(losses, abs=2e-4) and losses[0] != losses[1]
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_activations_that_are_kept_elsewhere(tmp_path):
    """As ``activation_offloading=True`` does on a GPU: what is saved for backward comes back as a copy."""
    found, moved = [], []
    for offload in (False, True):
        run = make("SFT", fuse(peft_model()), tmp_path, gradient_checkpointing=False)
        if offload:
            run.maybe_activation_offload_context = saved_tensors_hooks(
                lambda tensor: moved.append(1) or tensor.clone(), lambda tensor: tensor.clone()
            )
        run.train()
        found.append(run.model)
    assert moved and same_weights(*found)


class Sync(TrainerCallback):
    """What generation with vLLM does before every batch: merge, send the weights by name, unmerge."""

    def __init__(self):
        self.sent = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.merge_adapter()
        self.sent = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if model.prefix not in name
        }
        with torch.no_grad():
            self.logits = model(input_ids=torch.arange(2, 14)[None]).logits
        model.unmerge_adapter()


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_weights_are_merged_sent_and_unmerged_in_every_step(kind, tmp_path):
    """All that is sent has the name of one of the base model's weights, and the run goes on as without."""
    synced = Sync()
    options = {"learning_rate": 1e-3, "gradient_checkpointing": False}
    left = make(kind, fuse(peft_model()), tmp_path, synced, **options)
    left.train()
    right = make(kind, fuse(peft_model()), tmp_path, **options)
    right.train()
    assert sum(left.model.base_model.rankallocator.ranks().values()) == TOTAL
    expected = trained_weights(right.model)
    for name, weight in trained_weights(left.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4, msg=name)
    assert synced.sent.keys() == dict(llama().named_parameters()).keys()
    server = llama().eval()
    server.load_state_dict(synced.sent)
    torch.testing.assert_close(server(torch.arange(2, 14)[None]).logits, synced.logits, rtol=0, atol=1e-5)


def test_merged_weights_are_those_of_the_exported_adapter():
    model = fuse(awake(peft_model()))
    expected = to_lora(model).merge_and_unload().state_dict()
    model = fuse(awake(peft_model()))
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        if model.prefix not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5, msg=name)


def test_generation_between_steps_uses_the_adapter_and_changes_nothing(tmp_path):
    """GRPO generates with the policy as it is, in the middle of training."""
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            tuner = model.base_model
            seen.append((tuner.rankallocator.t, tuner._forgotten, tuner._warned_order))

    run = make("GRPO", reloaded(), tmp_path, Look(), num_iterations=2, steps_per_generation=2, beta=0.1)
    before = run.model.base_model.rankallocator.ranks()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(update_and_allocate|allocator)")
        run.train()
    assert seen == [(t, 0, False) for t in range(STEPS)]
    assert run.model.base_model.rankallocator.ranks() == before
    prompt = torch.arange(2, 8)[None]
    run.model.eval()
    with_adapter = run.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    merged = to_lora(run.model).merge_and_unload().eval()
    assert torch.equal(merged.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), with_adapter)
    assert with_adapter.shape[1] > prompt.shape[1]


class Evaluate(TrainerCallback):
    """Asks for an evaluation after every step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_an_evaluation_in_mid_run_changes_nothing(tmp_path):
    found = []
    for callbacks in ((), (Evaluate(),)):
        run = make("SFT", fuse(peft_model()), tmp_path, *callbacks)
        run.eval_dataset = run.train_dataset.select(range(8))
        run.train()
        found.append(run.model)
        assert any("eval_loss" in entry for entry in run.state.log_history) == bool(callbacks)
    assert same_weights(*found)
