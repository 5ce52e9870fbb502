"""``to_lora``: every setting is carried, folded in or refused, and the source stays as it is, bit for bit."""

import warnings
from collections import Counter
from dataclasses import fields

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_fast import fuse, to_lora
from adalora_fast.integrations import lora_settings
from adalora_fast.integrations.export import export_folder
from adalora_fast.integrations.layers import adapter_layers
from adalora_fast.integrations.lora_settings import CARRIED, FOLDED, OVER, REFUSED
from tests.helpers.models import awake
from tests.helpers.peft_models import one_line
from tests.integrations.exporting import off, prune, pruned, ranks_of

IDS = torch.arange(3, 17).view(2, 7)


def causal(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def answers(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@torch.no_grad()
def trained(base: nn.Module, **settings) -> PeftModel:
    """A fused model as after its training; what is trained beside the factors has changed too."""
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied weights
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, lora_alpha=8, **settings)
        model = fuse(prune(awake(get_peft_model(base, config)))).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def memory(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the model, base included, tied ones under each of their names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = memory(model)
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == []


# -- the table -----------------------------------------------------------------------------------


def test_the_table_decides_about_every_field_of_pefts_configuration():
    """A field that PEFT adds, or drops, has to be decided on: see `lora_settings`."""
    decided = Counter([*CARRIED, *FOLDED, *OVER, *REFUSED])
    assert set(decided) == {field.name for field in fields(AdaLoraConfig)}
    assert set(decided.values()) == {1}
    assert set(CARRIED) <= {field.name for field in fields(LoraConfig)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_in_adalora_is_refused_by_name(name):
    model = pruned("llama")
    setattr(model.peft_config["default"], name, {"some": "value"})
    with one_line(ValueError, name, "some", "set it to None"):
        to_lora(model)


def test_a_setting_that_nobody_decided_on_is_refused_if_it_is_set(monkeypatch):
    monkeypatch.setattr(lora_settings, "OVER", tuple(name for name in OVER if name != "beta1"))
    model = pruned("llama")
    to_lora(model)  # the default has no meaning of its own
    model.peft_config["default"].beta1 = 0.7
    with one_line(ValueError, "beta1 is 0.7", "default"):
        to_lora(model)


def test_an_alpha_of_zero_is_the_initial_rank_as_in_peft(tmp_path):
    model = pruned("llama", lora_alpha=0)
    model.save_pretrained(tmp_path / "ada")
    to_lora(model).save_pretrained(tmp_path / "lora")
    plain = export_folder(tmp_path / "ada", tmp_path / "files")
    name = next(iter(plain.tensors))
    lora = to_lora(model)
    stored = lora.state_dict()
    for key, tensor in plain.tensors.items():
        if ".lora_" in key:
            torch.testing.assert_close(stored[key.replace(".weight", ".default.weight")], tensor, msg=name)


# -- whole models: the same outputs everywhere, the source as it was -----------------------------

CASES = {
    "layer_replication": (False, {"layer_replication": [[0, 2], [0, 2]]}),
    "layer_replication, a layer without adapter": (False, {"layer_replication": [[0, 1], [0, 2], [1, 2]]}),
    "tied, modules_to_save": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, trainable_token_indices": (
        True,
        {"trainable_token_indices": {"embed_tokens": [1, 5]}, "ensure_weight_tying": True},
    ),
    "not tied, modules_to_save": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, the head adapted": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "exclude_modules": (False, {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "layers_to_transform": (False, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "use_rslora, alpha_pattern": (False, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
}


@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_the_same_outputs_everywhere_and_the_source_unchanged(case, uniform, tmp_path):
    tied, settings = CASES[case]
    model = trained(causal(tied), **settings)
    before, expected = memory(model), answers(model)
    with model.disable_adapter():
        assert off(answers(model), expected) > 0.05  # the adapter matters
    lora = to_lora(model, uniform=uniform)
    adapted = adapter_layers(model.base_model.model)
    wanted = {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in adapted.items()}
    assert uniform or ranks_of(lora) == {name: rank for name, rank in wanted.items() if rank}
    assert not uniform or set(ranks_of(lora)) == set(wanted)
    assert off(answers(lora), expected) <= 1e-5
    lora.save_pretrained(tmp_path / "lora")
    model.save_pretrained(tmp_path / "ada")
    export_folder(tmp_path / "ada", tmp_path / "files", uniform=uniform)
    for name in ("ada", "lora", "files"):
        loaded = PeftModel.from_pretrained(causal(tied), tmp_path / name)
        assert off(answers(loaded), expected) <= 1e-5, name
    merged = lora.merge_and_unload()
    assert off(answers(merged), expected) <= 1e-5
    assert_unchanged(model, before)
    assert off(answers(model), expected) == 0
    if "layer_replication" not in case:  # transformers saves no model with replicated layers
        merged.save_pretrained(tmp_path / "merged")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert off(answers(again), expected) <= 1e-5


@pytest.mark.parametrize("way", ["merge_adapter", "base_model", "twice"])
def test_no_way_of_merging_changes_the_source(way):
    model = trained(causal())
    before, expected = memory(model), answers(model)
    lora = to_lora(model)
    if way == "base_model":
        lora.base_model.merge_adapter()
    elif way == "twice":
        for _ in range(2):
            lora.merge_adapter()
            lora.unmerge_adapter()
    else:
        lora.merge_adapter()
    assert off(answers(lora), expected) <= 1e-5
    assert_unchanged(model, before)


def test_training_the_result_leaves_the_biases_and_statistics_of_the_source():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["0", "2"], bias="all")
    model = fuse(awake(get_peft_model(base, config)))
    before = memory(model)
    lora = to_lora(model).train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    lora(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    assert_unchanged(model, before)


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("mlp", "mlp+"), ("h0", "h[0]"), ("up", "up(")])
def test_names_that_are_expressions(names, tmp_path):
    """Rank patterns are expressions; here the name of the second layer, whose rank is in the pattern, finds
    another layer or is no expression at all.
    """

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})

        def forward(self, x):
            for layer in self.layers.values():
                x = layer(x).tanh()
            return x

    torch.manual_seed(0)
    plain = Named()
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=list(names))
    model = fuse(prune(awake(get_peft_model(plain, config)))).eval()
    x = torch.randn(3, 6)
    lora = to_lora(model)
    assert sorted(ranks_of(lora).values()) == [1, 2]
    lora.save_pretrained(tmp_path)
    fresh = Named()
    fresh.load_state_dict(state)
    assert off(PeftModel.from_pretrained(fresh, tmp_path).eval()(x), model(x)) <= 1e-6


def test_a_tensor_that_has_no_place_in_the_new_model_is_named(monkeypatch):
    model = trained(causal(tied=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    before = memory(model)
    monkeypatch.setattr(
        lora_settings, "CARRIED", tuple(name for name in CARRIED if name != "ensure_weight_tying")
    )
    monkeypatch.setattr(lora_settings, "OVER", (*OVER, "ensure_weight_tying"))
    with one_line(ValueError, "lm_head.weight", "no place"):
        to_lora(model)
    assert_unchanged(model, before)
