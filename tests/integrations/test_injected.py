"""``fuse`` after ``add_adapter`` and ``inject_adapter_in_model``: training, refusals, copies, export."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.adalora.layer import SVDLinear
from torch import nn
from transformers import BertForSequenceClassification

from adalora_fast import RankAllocator, compact, fuse, import_official, orthogonality_loss, to_lora
from adalora_fast.integrations.layers import FusedLayer, adapter_layers
from adalora_fast.integrations.locate import peft_models, tuners
from tests.helpers.injecting import (
    END,
    LAYERS,
    MAKERS,
    added,
    config,
    finished_run,
    injected,
    kept_triplets,
    logits,
    run_steps,
    twin,
)
from tests.helpers.models import awake, batch, bert, trainable
from tests.helpers.peft_models import one_line, same_state, same_weights


def names_like_the_twin(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def finished():
    return finished_run()


# -- fusing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", MAKERS)
def test_fusing_changes_nothing_that_others_see(maker):
    model = MAKERS[maker]()
    before, state = copy.deepcopy(model), model.state_dict()
    optimizer, expected = torch.optim.AdamW(trainable(model)), logits(model)
    assert fuse(model) is model
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert [id(p) for p in trainable(model)] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert isinstance(model, BertForSequenceClassification)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert all(isinstance(layer, FusedLayer) for layer in adapter_layers(model).values())
    assert len(adapter_layers(model)) == LAYERS
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_run_is_that_of_a_peft_model(maker):
    # The same weights, data and schedule: losses with γ · R in them, masks and final weights are equal.
    model, peft_model = fuse(MAKERS[maker]()), fuse(twin())
    for step in (0, 5):
        one, other = model.train()(**batch(step)).loss, peft_model.train()(**batch(step)).loss
        assert torch.equal(one, other)
        assert one > model.eval()(**batch(step)).loss + 0.1  # γ · R counts in training only
    run_steps(model, model.rankallocator)
    run_steps(peft_model, peft_model.base_model.rankallocator)
    mine, theirs = names_like_the_twin(model), dict(peft_model.named_parameters())
    assert mine and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert model.rankallocator.rank_pattern() == peft_model.base_model.rankallocator.rank_pattern()
    assert kept_triplets(model) == 2 * LAYERS


def test_every_way_to_step_the_allocator():
    by_hand, attached, in_pefts_way = fuse(added()), fuse(added()), fuse(added())
    run_steps(by_hand, by_hand.rankallocator)
    optimizer = torch.optim.AdamW(trainable(attached), lr=2e-2)
    attached.rankallocator.attach(optimizer)
    other = torch.optim.AdamW(trainable(in_pefts_way), lr=2e-2)
    for step in range(END):
        for model, each in ((attached, optimizer), (in_pefts_way, other)):
            model.train()(**batch(step % 8)).loss.backward()
            each.step()
            if model is in_pefts_way:
                model.update_and_allocate(step)
            each.zero_grad()
    assert same_weights(by_hand, attached) and same_weights(by_hand, in_pefts_way)


def test_without_a_loss_of_the_models_own_nothing_is_added_to_it():
    model = fuse(added())
    inputs = {name: value for name, value in batch(0).items() if name != "labels"}
    assert model.train()(**inputs).loss is None


def test_the_forgotten_allocator_is_noticed():
    model = fuse(added())
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    with pytest.warns(UserWarning, match="no allocator step"):
        for step in range(102):
            model.train()(**batch(step % 8)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_the_settings_of_fuse_reach_the_allocator_and_the_penalty():
    model = fuse(
        added(), "fisher", smoothing="ema", score_gradient="task", orth_penalty="squared", precision="highest"
    )
    allocator, tuner = model.rankallocator, model.adalora.base_model
    assert allocator.score.name == "fisher" and allocator.smoothing == "ema"
    assert allocator.score_gradient == "task"
    assert torch.equal(tuner.orthogonality_loss(), orthogonality_loss(model, "squared"))
    assert {layer.precision for layer in adapter_layers(model).values()} == {"highest"}
    assert tuners(model) == [tuner] and peft_models(model) == {"": model.adalora}


def test_scales_are_honoured_and_the_outputs_stay():
    model = added(alpha_pattern={"query": 32.0}, use_rslora=True)
    awake(model)
    expected = logits(model)
    fuse(model)
    torch.testing.assert_close(logits(model), expected)
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.scaling["default"] == pytest.approx(32.0 * (4 + 1e-5) / 2)


def test_an_adapter_in_inference_mode():
    model = fuse(added(inference_mode=True))
    assert model.rankallocator is None
    assert model.train()(**batch(0)).loss.isfinite()
    with one_line(ValueError, "is_trainable=True"):
        model.update_and_allocate(0)


def test_mode_and_active_adapters_are_the_models():
    model = fuse(added())
    tuner = model.adalora.base_model
    assert model.train() is model and tuner.training
    model.eval()
    assert not tuner.training and not model.adalora.base_model.training
    assert tuner.active_adapters == ["default"]
    model.adalora.train()
    assert model.training and adapter_layers(model)["bert.encoder.layer.0.attention.self.query"].training


def test_adapters_are_found_below_compile_and_data_parallel_wrappers():
    model = fuse(added())
    assert peft_models(nn.DataParallel(torch.compile(model, backend="eager"))) == {"": model.adalora}
    unfused = added()
    assert fuse(torch.compile(unfused, backend="eager")) is not unfused
    assert unfused.rankallocator.t == 0


def test_a_compiled_model_trains_as_an_eager_one():
    torch.compiler.reset()
    compiled, eager = fuse(added()), fuse(added())
    run_steps(torch.compile(compiled, backend="eager"), compiled.rankallocator, stop=4)
    run_steps(eager, eager.rankallocator, stop=4)
    for one, other in zip(trainable(compiled), trainable(eager), strict=True):
        torch.testing.assert_close(one, other)


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"score": "fischer"}, {"orth_penalty": "frobenius"}])
def test_a_refused_option_changes_nothing(options):
    model = added()
    with one_line(ValueError, next(iter(options.values()))):
        fuse(model, **options)
    assert type(model) is BertForSequenceClassification
    assert not {"adalora", "rankallocator"} & model.__dict__.keys() and not model._forward_hooks
    assert all(type(layer) is SVDLinear for layer in adapter_layers(model).values())


def test_a_target_that_is_not_below_the_initial_rank():
    model = injected(init_r=2, target_r=2)
    with one_line(ValueError, "target_r < init_r"):
        fuse(model)
    assert all(type(layer) is SVDLinear for layer in adapter_layers(model).values())


def test_fused_twice():
    model = fuse(added())
    for again in (model, model.adalora):
        with one_line(ValueError, "fused already"):
            fuse(again)


def test_adapters_of_another_kind_beside():
    model = added()
    model.peft_config["style"] = LoraConfig(r=2, target_modules=["query"])
    with one_line(TypeError, "style", "LoraConfig", "delete_adapter('style')"):
        fuse(model)


def test_a_part_of_an_adapted_model():
    with one_line(TypeError, "BertEncoder", "configuration", "add_adapter"):
        fuse(added().bert.encoder)


def test_an_allocator_made_by_hand():
    schedule = {"total_step": END, "target_r": 2, "tinit": 2, "tfinal": 4}
    for call in (lambda model: RankAllocator(model, **schedule), orthogonality_loss):
        with one_line(ValueError, "BertForSequenceClassification", "fuse(model)"):
            call(added())
    model, other = fuse(added()), fuse(added())
    allocator = RankAllocator(model, score="fisher", **schedule)  # takes the place of the one from fuse
    assert model.rankallocator is allocator is model.adalora.base_model.rankallocator
    assert allocator.layer_names == other.rankallocator.layer_names
    run_steps(model, allocator)
    assert kept_triplets(model) == 2 * LAYERS


def test_a_model_of_diffusers_shape():
    # Its mixin keeps no more of an adapter than the layers, `peft_config` and a flag.
    class Unet(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out = nn.Linear(8, 8), nn.Linear(8, 8)

        def add_adapter(self, adapter_config, adapter_name="default"):
            inject_adapter_in_model(adapter_config, self, adapter_name)
            self._hf_peft_config_loaded = True

        def forward(self, x):
            return self.to_out(self.to_q(x).tanh())

    model = Unet()
    model.add_adapter(config(target_modules=["to_q", "to_out"]))
    fuse(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    model.rankallocator.attach(optimizer)
    for step in range(END):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(model.rankallocator.ranks().values()) == 4 and model.rankallocator.is_over
    x = torch.randn(3, 8)
    torch.testing.assert_close(to_lora(model).eval()(x), model.eval()(x))


def test_compact_and_import_official_take_the_model_itself(finished):
    model = copy.deepcopy(finished)
    expected, ranks = logits(model), model.rankallocator.ranks()
    assert compact(model) == ranks
    assert sum(layer.lora_E["default"].numel() for layer in adapter_layers(model).values()) == 2 * LAYERS
    torch.testing.assert_close(logits(model), expected)
    source = {
        name.replace(".default", ""): value
        for name, value in awake(added()).state_dict().items()
        if ".lora_" in name
    }
    target = fuse(added())
    import_official(source, target)
    torch.testing.assert_close(logits(target), logits(awake(added())))


# -- copies and export -------------------------------------------------------------------------


def test_copies_are_fused_models_of_their_own():
    model = fuse(added())
    run_steps(model, model.rankallocator, stop=6)
    for twin_model in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin_model) is type(model)
        assert twin_model.rankallocator is not model.rankallocator
        assert twin_model.adalora.base_model.model is twin_model
        assert same_state(twin_model.rankallocator.state_dict(), model.rankallocator.state_dict())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run_steps(twin_model, twin_model.rankallocator, 6, END)
        assert sum(twin_model.rankallocator.ranks().values()) == 2 * LAYERS
        assert model.rankallocator.t == 6
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_merging_through_the_handle(finished, tmp_path):
    model = copy.deepcopy(finished)
    merged = model.adalora.merge_and_unload()
    assert merged is model and type(merged) is BertForSequenceClassification
    assert not adapter_layers(merged) and not merged._forward_hooks and peft_models(merged) == {}
    torch.testing.assert_close(logits(merged), logits(finished), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(merged))


@pytest.mark.parametrize("fused", [True, False])
def test_to_lora(fused, finished, tmp_path):
    model = copy.deepcopy(finished) if fused else awake(added())
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    plain = to_lora(model)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    base = plain.get_base_model()
    assert type(base) is BertForSequenceClassification and not base._forward_hooks
    assert not {"adalora", "rankallocator"} & base.__dict__.keys()
    assert not adapter_layers(base) and not getattr(base, "_hf_peft_config_loaded", False)
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bert(), tmp_path)), expected, rtol=1e-4, atol=1e-5
    )
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["query", "self", "layer", "a"])
def test_names_that_transformers_could_not_save(name):
    """It would leave tensors out of the files, or write no file at all."""
    model = fuse(added())
    with one_line(ValueError, repr(name), "choose another name"):
        model.add_adapter(config(inference_mode=True), name)
    assert list(model.peft_config) == ["default"]
    named = bert()
    named.add_adapter(config(), name)
    with one_line(ValueError, repr(name), "choose another name"):
        fuse(named)
    assert not hasattr(named, "adalora")
