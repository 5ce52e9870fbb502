"""``fuse`` changes classes and nothing else: parameters, optimizers and PEFT's methods stay valid."""

import copy
import pickle

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, PeftModelForSequenceClassification, get_peft_model
from peft.tuners.adalora import AdaLoraModel
from torch import nn

from adalora_fast import RankAllocator, fuse, orthogonality_loss
from adalora_fast.integrations.fused import FusedAdaLoraModel, is_fused
from adalora_fast.integrations.layers import FusedSVDLinear, adapter_layers
from tests.helpers.models import adapted, awake, batch, trained_weights
from tests.helpers.peft_models import adamw, logits, no_warning, same_state, same_weights, steps, trained


def inference_config(**overrides) -> AdaLoraConfig:
    return AdaLoraConfig(
        **{
            "task_type": "SEQ_CLS",
            "inference_mode": True,
            "init_r": 6,
            "target_r": 2,
            "total_step": 10,
            "target_modules": ["query", "value"],
            **overrides,
        }
    )


def pickled(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


def test_in_place():
    model = adapted("bert")
    before = list(model.named_parameters())
    keys, modules = list(model.state_dict()), list(model.modules())
    config = model.peft_config["default"]
    assert fuse(model) is model
    assert is_fused(model)
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))
    assert list(model.state_dict()) == keys
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert model.peft_config["default"] is config
    assert isinstance(model, PeftModelForSequenceClassification) and isinstance(
        model.base_model, AdaLoraModel
    )
    assert isinstance(model.base_model.rankallocator, RankAllocator)
    assert all(type(layer) is FusedSVDLinear for layer in adapter_layers(model).values())
    assert len(adapter_layers(model)) == 13  # six linears in each of two layers, and the pooler
    assert model.base_model.unfused == {}


def test_a_new_adapter_changes_nothing_and_evaluation_is_the_base_model():
    model = adapted("bert")
    expected = logits(model.get_base_model())
    torch.testing.assert_close(logits(fuse(model)), expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_made_before_stays_valid():
    early, late = adapted("bert"), adapted("bert")
    optimizer = adamw(early)
    fuse(early)
    fuse(late)
    assert steps(early, optimizer, 0, 20) == steps(late, adamw(late), 0, 20)
    assert same_weights(early, late)


def test_fused_in_the_middle_of_training_keeps_the_optimizer_state():
    model = adapted("bert")
    optimizer = adamw(model)
    steps(model, optimizer, 0, 5)
    fuse(model)
    with no_warning():
        losses = steps(model, optimizer, 5, 10)
    assert len(losses) == 5 and all(torch.isfinite(torch.tensor(losses)))


def test_unfused_layers_are_named_with_the_reason():
    class Mine(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.mine = nn.Linear(6, 6), Mine(6, 6)
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            return self.mine(self.plain(x)) + self.conv(x.view(1, 1, -1, 6)).sum()

    torch.manual_seed(0)
    model = get_peft_model(
        Net(), AdaLoraConfig(init_r=3, target_r=1, total_step=9, target_modules=["plain", "mine", "conv"])
    )
    awake(model)
    x = torch.randn(4, 6)
    expected = model(x)
    fuse(model)
    unfused = model.base_model.unfused
    assert set(unfused) == {"mine", "conv"}
    assert "Mine" in unfused["mine"] and "SVDConv2d" in unfused["conv"]
    torch.testing.assert_close(model(x), expected)
    assert list(model.base_model.rankallocator.ranks()) == ["plain", "mine", "conv"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(9):
        model(x).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert sum(model.base_model.rankallocator.ranks().values()) == 3


def test_disable_adapter():
    model = awake(fuse(adapted("bert")))
    base = logits(model.get_base_model())
    with model.disable_adapter():
        plain = logits(model)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    expected = awake(adapted("bert"))
    with expected.disable_adapter():
        assert torch.equal(plain, logits(expected))
    assert torch.equal(base, logits(model))


def test_add_adapter_afterwards_is_fused_and_stays_frozen():
    model = trained(fuse(adapted("bert", total_step=20, tinit=2, tfinal=4)), 8)
    allocator, state = model.base_model.rankallocator, model.base_model.rankallocator.state_dict()
    weights = trained_weights(model)
    model.add_adapter("other", inference_config(target_modules=["query", "value", "classifier"]))
    assert model.base_model.rankallocator is allocator
    assert same_state(allocator.state_dict(), state)
    assert all(isinstance(layer, FusedSVDLinear) for layer in adapter_layers(model).values())
    now = trained_weights(model)
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)
    steps(model, adamw(model), 8, 12)
    assert allocator.t == 12


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]])
def test_several_adapters_as_peft(active):
    def build() -> PeftModel:
        model = adapted("bert", task_type=None)  # (PEFT cannot activate two classifiers at once)
        torch.manual_seed(4)
        model.add_adapter("other", inference_config(task_type=None))
        return awake(awake(model), "other", seed=8)

    peft, ours = build(), build()
    fuse(ours)
    for model in (peft, ours):
        model.base_model.set_adapter(active, inference_mode="default" not in active)
    torch.testing.assert_close(logits(ours), logits(peft), rtol=1e-5, atol=1e-5)
    only_default = awake(adapted("bert", task_type=None))
    if active != ["default"]:
        assert not torch.allclose(logits(ours), logits(only_default), atol=1e-3)
    assert list(ours.base_model.rankallocator.ranks()) == list(
        fuse(only_default).base_model.rankallocator.ranks()
    )


def test_evaluation_does_not_add_the_orthogonality_term():
    model, plain = fuse(adapted("bert", orth_reg_weight=0.5)), fuse(adapted("bert", orth_reg_weight=0.0))
    term = 0.5 * orthogonality_loss(model)
    assert term > 0.1
    for each in (model, plain):
        each.eval()
    assert torch.equal(model(**batch(0)).loss, plain(**batch(0)).loss)
    for each in (model, plain):
        each.train()
    with torch.no_grad():
        assert torch.equal(model(**batch(0)).loss, plain(**batch(0)).loss)
    torch.testing.assert_close(model(**batch(0)).loss - plain(**batch(0)).loss, term)


def test_the_orthogonality_term_is_pefts():
    peft, ours = awake(adapted("bert")), fuse(awake(adapted("bert")))
    torch.testing.assert_close(ours.train()(**batch(0)).loss, peft.train()(**batch(0)).loss)


def test_inference_only_adapter_with_labels():
    model = adapted("bert", inference_mode=True)
    with pytest.raises(AttributeError):
        model(**batch(0))  # PEFT's own does not get that far
    fuse(model)
    for mode in (True, False):
        model.train(mode)
        assert model(**batch(0)).loss.isfinite()
    assert model.base_model.rankallocator is None
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("copier", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(copier, task_type):
    model = fuse(adapted("bert", total_step=20, tinit=2, tfinal=4, task_type=task_type), score="fisher")
    trained(model, 9)
    twin = copier(model)
    assert type(twin) is type(model) and isinstance(twin.base_model, FusedAdaLoraModel)
    assert same_weights(twin, model)
    ours, theirs = model.base_model.rankallocator, twin.base_model.rankallocator
    assert theirs is not ours and same_state(theirs.state_dict(), ours.state_dict())
    kept = ours.state_dict()
    steps(twin, adamw(twin), 9, 16)
    assert theirs.t == 16 and ours.t == 9 and same_state(ours.state_dict(), kept)
    assert not same_weights(twin, model)
    steps(model, adamw(model), 9, 16)
    assert same_weights(twin, model) and same_state(theirs.state_dict(), ours.state_dict())


def test_a_copy_of_a_model_with_an_attached_optimizer():
    model = fuse(adapted("bert", total_step=20, tinit=2, tfinal=4))
    model.base_model.rankallocator.attach(adamw(model))
    twin = copy.deepcopy(model)
    steps(twin, adamw(twin), 0, 3)  # calls the allocator by hand, which an attached one would refuse
    assert twin.base_model.rankallocator.t == 3 and model.base_model.rankallocator.t == 0


def test_a_model_that_is_cast_afterwards():
    early, late = fuse(adapted("bert").double()), fuse(adapted("bert")).double()
    assert steps(early, adamw(early), 0, 20) == steps(late, adamw(late), 0, 20)
    assert same_weights(early, late)
    ours, theirs = (model.base_model.rankallocator.state_dict() for model in (late, early))
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for name, expected in theirs["tensors"].items():
        assert ours["tensors"][name].dtype == expected.dtype, name
        assert torch.equal(ours["tensors"][name], expected), name


def test_warnings_name_the_line_that_fuses():
    """Whatever is between: a warning that points into the package says nothing to its user."""
    with pytest.warns(UserWarning, match="empty statistics") as found:
        fuse(awake(adapted("bert")))
    given = get_peft_model(adapted("bert").get_base_model(), inference_config(inference_mode=False))
    given.peft_config["default"].rank_pattern = {
        f"{name}.lora_E": [True] * 6 for name in adapter_layers(given.base_model.model)
    }
    with pytest.warns(UserWarning, match="rank_pattern is dropped") as dropped:
        fuse(given)
    ours = [
        warning.filename
        for warning in (*found, *dropped)
        if "empty statistics" in str(warning.message) or "is dropped" in str(warning.message)
    ]
    assert len(ours) >= 2 and set(ours) == {__file__}
