"""``use_rslora`` and ``alpha_pattern``: honoured in training, and the same outputs in every file and copy."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from adalora_fast import fuse, to_lora
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.checkpoints import loaded_by_peft
from tests.helpers.models import adapt, awake, batch, bert, trained_weights
from tests.helpers.peft_models import adamw, logits, one_line, steps

RUN = {"total_step": 20, "tinit": 2, "tfinal": 4, "targets": ["query", "value"]}
ALPHA, RANK = 8, 4
OPTIONS = {
    "use_rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"layer.0.*query": 3, "layer.1.*value": 20.0}},
    "both": {"use_rslora": True, "alpha_pattern": {"value": 2.5}},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def plain(**options) -> PeftModel:
    return adapt(bert(), **{**RUN, "init_r": RANK, "lora_alpha": ALPHA, **options})


def trained(options: dict, stop: int = RUN["total_step"]) -> PeftModel:
    """A fused model after ``stop`` steps."""
    model = fuse(plain(**options))
    steps(model, adamw(model), 0, stop)
    return model


def lambdas(model: PeftModel) -> list[Tensor]:
    return [layer.lora_E["default"].detach().clone() for layer in adapter_layers(model).values()]


def assert_same_lambdas(model: PeftModel, expected: list[Tensor]) -> None:
    for value, other in zip(lambdas(model), expected, strict=True):
        torch.testing.assert_close(value, other)


def test_use_rslora_trains_as_the_same_scale_by_alpha():
    same = plain(lora_alpha=ALPHA * (RANK + 1e-5) / RANK**0.5)
    steps(same, adamw(same), 0, RUN["total_step"])
    ours = trained({"use_rslora": True})
    expected = trained_weights(same)
    for name, weight in trained_weights(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


@every_option
def test_fusing_changes_no_output(options):
    model = awake(plain(**options))
    before, values = logits(model), lambdas(model)
    torch.testing.assert_close(logits(fuse(model)), before)
    changed = [not torch.allclose(a, b) for a, b in zip(lambdas(model), values, strict=True)]
    assert any(changed)  # the scale took over a part of λ


@every_option
@pytest.mark.parametrize("stop", [9, 20], ids=["middle", "end"])
def test_files_mean_the_same_to_peft_and_to_fused_models(options, stop, tmp_path):
    model = trained(options, stop)
    model.save_pretrained(tmp_path)
    expected, values = logits(model), lambdas(model)
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path)), expected)
    other = fuse(plain(**options))
    other.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(other), expected)
    again = fuse(loaded_by_peft(tmp_path, is_trainable=True)) if stop == 20 else other
    torch.testing.assert_close(logits(again), expected)
    again.save_pretrained(tmp_path / "again")  # a second time: no factor is applied twice
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path / "again")), expected)
    if stop < 20:
        assert_same_lambdas(other, values)


@every_option
def test_a_resumed_run_is_the_uninterrupted_one_to_rounding(options, tmp_path):
    middle, model = 9, fuse(plain(**options))
    optimizer = adamw(model)
    steps(model, optimizer, 0, middle)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, middle, RUN["total_step"])
    resumed = fuse(plain(**options))
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer = adamw(resumed)
    optimizer.load_state_dict(state)
    steps(resumed, optimizer, middle, RUN["total_step"])
    assert resumed.base_model.rankallocator.ranks() == model.base_model.rankallocator.ranks()
    torch.testing.assert_close(logits(resumed), logits(model), rtol=1e-3, atol=1e-4)


@every_option
def test_state_dicts_copies_merging_and_export(options):
    model = awake(fuse(plain(**options)))
    expected, values = logits(model), lambdas(model)
    theirs = awake(plain(**options), seed=4)
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(theirs), expected)
    other = awake(fuse(plain(**options)), seed=4)
    other.load_state_dict(model.state_dict())
    assert_same_lambdas(other, values)
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict(), assign=True)
    assert_same_lambdas(copied, values)
    saved = get_peft_model_state_dict(model)
    key = next(key for key in saved if "layer.1.attention.self.value.lora_E" in key)
    assert not torch.allclose(saved[key], values[-1])
    torch.testing.assert_close(logits(to_lora(model)), expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_added_later():
    model = fuse(plain())
    config = plain(use_rslora=True, inference_mode=True).peft_config["default"]
    model.add_adapter("other", config)
    layer = next(iter(adapter_layers(model).values()))
    assert layer.scaling["other"] / (RANK + 1e-5) == pytest.approx(ALPHA / RANK**0.5)
    assert layer.scaling["default"] == ALPHA
    model.delete_adapter("other")
    model.add_adapter("other", plain(inference_mode=True).peft_config["default"])
    assert layer.scaling["other"] == ALPHA and layer.scale_factors["other"] == 1.0


def test_a_finished_adapter_beside_the_one_under_training(tmp_path):
    options = OPTIONS["both"]
    finished = trained(options)
    finished.save_pretrained(tmp_path)
    model = fuse(plain())
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(finished))


def test_layers_without_a_fused_form():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(self.convolution(x).mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, 5)
    settings = {"task_type": None, "use_rslora": True}
    model = awake(adapt(Network(), ["convolution", "linear"], **settings))
    expected = model(x)
    fuse(model)
    assert list(model.base_model.unfused) == ["convolution"]
    torch.testing.assert_close(model(x), expected)
    assert model.base_model.model.convolution.scaling["default"] == pytest.approx(ALPHA * (RANK + 1e-5) / 2)


def test_without_these_options_nothing_is_added():
    model = fuse(plain())
    assert not any(hasattr(layer, "scale_factors") for layer in adapter_layers(model).values())
    assert model.state_dict()[next(key for key in model.state_dict() if "lora_E" in key)].data_ptr() in {
        value.data_ptr() for value in model.parameters()
    }


@pytest.mark.parametrize("alpha", [0, -1.0, float("inf"), float("nan"), True, "8"])
def test_an_alpha_that_is_no_positive_number(alpha):
    model = plain(alpha_pattern={"query": alpha})
    with one_line(ValueError, "alpha_pattern", "'query'", repr(alpha), "positive"):
        fuse(model)
    model.train()(**batch(0)).loss.backward()  # it is what it was


def test_an_adapter_with_biases_is_refused_later_too():
    model = fuse(plain())
    config = plain(inference_mode=True, lora_bias=True).peft_config["default"]
    with one_line(ValueError, "lora_bias=True", "set lora_bias=False"):
        model.add_adapter("other", config)
    assert "other" not in model.peft_config
