"""A run read from its files computes what it computed after training, alone and mixed with others."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from adalora_fast.analysis.changes import RunChange, concatenated, mixture
from adalora_fast.analysis.rows import RowSet, read_rows
from adalora_fast.analysis.saved import open_run
from adalora_fast.analysis.shared import SharedModel, open_model
from tests.analysis.conftest import METHODS
from tests.analysis.mixing import adapter, base, everything, outputs
from tests.helpers.quantised import needs_bitsandbytes
from tests.helpers.training_runs import settings, train


@pytest.fixture(scope="module")
def shared(runs):
    return SharedModel.load(open_run(runs["head"]).settings, device="cpu")


@pytest.fixture(scope="module")
def rows(runs, shared):
    settings = open_run(runs["head"]).settings
    return RowSet(settings, {"all": read_rows(settings)}, shared.tokenizer, shared.device)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_computes_what_it_did(runs, shared, rows, name):
    run = open_run(runs[name])
    with shared.mixed(shared.read([run]), [1.0]) as model:
        logits = rows.logits(model, "all")
    kept = load_file(run.path / "predictions.safetensors")
    np.testing.assert_allclose(logits[0], kept["validation/logits"], atol=2e-6)
    judged = rows.judge(logits, "all")
    assert judged.metrics["accuracy"] == run.result["primary"]
    if name != "peft":  # PEFT's AdaLoRA adds its orthogonality term to the loss in evaluation too
        assert judged.loss == pytest.approx(run.result["metrics"]["validation"]["loss"], abs=1e-6)


@pytest.mark.parametrize("name", ["adalora-0", "full", "head"])
def test_opened_for_inference(runs, rows, name):
    model, tokenizer, run = open_model(runs[name], device="cpu")
    kept = load_file(run.path / "predictions.safetensors")["validation/logits"]
    np.testing.assert_allclose(rows.logits(model, "all")[0], kept, atol=2e-6)
    assert tokenizer("moon")["input_ids"] and not model.training


def test_ranks_4_and_16_give_the_mean_of_the_merged_weights():
    shared = base()
    changes = [adapter(shared, 4, seed=1), adapter(shared, 16, seed=2)]
    weights = [0.3, 0.7]
    expected = {name: tensor.clone() for name, tensor in shared.model.named_parameters()}
    for name in changes[0].factors:
        merged = [
            expected[f"{name}.weight"] + each.factors[name].B @ each.factors[name].A for each in changes
        ]
        expected[f"{name}.weight"] = 0.3 * merged[0] + 0.7 * merged[1]
        assert concatenated(name, changes, weights).rank == 20
    for name in changes[0].tensors:
        expected[name] = 0.3 * changes[0].tensors[name] + 0.7 * changes[1].tensors[name]
    for name, tensor in shared.model.named_parameters():
        torch.testing.assert_close(
            mixture(name, tensor, changes, weights), expected[name], rtol=0, atol=2e-15
        )
    plain = base().model
    plain.load_state_dict(expected, strict=False)
    with shared.mixed(changes, weights) as model:
        for name, tensor in model.named_parameters():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-15)
        torch.testing.assert_close(outputs(model), outputs(plain.eval()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("model_type", ["distilbert", "deberta-v2", "modernbert"])
def test_every_kind_of_encoder(model_type):
    shared = base(model_type)
    changes = [adapter(shared, 3, seed=1), adapter(shared, 2, seed=2)]
    with shared.mixed(changes, [0.4, 0.6]) as model:
        merged = outputs(model)
    added = deepcopy(shared.model)
    for name in changes[0].factors:
        added.get_submodule(name).register_forward_hook(partial(low_rank, changes, [0.4, 0.6], name))
    parameters = dict(added.named_parameters())
    for name in changes[0].tensors:
        parameters[name].data = 0.4 * changes[0].tensors[name] + 0.6 * changes[1].tensors[name]
    torch.testing.assert_close(merged, outputs(added), rtol=0, atol=1e-12)
    assert not torch.allclose(merged, outputs(shared.model))


def low_rank(changes, weights, name, module, inputs, output):
    """y + Σ_i w_i B_i A_i x, run by run."""
    for change, weight in zip(changes, weights):
        factors = change.factors[name]
        output = output + weight * (inputs[0] @ factors.A.T @ factors.B.T)
    return output


def test_a_full_run_with_an_adapter():
    shared = base()
    changes = [adapter(shared, 4, seed=1), everything(shared, seed=2)]
    name = next(iter(changes[0].factors))
    W = dict(shared.model.named_parameters())[f"{name}.weight"]
    factors = changes[0].factors[name]
    expected = 0.25 * (W + factors.B @ factors.A) + 0.75 * changes[1].tensors[f"{name}.weight"]
    torch.testing.assert_close(
        mixture(f"{name}.weight", W, changes, [0.25, 0.75]), expected, rtol=0, atol=1e-14
    )
    with shared.mixed(changes, [0.25, 0.75]) as model:
        found = dict(model.named_parameters())[f"{name}.weight"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_the_base_comes_back_bit_by_bit():
    shared = base()
    changes = [adapter(shared, 2, seed=1), everything(shared, seed=2)]
    before = {name: (p.data_ptr(), p.clone()) for name, p in shared.model.named_parameters()}
    expected = outputs(shared.model)
    with pytest.raises(KeyError), shared.mixed(changes, [0.5, 0.5]) as model:
        assert not torch.equal(outputs(model), expected)
        raise KeyError
    with shared.mixed(changes[:1], [1.0]) as model:
        for name, parameter in model.named_parameters():
            touched = name in changes[0].tensors or name.removesuffix(".weight") in changes[0].factors
            assert (parameter.data_ptr() != before[name][0]) == touched
    assert torch.equal(outputs(shared.model), expected)
    for name, parameter in shared.model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


def test_a_mixture_that_fails_half_way_leaves_the_base_as_it_was(monkeypatch):
    shared = base()
    before = {name: tensor.clone() for name, tensor in shared.model.named_parameters()}
    done = []

    def breaks(*arguments):
        done.append(1)
        if len(done) > 5:
            raise MemoryError
        return mixture(*arguments)

    monkeypatch.setattr("adalora_fast.analysis.shared.mixture", breaks)
    with pytest.raises(MemoryError), shared.mixed([everything(shared, seed=2)], [1.0]):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.model.named_parameters())


def test_weight_one_is_the_run_itself():
    shared = base()
    changes = [everything(shared, seed=1), adapter(shared, 2, seed=2)]
    for name, tensor in shared.model.named_parameters():
        assert torch.equal(mixture(name, tensor, changes, [1.0, 0.0]), changes[0].tensors[name])


def test_weights_that_are_no_mixture():
    shared = base()
    change = adapter(shared, 2, seed=1)
    with pytest.raises(ValueError, match="sum to 1"), shared.mixed([change, change], [0.5, 0.6]):
        pass
    with pytest.raises(ValueError, match="give one for each"), shared.mixed([change], [0.5, 0.5]):
        pass


def edited(run, target, tensors=None, **config):
    """A copy of a run with other adapter settings, or tensors made of its own."""
    shutil.copytree(run, target)
    file = target / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        file = target / "adapter" / "adapter_model.safetensors"
        save_file(tensors(load_tensors(file)), file)
    return open_run(target)


def test_scales_of_lora(runs, shared, tmp_path):
    (plain,) = shared.read([open_run(runs["lora-4"])])
    name = "bert.encoder.layer.0.attention.self.query"
    other = edited(
        runs["lora-4"],
        tmp_path / "scaled",
        use_rslora=True,
        alpha_pattern={"layer.0.attention.self.query": 3},
    )
    (scaled,) = shared.read([other])
    alpha = json.loads((runs["lora-4"] / "adapter" / "adapter_config.json").read_text())["lora_alpha"]
    torch.testing.assert_close(scaled.factors[name].B, plain.factors[name].B * (3 / 4**0.5) / (alpha / 4))
    name = name.replace("query", "key")
    torch.testing.assert_close(scaled.factors[name].B, plain.factors[name].B * 4 / 4**0.5)


def refused(shared, run, match):
    with pytest.raises(ValueError, match=match) as raised:
        shared.read([run])
    assert "\n" not in str(raised.value)


def test_refused_adapters(runs, shared, tmp_path):
    lora = runs["lora-2"]
    refused(shared, edited(lora, tmp_path / "a", use_dora=True), "has use_dora")
    refused(shared, edited(lora, tmp_path / "b", peft_type="VERA"), "peft_type VERA")
    refused(shared, edited(lora, tmp_path / "d", lora_alpha="2"), "lora_alpha '2'")

    def without_head(tensors):
        return {key: value for key, value in tensors.items() if "classifier" not in key}

    def renamed(tensors):
        return {key.replace("layer.1", "layer.7"): value for key, value in tensors.items()}

    def narrower(tensors):
        return {
            key: value[:, :-1].contiguous() if "lora_A" in key else value for key, value in tensors.items()
        }

    def torn(tensors):
        key = next(key for key in tensors if "lora_B" in key)
        return {**tensors, key: tensors[key][:, :-1].contiguous()}

    refused(shared, edited(lora, tmp_path / "e", without_head), "lacks classifier.weight of the head")
    refused(shared, edited(lora, tmp_path / "f", renamed), "layer.7.* has not")
    refused(shared, edited(lora, tmp_path / "g", narrower), "give its own base")
    refused(shared, edited(lora, tmp_path / "h", torn), "do not fit together")


def test_trained_biases_are_tensors(runs, shared):
    """Those of the base, under its own names, and the head once."""
    biases = {
        name
        for name, _ in shared.model.named_parameters()
        if name.endswith(".bias") and "classifier" not in name and "pooler" not in name
    }
    head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    for name in ("bitfit", "lora-biases", "adalora-biases"):
        (change,) = shared.read([open_run(runs[name])])
        assert set(change.tensors) == biases | head and bool(change.factors) == (name != "bitfit")


def test_biases_mix_with_those_of_the_base(runs, shared):
    changes = shared.read([open_run(runs[name]) for name in ("lora-biases", "lora-2")])
    name = "bert.encoder.layer.0.attention.self.query.bias"
    before = dict(shared.model.named_parameters())[name].clone()
    trained = changes[0].tensors[name]
    assert not torch.equal(trained, before)
    with shared.mixed(changes, [0.25, 0.75]) as model:
        torch.testing.assert_close(dict(model.named_parameters())[name], 0.25 * trained + 0.75 * before)


@needs_bitsandbytes
def test_a_base_of_four_bits(encoder, data_dir, tmp_path):
    run = settings(encoder, data_dir, method="lora", dtype="nf4")
    train(run, tmp_path / "run", resumable=False)
    run = open_run(tmp_path / "run")
    shared = SharedModel.load(run.settings, device="cpu")
    rows = RowSet(run.settings, {"all": read_rows(run.settings)}, shared.tokenizer, shared.device)
    with shared.mixed(shared.read([run]), [1.0]) as model:
        (logits,) = rows.logits(model, "all")
    kept = load_file(run.path / "predictions.safetensors")["validation/logits"]
    np.testing.assert_allclose(logits, kept, atol=0.02)  # where some CPUs round inputs to bfloat16


def test_bf16_computes_in_half_precision_and_mixes_in_float32(runs, shared, rows):
    run = open_run(runs["lora-4"])
    half = SharedModel.load(run.settings, device="cpu", precision="bf16")
    losses = []
    for model in (shared, half):
        with model.mixed(model.read([run]), [1.0]) as mixed:
            assert {tensor.dtype for tensor in mixed.parameters()} == {torch.float32}
            losses.append(rows.evaluate(mixed, "all").loss)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    with pytest.raises(ValueError, match="unknown precision 'fp16'; choose fp32 or bf16"):
        SharedModel.load(run.settings, device="cpu", precision="fp16")


def test_a_change_moves_whole():
    change = adapter(base(), 2, seed=1)
    moved = change.to("meta")
    assert isinstance(moved, RunChange) and moved.factors.keys() == change.factors.keys()
    tensors = [*moved.tensors.values(), *(each.A for each in moved.factors.values())]
    assert all(tensor.is_meta for tensor in tensors)


def test_half_precision_bases_keep_their_values(runs):
    settings = replace(open_run(runs["head"]).settings, dtype="bfloat16")
    name = "bert.encoder.layer.0.output.dense.weight"
    rounded = dict(SharedModel.load(settings, device="cpu").model.named_parameters())[name]
    whole = dict(SharedModel.load(replace(settings, dtype="float32"), device="cpu").model.named_parameters())
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, whole[name].bfloat16().float()) and not torch.equal(rounded, whole[name])
