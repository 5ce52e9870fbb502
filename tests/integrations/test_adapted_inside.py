"""PeftModels and adapted models inside other modules: ``fuse`` finds them, each keeps an allocator."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora_fast import compact, fuse, to_lora
from adalora_fast.integrations.fused import is_fused
from adalora_fast.integrations.locate import peft_models
from tests.helpers.injecting import END, Towers, Wrapped, added, injected, logits, run_steps
from tests.helpers.models import adapted, awake, bert, trainable
from tests.helpers.peft_models import logits as peft_logits
from tests.helpers.peft_models import one_line


@pytest.mark.parametrize(
    "make", [lambda: adapted("bert", total_step=END, tinit=2, tfinal=4), added, injected]
)
def test_the_one_inside_is_found(make):
    whole = Wrapped(make())
    state = whole.state_dict()
    assert fuse(whole, "fisher") is whole
    assert type(whole) is Wrapped and list(whole.state_dict()) == list(state)
    ((name, found),) = peft_models(whole).items()
    assert name == "pretrained_model" and is_fused(found)
    allocator = found.base_model.rankallocator
    assert allocator.score.name == "fisher"
    run_steps(whole, allocator)
    assert sum(allocator.ranks().values()) == 2 * 13


def test_to_lora_and_compact_take_the_whole():
    whole = fuse(Wrapped(added()))
    allocator = whole.pretrained_model.rankallocator
    run_steps(whole, allocator)
    allocator.finalize()
    expected = logits(whole.pretrained_model)
    torch.testing.assert_close(logits(to_lora(whole)), expected, rtol=1e-4, atol=1e-5)
    assert compact(whole) == allocator.ranks()
    torch.testing.assert_close(logits(whole.pretrained_model), expected)


def test_two_towers_are_fused_both_and_keep_budgets_of_their_own():
    model = fuse(Towers())
    first, second = (tower.base_model.rankallocator for tower in model.towers.values())
    assert list(peft_models(model)) == ["towers.a", "towers.b"] and first is not second
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    for allocator in (first, second):
        allocator.set_schedule(tinit=2, tfinal=4, deltaT=1, total_step=END)
        allocator.attach(optimizer)
    run_steps(model, _Nothing(), optimizer=optimizer)
    assert first.t == second.t == END
    assert sum(first.ranks().values()) == sum(second.ranks().values()) == 2 * 13
    assert first.rank_pattern() != second.rank_pattern()


class _Nothing:
    def step(self, t):
        """The attached allocators step by themselves."""


def test_a_tower_used_twice_is_one():
    shared = adapted("bert")
    model = fuse(nn.ModuleDict({"query": shared, "passage": shared}))
    assert list(peft_models(model)) == ["query"]


def test_what_is_fused_already_stays():
    model = Towers()
    fuse(model.towers["a"], "gsnr")
    kept = model.towers["a"].base_model.rankallocator
    fuse(model, "fisher")
    assert model.towers["a"].base_model.rankallocator is kept
    assert model.towers["b"].base_model.rankallocator.score.name == "fisher"
    with one_line(ValueError, "fused already"):
        fuse(model)


def test_all_or_nothing():
    model = Towers(target_r=4)
    with one_line(ValueError, "towers.b", "target_r < init_r"):
        fuse(model)
    assert not any(is_fused(tower) for tower in model.towers.values())
    model.towers["b"].peft_config["default"].target_r = 2
    fuse(model)
    assert all(is_fused(tower) for tower in model.towers.values())


def test_calls_that_take_one_model_name_the_several():
    model = fuse(Towers())
    for call in (to_lora, compact):
        with one_line(
            ValueError, "towers.a", "towers.b", f"{call.__name__}(model.get_submodule('towers.a'))"
        ):
            call(model)
    for tower in model.towers.values():
        awake(tower)
        torch.testing.assert_close(peft_logits(to_lora(tower)), peft_logits(tower), rtol=1e-4, atol=1e-5)


def test_a_tower_loaded_for_inference_is_left_alone():
    model = fuse(Towers(inference_mode=True))
    assert model.towers["b"].base_model.rankallocator is None
    run_steps(model, model.towers["a"].base_model.rankallocator, stop=3)


def test_the_base_of_a_peft_model_without_it():
    # Some code keeps peft_model.get_base_model() and drops the rest, the tuner with it.
    base = fuse(adapted("bert").get_base_model())
    assert base.rankallocator.t == 0 and list(peft_models(Wrapped(base))) == ["pretrained_model"]


def test_other_adapters_only():
    lora = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))
    with one_line(TypeError, "Wrapped", "get_peft_model"):
        fuse(Wrapped(lora))
    assert peft_models(Wrapped(lora)) == {} and peft_models(None) == {}
