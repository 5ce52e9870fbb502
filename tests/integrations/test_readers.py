"""What readers of LoRA files compute, each by its own rule of scale, from ragged and uniform exports."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from adalora_fast import servable, to_lora
from adalora_fast.integrations.layers import adapter_layers
from adalora_fast.integrations.serving import OWN_RANK, READERS, SERVERS
from tests.helpers.models import TARGETS, llama
from tests.integrations.exporting import off, pruned

# alpha / r of the whole adapter; alpha / (columns of this layer's B); both without a look at the patterns.
SCALES = {
    "alpha / r": lambda config, rank: config["lora_alpha"] / config["r"],
    "alpha / own rank": lambda config, rank: config["lora_alpha"] / rank,
}
READER_SCALES = {
    "vllm": "alpha / r",
    "sglang": "alpha / r",
    "tgi": "alpha / r",
    "llama.cpp": "alpha / own rank",
    "diffusers<0.42": "alpha / own rank",
}


def truth(model: PeftModel) -> dict[str, Tensor]:
    """ΔW of every layer of the AdaLoRA model."""
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in adapter_layers(model.base_model.model).items()
    }


def read(folder, rule: str) -> dict[str, Tensor]:
    """ΔW of every layer with an adapter, as a reader with this rule makes it from the files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    result = {}
    for key, lora_A in tensors.items():
        if key.endswith(".lora_A.weight"):
            lora_B = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            result[name] = SCALES[rule](config, lora_B.shape[1]) * lora_B @ lora_A
    return result


@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
def test_what_each_reader_computes_is_what_servable_says(uniform, tmp_path):
    model = pruned("llama", target_modules=TARGETS["llama"], task_type=None)
    expected = truth(model)
    to_lora(model, uniform=uniform).save_pretrained(tmp_path)
    answers = servable(tmp_path)
    assert set(answers) == set(READERS) == set(READER_SCALES) == {*SERVERS, *OWN_RANK}
    worst = {}
    for reader, rule in READER_SCALES.items():
        found = read(tmp_path, rule)
        factors = []
        for name, delta in expected.items():
            if not delta.any():
                assert name not in found or not found[name].any()
                continue
            factors.append((found[name].norm() / delta.norm()).item())
            assert off(found[name] / factors[-1], delta) <= 1e-6  # right but for its scale
        worst[reader] = max(factors)
        if reader in OWN_RANK or uniform:  # sglang and tgi refuse ragged ranks for their own reasons
            assert (answers[reader] == []) == (max(factors) == pytest.approx(1, abs=1e-5))
    assert worst["vllm"] == pytest.approx(1, abs=1e-5)
    for reader in OWN_RANK:
        assert worst[reader] == pytest.approx(1 if uniform else 4, abs=1e-4)
        assert (
            uniform
            or "lora_alpha / 1 instead of lora_alpha / 4; export with uniform=True" in (answers[reader][0])
        )


def test_no_ragged_form_is_right_for_both_kinds_of_readers():
    """ΔW is s B A, with s = alpha / r for one kind and alpha / k for the other: equal only at k = r."""
    alpha, r = 4, 4
    agree = [k for k in range(1, r + 1) if alpha / r == alpha / k]
    assert agree == [r]


def test_plain_peft_agrees_with_the_readers_of_the_uniform_form(tmp_path):
    model = pruned("llama", target_modules=TARGETS["llama"], task_type=None)
    to_lora(model, uniform=True).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    for name, delta in read(tmp_path, "alpha / own rank").items():
        layer = loaded.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), delta)
