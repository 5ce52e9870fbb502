"""Adapters that are called like a part of a module's name: saved, loaded and exported, or refused at once."""

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from adalora_fast import compact, fuse, to_lora
from adalora_fast.integrations.layers import adapter_layers
from tests.helpers.peft_models import one_line

WEIGHTS = "adapter_model.safetensors"
END = 12


class Head(nn.Module):
    """A module that is saved whole, with a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 2)

    def forward(self, x):
        return self.dense(x)


class Net(nn.Module):
    """Layers below modules whose names are short, or begin with each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.ModuleDict(
            {"mlp": nn.Linear(6, 8), "self_attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})}
        )
        self.score = Head()

    def forward(self, x):
        hidden = self.encoder["mlp"](x).tanh()
        return self.score(self.encoder["self_attn"]["q_proj"](hidden).tanh())


X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 2
# Parts of a name, whole components of one, PEFT's own words, and names that no key contains.
NAMES = (
    "default",
    "run",
    "a",
    "de",
    "self",
    "lora",
    "lora_E",
    "mlp",
    "encoder",
    "self_attn",
    "q_proj",
    "ranknum",
)


def config(**settings) -> AdaLoraConfig:
    schedule = {"init_r": 4, "target_r": 2, "total_step": END, "tinit": 2, "tfinal": 3, "lora_alpha": 8}
    return AdaLoraConfig(**schedule, **{"target_modules": ["mlp", "q_proj"], **settings})


def new(name: str, **settings) -> PeftModel:
    torch.manual_seed(2)
    return fuse(get_peft_model(Net(), config(**settings), adapter_name=name))


def train(model: PeftModel, stop: int) -> PeftModel:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-2)
    for step in range(model.base_model.rankallocator.t, stop):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return model.eval()(X)


def folder_of(root, name: str):
    return root if name == "default" else root / name


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [7, END], ids=["middle", "end"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_run_of_any_name(name, stop, tmp_path):
    """Plain PEFT and a fused model load it, under any name, and the run goes on where it was."""
    model = train(new(name), stop)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert model.peft_config[name].rank_pattern is None
    folder = folder_of(tmp_path, name)
    for other in ("default", name):
        close(outputs(PeftModel.from_pretrained(Net(), folder, adapter_name=other)), expected)
    again = new(name)
    again.load_adapter(folder, name, is_trainable=True)
    close(outputs(again), expected)
    here, there = model.base_model.rankallocator, again.base_model.rankallocator
    assert there.is_over == here.is_over and sum(there.ranks().values()) == sum(here.ranks().values())
    assert stop == END or (there.t == here.t and torch.equal(there._mask, here._mask))
    fresh = new("other")
    fresh.load_adapter(folder, name)  # for inference, beside the one under training
    fresh.set_adapter(name)
    close(outputs(fresh), expected)
    close(outputs(to_lora(model)), expected)
    again.save_pretrained(tmp_path / "again")
    close(outputs(PeftModel.from_pretrained(Net(), folder_of(tmp_path / "again", name))), expected)


@pytest.mark.parametrize("name", ["run", "self", "q_proj"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_compacted_run_of_any_name(name, tmp_path):
    model = train(new(name), END)
    compact(model)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    folder = folder_of(tmp_path, name)
    for other in ("default", name):
        close(outputs(PeftModel.from_pretrained(Net(), folder, adapter_name=other)), expected)
    again = new(name)
    again.load_adapter(folder, name, is_trainable=True)
    close(outputs(again), expected)
    assert again.base_model.rankallocator.is_over
    assert again.base_model.rankallocator.ranks() == model.base_model.rankallocator.ranks()
    pattern = model.peft_config[name].rank_pattern
    get_peft_model_state_dict(model, adapter_name=name)  # others call it too; PEFT rewrites the pattern
    assert {key.partition(".lora_E")[0] for key in model.peft_config[name].rank_pattern} == {
        key.partition(".lora_E")[0] for key in pattern
    }


@pytest.mark.parametrize("other", ["mlp", "encoder", "run_extended", "ru", "weight", "lora_A"])
@pytest.mark.parametrize("stop", [7, END], ids=["middle", "end"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_another_adapter_of_any_name(other, stop, tmp_path):
    """Nothing is missing in either's files, and the one under training stays trainable."""
    model = new("run")
    trainable = [p.requires_grad for p in model.parameters()]
    before = {id(p) for p in model.parameters()}
    model.add_adapter(other, config(inference_mode=True))
    assert [p.requires_grad for p in model.parameters() if id(p) in before] == trainable
    train(model, stop)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    assert list(model.peft_config) == ["run", other] and model.active_adapter == "run"
    wanted = {
        f"base_model.model.{name}.{kind}"
        for name in adapter_layers(model.base_model.model)
        for kind in ("lora_A", "lora_E", "lora_B")
    }
    for name in ("run", other):
        assert load_file(tmp_path / name / WEIGHTS).keys() == wanted
    close(outputs(PeftModel.from_pretrained(Net(), tmp_path / "run")), expected)
    again = new("run")
    again.add_adapter(other, config(inference_mode=True))
    again.load_adapter(tmp_path / "run", "run", is_trainable=True)
    close(outputs(again), expected)
    close(outputs(to_lora(model)), expected)
    close(outputs(to_lora(model, adapter_name=None).merge_and_unload()), expected)


@pytest.mark.parametrize(
    "name, settings, key",
    [
        ("dense", {"modules_to_save": ["score"]}, "score.dense.weight"),
        ("weight", {"modules_to_save": ["score"]}, "score.dense.weight"),
        ("bias", {"bias": "all"}, "bias"),
        ("base_layer", {"bias": "lora_only"}, "base_layer.bias"),
    ],
)
def test_a_name_that_peft_would_take_out_of_a_saved_tensor_is_refused(name, settings, key):
    model = get_peft_model(Net(), config(**settings), adapter_name=name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with one_line(ValueError, repr(name), key, "choose another name"):
        fuse(model)
    assert type(model.base_model).__name__ == "AdaLoraModel"
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    model = new("run", **settings)
    with one_line(ValueError, repr(name), key, "choose another name"):
        model.add_adapter(name, config(inference_mode=True, **settings))
    assert list(model.peft_config) == ["run"]
    assert not any(name in layer.lora_A for layer in adapter_layers(model).values())
    train(model, 3)


def test_two_layers_that_have_one_name_without_the_adapters():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ModuleDict({"self": nn.ModuleDict({"q": nn.Linear(4, 4)}), "q": nn.Linear(4, 4)})

    model = get_peft_model(Twins(), config(target_modules=["q"]), adapter_name="self")
    with one_line(ValueError, "'self'", "a.self.q", "a.q", "choose another name"):
        fuse(model)


def test_an_adapter_that_is_not_there():
    with one_line(ValueError, "'other'", "run"):
        new("run").save_pretrained("nowhere", selected_adapters=["other"])
