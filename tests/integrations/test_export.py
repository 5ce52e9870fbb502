"""``to_lora``: the same function as plain LoRA, in a form that PEFT and servers read."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, compact, fuse, servable, to_lora
from adalora_fast.integrations.layers import adapter_layers, factors_of
from tests.helpers.checkpoints import END, checkpoints, new, train
from tests.helpers.models import BASES, TARGETS, adapt, adapted, awake, bert, trained_weights
from tests.helpers.peft_models import adamw, logits, no_warning, one_line, steps
from tests.helpers.small_model import make_model
from tests.integrations.exporting import (
    SCALE,
    Convolutions,
    kept_of,
    off,
    prune,
    pruned,
    ranks_of,
    rules,
)

ROOT = Path(__file__).parents[2]
FAMILIES = list(TARGETS)


# -- the function is the same ------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_outputs(family, fused, uniform):
    model = pruned(family, fused)
    expected = logits(model)
    with model.disable_adapter():
        assert off(logits(model), expected) > 0.05  # the adapter matters
    lora = to_lora(model, uniform=uniform)
    assert type(lora.base_model).__name__ == "LoraModel" and not lora.training
    assert off(logits(lora), expected) <= 1e-6


def test_the_same_outputs_in_float64():
    model = pruned("bert").double()
    lora = to_lora(model)
    assert {p.dtype for name, p in lora.named_parameters() if "lora_" in name} == {torch.float64}
    assert off(logits(lora), logits(model)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_factors", [False, True])
def test_half_precision(dtype, half_factors):
    """Exact factors in float32; outputs agree as far as the base's type resolves."""
    model = prune(awake(adapt(BASES["bert"]().to(dtype), TARGETS["bert"])))
    if half_factors:
        model.to(dtype)
    name, layer = next(iter(adapter_layers(model.base_model.model).items()))
    lora = to_lora(model)
    half_logits = logits(model.eval())
    assert off(logits(lora).float(), half_logits.float()) <= 4 * torch.finfo(dtype).eps
    module = lora.base_model.model.get_submodule(name)
    factors = factors_of(layer, "default")
    rows = (factors.lora_A.double() * factors.lora_E.double())[kept_of(0)]
    assert module.lora_A["default"].weight.dtype == torch.float32
    tolerance = 0 if half_factors else 1e-7
    torch.testing.assert_close(module.lora_A["default"].weight.double(), rows, rtol=tolerance, atol=0)


@pytest.mark.parametrize("uniform", [False, True])
def test_convolutions(uniform):
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=8, target_modules=["first", "second", "last"]
    )
    model = prune(awake(get_peft_model(Convolutions(), config))).eval()
    x = torch.randn(2, 3, 6, 7)
    lora = to_lora(model, uniform=uniform)
    assert off(lora(x), model(x)) <= 1e-6
    shapes = [
        getattr(lora.base_model.model, name).lora_A["default"].weight.shape for name in ("first", "second")
    ]
    assert shapes == [(2, 3, 3, 2), (2 if uniform else 1, 5, 1, 1)]


def test_modules_to_save_go_along_and_the_base_keeps_its_own():
    model = pruned("bert")
    head = model.base_model.model.classifier
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    lora = to_lora(model)
    assert off(logits(lora), logits(model)) <= 1e-6
    copied = lora.base_model.model.classifier
    assert torch.equal(copied.original_module.weight, head.original_module.weight)
    assert torch.equal(copied.modules_to_save["default"].weight, head.modules_to_save["default"].weight)
    assert lora.peft_config["default"].modules_to_save == ["classifier", "score"]


def test_the_formula():
    model = pruned("bert")
    tensors = {name: parameter for name, parameter in to_lora(model).named_parameters() if "lora_" in name}
    for index, (name, layer) in enumerate(adapter_layers(model.base_model.model).items()):
        A, E, B = (factor.detach().double() for factor in factors_of(layer, "default"))
        kept, key = kept_of(index), f"base_model.model.{name}"
        if not kept:
            assert f"{key}.lora_A.default.weight" not in tensors
            continue
        rows, columns = (tensors[f"{key}.{kind}.default.weight"].double() for kind in ("lora_A", "lora_B"))
        torch.testing.assert_close(rows, E[kept] * A[kept], rtol=1e-7, atol=0)
        torch.testing.assert_close(columns, SCALE * B[:, kept], rtol=1e-7, atol=0)


# -- what PEFT and servers read ------------------------------------------------------------------

LOADS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "adalora_fast":
            raise ImportError("not here")
sys.meta_path.insert(0, Blocked())
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.helpers.models import llama
folder, inputs, outputs = sys.argv[1:]
model = PeftModel.from_pretrained(llama(), folder).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, outputs)
adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
assert adapted and all(type(module).__module__ == "peft.tuners.lora.layer" for module in adapted)
assert not any(name.startswith("adalora_fast") for name in sys.modules)
"""


@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
def test_plain_peft_loads_it_where_this_package_is_not_installed(uniform, tmp_path):
    model = pruned("llama")
    to_lora(model, uniform=uniform).save_pretrained(tmp_path / "lora")
    inputs = {"input_ids": torch.arange(1, 25).view(2, 12)}
    save_file(inputs, tmp_path / "inputs")
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *(str(tmp_path / name) for name in ("lora", "inputs", "outputs"))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert off(load_file(tmp_path / "outputs")["logits"], model(**inputs).logits) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_shapes_and_scale(family, tmp_path):
    model = pruned(family)
    to_lora(model).save_pretrained(tmp_path / "ragged")
    to_lora(model, uniform=True).save_pretrained(tmp_path / "uniform")
    names = list(adapter_layers(model.base_model.model))
    config, tensors = rules(tmp_path / "ragged")
    ranks = {key.split(".lora_A")[0]: len(t) for key, t in tensors.items() if ".lora_A" in key}
    assert ranks == {f"base_model.model.{n}": len(kept_of(i)) for i, n in enumerate(names) if kept_of(i)}
    config, tensors = rules(tmp_path / "uniform")
    assert config["r"] == 4 and config["rank_pattern"] == {} and config["exclude_modules"] is None
    for index, name in enumerate(names):
        A, B = (tensors[f"base_model.model.{name}.{kind}.weight"] for kind in ("lora_A", "lora_B"))
        rank = len(kept_of(index))
        assert A.shape[0] == B.shape[1] == 4
        assert not A[rank:].any() and not B[:, rank:].any() and A[:rank].any(1).all()


def test_which_servers_take_it(tmp_path):
    base = {"target_modules": TARGETS["llama"], "task_type": None}
    model = pruned("llama", **base)
    ragged, uniform = to_lora(model), to_lora(model, uniform=True)
    uniform.save_pretrained(tmp_path)
    for adapter in (uniform, tmp_path):
        assert servable(adapter) == {
            "vllm": [], "sglang": [], "tgi": [], "llama.cpp": [], "diffusers<0.42": []
        }  # fmt: skip
    answers = servable(ragged)
    assert answers["vllm"] == []
    assert all("uniform=True" in reasons[0] for server, reasons in answers.items() if server != "vllm")
    bounded = servable(uniform, max_lora_rank=3)
    assert bounded["vllm"] == ["rank 4 is above max_lora_rank 3"] and bounded["llama.cpp"] == []
    with_head = servable(to_lora(pruned("llama")))
    assert all("modules_to_save" in reasons[0] for reasons in with_head.values())


SERVER_RULES = {
    "scale": ({"lora_alpha": 8}, "scale of its own"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "dora": ({"use_dora": True}, "use_dora"),
    "kind": ({"peft_type": "ADALORA"}, "to_lora"),
}


@pytest.mark.parametrize("rule", SERVER_RULES)
def test_what_servers_refuse(rule, tmp_path):
    changes, said = SERVER_RULES[rule]
    to_lora(pruned("llama", task_type=None)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert said in servable(tmp_path)["vllm"][0]


def test_the_model_card_names_the_ranks(tmp_path):
    model = checkpoints().finished
    lora = to_lora(model)
    for _ in range(2):  # saving again does not say it twice
        lora.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card
    assert card.count("AdaLoRA adapter") == 1
    for name, rank in checkpoints().ranks.items():
        assert card.count(f"| `{name}` | {rank} |") == 1


# -- what is dropped ---------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["in memory", "loaded", "compacted"])
def test_a_finished_run_keeps_its_ranks(state):
    saved = checkpoints()
    model = copy.deepcopy(saved.finished)
    if state == "loaded":
        model = new()
        model.load_adapter(saved.end, "default")
    elif state == "compacted":
        compact(model)
    with no_warning():
        lora = to_lora(model)
    assert ranks_of(lora) == {name: rank for name, rank in saved.ranks.items() if rank}
    assert lora.adalora_ranks == saved.ranks
    assert off(logits(lora), saved.end_logits) <= 1e-5  # cut-down products sum in another order


def test_masked_triplets_that_an_optimizer_step_brought_back_are_dropped():
    model = copy.deepcopy(checkpoints().finished)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_E["default"] += 1.0
    assert ranks_of(to_lora(model)) == {name: rank for name, rank in checkpoints().ranks.items() if rank}


def test_from_before_the_final_mask_warns_with_the_ranks():
    model = new()
    train(model, adamw(model), 0, 9)
    with pytest.warns(UserWarning, match=r"left of a final budget of 26 \(ranks \d to 4\).*finalize\(\)"):
        lora = to_lora(model)
    assert off(logits(lora), logits(model)) <= 1e-6


def test_the_model_stays_as_it_is():
    model = pruned("bert")
    model.base_model.model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
    weights, names = trained_weights(model), dict(model.named_parameters())
    trainable = {name: p.requires_grad for name, p in names.items()}
    expected, config = logits(model), copy.deepcopy(model.peft_config["default"])
    lora = to_lora(model.train())
    assert lora.training
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    lora(input_ids=torch.ones(2, 3).long(), labels=torch.zeros(2).long()).loss.backward()
    optimizer.step()
    assert dict(model.named_parameters()) == names
    assert {name: p.requires_grad for name, p in names.items()} == trainable
    assert all(torch.equal(p, weights[n]) for n, p in trained_weights(model).items())
    assert torch.equal(logits(model), expected) and model.peft_config["default"] == config
    shared = {p.data_ptr() for p in lora.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert len(shared) > 20  # the base is there once


def test_a_plain_peft_run():
    """PEFT's own training and pattern."""
    model = adapted("bert", total_step=END, tinit=2, tfinal=4)
    steps(model, adamw(model), 0, END)
    pattern = copy.deepcopy(model.peft_config["default"].rank_pattern)
    lora = to_lora(model)
    assert model.peft_config["default"].rank_pattern == pattern
    assert off(logits(lora), logits(model)) <= 1e-6
    kept = {name.partition(".lora_E")[0]: sum(mask) for name, mask in pattern.items()}
    assert ranks_of(lora) == {name: rank for name, rank in kept.items() if rank}


# -- other models ------------------------------------------------------------------------------


def test_another_adapter_by_name():
    model = pruned("bert")
    second = AdaLoraConfig(
        task_type="SEQ_CLS", inference_mode=True, init_r=3, target_r=3, total_step=9, target_modules=["query"]
    )
    model.add_adapter("second", second)
    awake(model, "second")
    lora = to_lora(model, adapter_name="second")
    assert set(ranks_of(lora).values()) == {3}
    model.base_model.set_adapter("second", inference_mode=True)
    assert off(logits(lora), logits(model)) <= 1e-6


@pytest.mark.parametrize("uniform", [False, True])
def test_a_model_without_peft(uniform):
    model = make_model()
    allocator = RankAllocator(model, total_step=9, target_total_rank=8)
    with torch.no_grad():
        model[0].lora_E[1] = 0.0
        model[2].lora_E.zero_()
    x = torch.randn(5, 6, dtype=torch.float64)
    lora = to_lora(model, uniform=uniform)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-12, atol=1e-12)
    assert model.rankallocator is allocator and isinstance(model[0], AdaLoraLinear)
    kinds = {name: type(m) for name, m in lora.base_model.model.named_children() if name in "024"}
    assert all(kind is not AdaLoraLinear for kind in kinds.values())
    if not uniform:
        assert ranks_of(lora) == {"0": 3, "4": 5} and kinds["2"] is nn.Linear


@pytest.mark.parametrize("ranks", [{"0": 2, "1.0": 4}, {"0": 0, "1.0": 3}, {"0": 4, "1.0": 0}])
def test_a_name_that_another_name_ends_with(ranks, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=r"0|1\.0", exclude_modules=["nothing"]
    )
    model = awake(get_peft_model(copy.deepcopy(base), config)).eval()
    for name, rank in ranks.items():
        with torch.no_grad():
            model.base_model.model.get_submodule(name).lora_E["default"][rank:] = 0.0
    lora = to_lora(model)
    assert ranks_of(lora) == {name: rank for name, rank in ranks.items() if rank}
    lora.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    assert off(PeftModel.from_pretrained(base, tmp_path)(x), model(x)) <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "key", "value"], "exclude_modules": ["key"]},
        {"target_modules": r".*\.(query|key|value)", "exclude_modules": r".*\.key"},
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
        {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [1, 7]}},
        {"target_modules": ["query"], "lora_dropout": 0.5},
        {"target_modules": ["query", "value"], "use_rslora": True, "alpha_pattern": {"query": 3}},
    ],
)
def test_settings_go_along(settings, tmp_path):
    model = pruned("bert", **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    layers = adapter_layers(model.base_model.model)
    lora = to_lora(model)
    assert ranks_of(lora) == {n: len(kept_of(i)) for i, n in enumerate(layers) if kept_of(i)}
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert ranks_of(loaded) == ranks_of(lora) and off(logits(loaded), logits(model)) <= 1e-6
    assert loaded.peft_config["default"].lora_dropout == settings.get("lora_dropout", 0.0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias, tmp_path):
    model = pruned("bert", bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.5)
    with one_line(ValueError, f"bias is '{bias}'", "uniform=True"):
        to_lora(model)
    to_lora(model, uniform=True).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert off(logits(loaded.double()), logits(model.double())) <= 1e-6
    assert any("bias" in reason for reason in servable(tmp_path)["vllm"])


def test_refusals():
    lora = get_peft_model(bert(), LoraConfig(r=4, target_modules=["query"]))
    with one_line(TypeError, "LoraModel", "save_pretrained"):
        to_lora(lora)
    with one_line(TypeError, "BertForSequenceClassification", "AdaLoraLinear"):
        to_lora(bert())
    model = pruned("bert")
    with one_line(ValueError, "'other'", "default"):
        to_lora(model, adapter_name="other")
    model.merge_adapter()
    with one_line(ValueError, "merged", "unmerge_adapter()"):
        to_lora(model)
    with one_line(ValueError, "λ", "train it first"):
        to_lora(fuse(adapted("bert")))
    broken = pruned("bert")
    with torch.no_grad():
        next(iter(adapter_layers(broken).values())).lora_B["default"][0, 0] = float("nan")
    with one_line(ValueError, "query.lora_B", "NaN"):
        to_lora(broken)
