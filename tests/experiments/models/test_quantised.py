"""The base in four bits (NF4, double quantisation), under the methods that leave it alone."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adalora_fast.analysis.saved import SavedRun, check_comparable
from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.methods.adapters import adapt, save_adapter
from adalora_fast.experiments.models.encoders import dequantised, load_model
from adalora_fast.experiments.models.families import FAMILIES
from adalora_fast.experiments.models.loading import load_encoder
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import METHODS, ON_FOUR_BITS, RunSettings
from tests.experiments.run.test_resume import interrupt
from tests.helpers.quantised import needs_bitsandbytes
from tests.helpers.tiny import RECIPE, changed_encoder, save_encoder, write_sst2
from tests.helpers.training_runs import read, settings, train

TYPES = ("bert", "roberta", "electra", "deberta-v2", "distilbert", "modernbert")
IDS = torch.tensor([[2, 7, 8, 9, 10, 11, 3], [2, 12, 8, 13, 3, 0, 0]])
MASK = (IDS != 0).long()
SHORT = replace(RECIPE, tinit=1, tfinal=1, deltaT=1, virtual_tokens=4)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {family: save_encoder(root / family, model_type=family) for family in TYPES}


def load(folder, dtype="nf4", compute_dtype="float32"):
    torch.manual_seed(0)
    model, _ = load_model(
        str(folder), kind="classification", labels=("a", "b"), dtype=dtype, compute_dtype=compute_dtype
    )
    return model


def is_of_head(name, family):
    return bool(set(FAMILIES[family].head_for("classification")).intersection(name.split(".")))


def outputs(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


@needs_bitsandbytes
@pytest.mark.parametrize("family", TYPES)
def test_linear_layers_of_the_encoder_are_four_bits_and_all_else_is_float32(encoders, family):
    model, plain = load(encoders[family]), load(encoders[family], dtype="float32")
    size = {True: [0, 0], False: [0, 0]}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            quantised = type(module).__name__ == "Linear4bit"
            assert quantised is not is_of_head(name, family), name
            other = plain.get_submodule(name)
            if quantised:
                state = module.weight.quant_state
                assert state.quant_type == "nf4" and state.nested and state.blocksize == 64
                parts = [module.weight, state.absmax, state.state2.absmax]
                assert 8 * module.weight.numel() * 2 == 8 * other.weight.numel()
                size[True][0] += sum(each.numel() * each.element_size() for each in parts)
                size[True][1] += other.weight.numel() * 4
    assert size[True][0] < size[True][1] / 7  # 4 bits of 32, and the scales of the blocks
    others = {p.dtype for n, p in model.named_parameters() if p.dtype != torch.uint8}
    assert others == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize("family", TYPES)
def test_it_computes_nearly_what_the_base_does_and_exactly_what_its_numbers_stand_for(encoders, family):
    model, plain = load(encoders[family]), load(encoders[family], dtype="float32")
    found, expected = outputs(model), outputs(plain)
    assert 0 < (found - expected).abs().max() < 0.5 * expected.abs().max()
    widened = dequantised(model)
    assert not any(type(module).__name__ == "Linear4bit" for module in widened.modules())
    torch.testing.assert_close(outputs(widened), found, rtol=0, atol=1e-5)
    assert dequantised(plain) is plain


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_it_multiplies_in_the_precision_of_the_recipe(encoders, precision, dtype):
    run = RunSettings(
        task="sst2", model=str(encoders["bert"]), dtype="nf4", recipe=Recipe(precision=precision)
    )
    model, _ = load_encoder(run, TASKS["sst2"])
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert {layer.compute_dtype for layer in layers} == {getattr(torch, dtype)}


@needs_bitsandbytes
@pytest.mark.parametrize("method", ON_FOUR_BITS)
def test_only_what_a_method_adds_and_the_head_are_trained(encoders, method, tmp_path):
    def adapted(seed):
        model = load(encoders["bert"])
        torch.manual_seed(seed)
        run = RunSettings(task="sst2", model="tiny", method=method, dtype="nf4", recipe=SHORT)
        return adapt(model, run, TASKS["sst2"]), run

    model, run = adapted(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(
        is_of_head(n, "bert") or any(x in n for x in ("lora_", "ia3_l", "prompt_encoder")) for n in trained
    )
    if method in ("adalora", "peft", "lora"):
        assert sum(hasattr(module, "lora_A") for module in model.modules()) == 12
    if method == "adalora":
        assert model.base_model.unfused == {}
    model.train()(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    save_adapter(model, run, tmp_path / "adapter")
    again, _ = adapted(2)
    again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(outputs(again), outputs(model))


@needs_bitsandbytes
def test_a_checkpoint_is_judged_as_for_any_other_dtype(encoders, tmp_path):
    wide = changed_encoder(encoders["bert"], tmp_path / "wide", intermediate_size=48)
    with pytest.raises(ValueError, match=r"intermediate.dense.* is \[64"):
        load(wide)
    deep = changed_encoder(encoders["bert"], tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(ValueError, match="lacks 16 tensors of the encoder"):
        load(deep)


@needs_bitsandbytes
def test_a_run_goes_on_where_it_was_stopped(encoders, tmp_path):
    data = write_sst2(tmp_path / "data", train=16, validation=8)
    run = settings(encoders["bert"], data, dtype="nf4", recipe=replace(SHORT, precision="bf16"))
    whole = train(run, tmp_path / "whole")
    interrupt(run, tmp_path / "run", 3)
    result = train(run, tmp_path / "run")
    assert result["resumed"] and result["metrics"] == whole["metrics"]
    assert read(tmp_path / "run", "ranks.json") == read(tmp_path / "whole", "ranks.json")
    ours, theirs = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "whole")
    )
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def test_runs_on_four_bits_are_not_mixed_with_others():
    four, whole = (
        SavedRun(path=Path(dtype), settings=settings("tiny", "data", "lora", dtype=dtype), result={})
        for dtype in ("nf4", "float32")
    )
    check_comparable([four, four])
    with pytest.raises(
        ValueError, match="nf4 has dtype 'nf4', and float32 has 'float32'; give runs that agree"
    ):
        check_comparable([four, whole])


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ON_FOUR_BITS])
def test_methods_that_do_not_train_on_four_bits(method):
    with pytest.raises(ValueError, match="nf4") as one:
        RunSettings(task="sst2", model="tiny", method=method, dtype="nf4")
    assert method in str(one.value) and "\n" not in str(one.value)


def test_without_bitsandbytes(encoders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(ValueError, match=r"pip install 'adalora_fast\[quantized\]'"):
        load(encoders["bert"])


def test_an_unknown_compute_dtype(encoders):
    with pytest.raises(
        ValueError, match="unknown compute_dtype 'int8'; choose one of float32, bfloat16, float16"
    ):
        load(encoders["bert"], compute_dtype="int8")
