"""A frozen copy beside the adapter under training, as TRL's reference policies are.

Every case is a state that an adapter can be in: in mid-run, masked at its end, compacted, reloaded.
"""

import contextlib
import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from adalora_fast import compact, fuse, to_lora
from tests.helpers.checkpoints import ADAPTER, CONFIG, END, LAYERS, STATE, checkpoints, new, train
from tests.helpers.models import adapted, awake, bert, trainable
from tests.helpers.peft_models import adamw, logits, one_line, same_state, same_weights, steps


def middle() -> PeftModel:
    model = new()
    model.load_adapter(checkpoints().middle, "default", is_trainable=True)
    return model


def masked() -> PeftModel:
    return copy.deepcopy(checkpoints().finished)


def compacted() -> PeftModel:
    model = masked()
    compact(model)
    return model


def reloaded() -> PeftModel:
    return fuse(PeftModel.from_pretrained(bert(), checkpoints().end, is_trainable=True))


def scaled() -> PeftModel:
    """Ragged, with a scale of its own in every layer."""
    model = new(use_rslora=True, alpha_pattern={"query": 3.0})
    train(model, adamw(model), 0, END)
    model.base_model.rankallocator.finalize()
    compact(model)
    return model


def fresh() -> PeftModel:
    """Rank 4 everywhere, every factor shows in the output."""
    return fuse(awake(adapted("bert", **CONFIG)))


STARTS = [middle, masked, compacted, reloaded, scaled, fresh]


def with_copy(model: PeftModel) -> PeftModel:
    model.add_adapter("ref", model.peft_config["default"])
    return model


@contextlib.contextmanager
def active(model: PeftModel, adapter: str):
    """As TRL switches to the reference and back."""
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter("default")


def ref_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "ref" in name.split(".")}


@pytest.mark.parametrize("start", STARTS)
def test_the_copy_computes_what_the_adapter_does(start):
    model = start()
    expected, ranks = logits(model), model.base_model.rankallocator.ranks()
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    config = copy.deepcopy(model.peft_config["default"])
    with_copy(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == training
    assert torch.equal(logits(model), expected)
    with active(model, "ref"):
        assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected)  # so that the line above means something
    assert model.active_adapters == ["default"] and model.peft_config["default"] == config
    assert [name for name, p in model.named_parameters() if p.requires_grad] == training
    assert model.peft_config["ref"].inference_mode and model.peft_config["ref"] is not config
    assert model.base_model.rankallocator.ranks() == ranks


@pytest.mark.parametrize("start", STARTS)
def test_training_saving_and_the_allocator_are_as_without_it(start, tmp_path):
    """Some steps with the reference looked at in each: bit for bit the run and the files without a copy."""
    models = {"with": with_copy(start()), "without": start()}
    before = ref_weights(models["with"])
    for name, model in models.items():
        model.train()
        optimizer = adamw(model)
        for _ in range(3):
            if name == "with":
                with active(model, "ref"), torch.no_grad():
                    model(input_ids=torch.ones(2, 5, dtype=torch.int64))
            t = model.base_model.rankallocator.t
            steps(model, optimizer, t, t + 1)
        model.save_pretrained(tmp_path / name)
    left, right = models["with"], models["without"]
    assert same_weights(left, right)
    assert not any("ref" in name.split(".") for name, p in left.named_parameters() if p.grad is not None)
    after = ref_weights(left)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)
    allocators = [model.base_model.rankallocator.state_dict() for model in (left, right)]
    assert same_state(*allocators)
    with left.base_model.saving("default"), right.base_model.saving("default"):
        assert left.peft_config["default"] == right.peft_config["default"]
    for file in (ADAPTER, "adapter_config.json", STATE):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes(), file
    assert not (tmp_path / "with" / "ref" / STATE).exists()
    lora = to_lora(left)
    assert torch.allclose(logits(lora), logits(left), atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_a_saved_copy_loads_in_plain_peft_and_into_the_run(start, tmp_path):
    """A resumed run has its reference back from the checkpoint, whatever its own adapter became meanwhile."""
    model = with_copy(start())
    with active(model, "ref"):
        expected = logits(model)
    model.save_pretrained(tmp_path)
    assert model.peft_config["ref"].rank_pattern is None  # in memory: see patterns_of_copies
    plain = PeftModel.from_pretrained(bert(), tmp_path / "ref")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    again = with_copy(start())
    for parameter in ref_weights(again):
        again.get_parameter(parameter).data.add_(1.0)
    again.load_adapter(tmp_path / "ref", "ref", is_trainable=False)
    with active(again, "ref"):
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)


def test_ragged_ranks_and_the_scale_of_the_initial_rank():
    model = with_copy(compacted())
    ranks = checkpoints().ranks
    assert len(set(ranks.values())) > 2 and 0 in ranks.values() and len(ranks) == LAYERS
    for name, rank in ranks.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.lora_A["ref"].shape[0] == layer.lora_B["ref"].shape[1] == layer.r["ref"] == rank
        assert layer.ranknum["ref"].item() == layer.ranknum["default"].item() == 4


def test_a_scale_that_the_config_does_not_know_is_copied():
    """Imported adapters have the rank of another program in their scale, and PEFT can rescale a layer."""
    model = fresh()
    layer = model.base_model.model.get_submodule("bert.encoder.layer.0.attention.self.query")
    layer.set_ranknum("default", 7)
    layer.scaling["default"] *= 3
    expected = logits(model)
    with active(with_copy(model), "ref"):
        assert torch.equal(logits(model), expected)
    assert layer.ranknum["ref"].item() == 7


def test_weights_can_be_set_in_a_copy_of_ragged_ranks():
    """Teachers that follow the student as a moving average set their state dict again and again."""
    model = with_copy(compacted())
    half = {key: value / 2 for key, value in get_peft_model_state_dict(model).items()}
    for _ in range(2):
        set_peft_model_state_dict(model, half, adapter_name="ref")
    key = next(key for key in half if key.endswith("query.lora_A"))
    assert torch.equal(model.get_parameter(f"{key}.ref"), half[key])


def test_replicated_layers_are_not_replicated_again():
    model = fuse(awake(adapted("llama", layer_replication=[[0, 2], [0, 1]], **CONFIG)))
    depth, expected = len(model.base_model.model.model.layers), logits(model)
    with_copy(model)
    assert len(model.base_model.model.model.layers) == depth == 3
    with active(model, "ref"):
        assert torch.equal(logits(model), expected)
    assert model.peft_config["ref"].layer_replication == [[0, 2], [0, 1]]


def test_another_config_is_peft_s_to_judge():
    model = fresh()
    with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
        model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    assert list(model.peft_config) == ["default"]
    with_copy(model)
    with pytest.raises(ValueError, match="already exists"):
        with_copy(model)
    model.delete_adapter("ref")
    with_copy(model)


def test_plain_peft_refuses_and_fuse_is_the_way_out():
    """TRL adds its reference before any callback runs: the model must be fused before it is given to TRL."""
    model = awake(adapted("bert", **CONFIG))
    with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
        with_copy(model)
    expected = logits(with_copy(fuse(model)))
    with active(model, "ref"):
        assert torch.equal(logits(model), expected)
    assert len(trainable(model)) == 3 * LAYERS + 2


def test_biases_of_the_base_cannot_be_copied():
    model = fuse(adapted("bert", bias="all", **CONFIG))
    with one_line(ValueError, "bias='all'", "ref_model=", "beta=0"):
        with_copy(model)
    assert list(model.peft_config) == ["default"]


def test_layers_that_keep_peft_s_forward_are_copied_too():
    """Convolutions have no fused form."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 3, 6, 6)
    base(x)
    config = AdaLoraConfig(target_modules=["0", "2"], init_r=4, target_r=2, total_step=10)
    model = fuse(awake(get_peft_model(base, config)))
    expected = model(x)
    with_copy(model)
    with active(model, "ref"):
        assert torch.equal(model(x), expected)
