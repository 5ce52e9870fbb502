"""``compact``: the pruned triplets are gone, and the training goes on as if they were still there."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from adalora_fast import compact, fuse
from adalora_fast.allocator.state import read_state
from adalora_fast.integrations.layers import adapter_layers, factors_of
from tests.helpers.checkpoints import loaded_by_peft, stored
from tests.helpers.models import adapted, batch, trainable, trained_weights
from tests.helpers.peft_models import logits, no_warning, one_line, same_state
from tests.helpers.small_model import backward, layers_of, make_allocator, make_model, make_optimizer
from tests.integrations.exporting import Convolutions

FINAL, CUT, END = 14, 17, 26  # the final mask, the compaction, the last step
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
}
EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums of fewer zeros in another order


def fused(family: str = "bert", **config):
    model = fuse(adapted(family, **{"total_step": END, "tinit": 2, "tfinal": END - FINAL, **config}).double())
    model.base_model.rankallocator.reset()
    return model


def run(model, optimizer, start, stop):
    model.train()
    for step in range(start, stop):
        model(**batch(step % 8)).loss.backward()
        for parameter in idle(model):
            parameter.grad = None  # so that one layer ends with rank 0
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def idle(model):
    module = getattr(getattr(model.base_model.model, "bert", None), "pooler", None)
    return [] if module is None else list(module.dense.parameters())


def ready(make=OPTIMIZERS["AdamW"], family="bert"):
    """Model and optimizer at :data:`CUT`; the same arguments give the same ones."""
    model = fused(family, orth_reg_weight=0.0)
    optimizer = make(trainable(model))
    run(model, optimizer, 0, CUT)
    return model, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_training_goes_on_as_masked_training(kind):
    (masked, first), (cut, second) = (ready(OPTIMIZERS[kind]) for _ in range(2))
    ranks = masked.base_model.rankallocator.ranks()
    with no_warning():
        assert compact(cut, second) == ranks
    assert 0 in ranks.values() and sum(ranks.values()) == 26
    run(masked, first, CUT, END)
    with no_warning():
        run(cut, second, CUT, END)
    torch.testing.assert_close(logits(cut), logits(masked), **EXACT)
    pattern = masked.base_model.rankallocator.rank_pattern()
    layers = adapter_layers(cut.base_model.model)
    for name, layer in adapter_layers(masked.base_model.model).items():
        whole, small = factors_of(layer, "default"), factors_of(layers[name], "default")
        kept = torch.tensor(pattern[name])
        for old, new, slices in zip(whole, small, ((kept,), (kept,), (slice(None), kept)), strict=True):
            assert type(new) is nn.Parameter and new.requires_grad
            torch.testing.assert_close(new, old[slices], **EXACT)
    assert cut.base_model.rankallocator.t == END and cut.base_model.rankallocator.ranks() == ranks


def test_conv1d_and_the_optimizer_state():
    cut, second = ready(family="gpt2")
    held = sum(v.numel() for s in second.state.values() for v in s.values())
    groups = [len(group["params"]) for group in second.param_groups]
    compact(cut, second)
    parameters = trainable(cut)
    assert {id(p) for group in second.param_groups for p in group["params"]} == {id(p) for p in parameters}
    assert [len(group["params"]) for group in second.param_groups] == groups
    assert set(map(id, second.state)) <= {id(p) for p in parameters}
    for parameter, state in second.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
    assert sum(v.numel() for s in second.state.values() for v in s.values()) < held
    second.load_state_dict(copy.deepcopy(second.state_dict()))
    run(cut, second, CUT, END)


def test_gradients_that_are_there_are_cut_too():
    (masked, _), (cut, second) = ready(), ready()
    for model in (masked, cut):
        model(**batch(3)).loss.backward()
    compact(cut, second)
    pattern = masked.base_model.rankallocator.rank_pattern()
    layers = adapter_layers(cut.base_model.model)
    for name, layer in adapter_layers(masked.base_model.model).items():
        grad, kept = layer.lora_B["default"].grad, torch.tensor(pattern[name])
        torch.testing.assert_close(layers[name].lora_B["default"].grad, grad[:, kept], **EXACT)


def test_a_layer_of_rank_0_is_its_base_layer():
    cut, second = ready()
    ranks = compact(cut, second)
    layer = cut.base_model.model.get_submodule(next(name for name, rank in ranks.items() if rank == 0))
    calls = []
    layer.base_layer.forward = lambda x: calls.append(x) or x
    layer.lora_dropout["default"] = None  # whoever touches the adapter fails
    x = torch.ones(2, 16, dtype=torch.float64)
    assert layer(x) is x and calls == [x]


def test_checkpoints_after_it(tmp_path):
    cut, second = ready()
    pattern = cut.base_model.rankallocator.rank_pattern()
    compact(cut, second)
    expected = logits(cut)
    cut.save_pretrained(tmp_path)
    assert read_state(tmp_path)["config"]["t"] == CUT
    sizes = {name: len(t) for name, t in stored(tmp_path).items() if name.endswith("lora_E")}
    assert sizes == {f"base_model.model.{name}.lora_E": sum(kept) for name, kept in pattern.items()}
    torch.testing.assert_close(logits(loaded_by_peft(tmp_path).double()), expected, rtol=1e-5, atol=1e-6)
    again = fused()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)
    assert again.base_model.rankallocator.ranks() == {name: sum(kept) for name, kept in pattern.items()}


def test_twice_is_once():
    cut, second = ready()
    ranks = compact(cut, second)
    expected, pattern = logits(cut), cut.peft_config["default"].rank_pattern
    assert compact(cut, second) == ranks and torch.equal(logits(cut), expected)
    assert cut.peft_config["default"].rank_pattern is pattern


def test_layers_without_a_fused_form():
    torch.manual_seed(0)
    targets = ["first", "second", "last"]
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=3, total_step=9, target_modules=targets)
    model = fuse(get_peft_model(Convolutions(), config))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    x = torch.randn(2, 3, 6, 7)
    for step in range(8):
        if step == 7:
            expected = model(x)
            assert sum(compact(model, optimizer).values()) == 6
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        model(x).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("attached", [False, True])
def test_without_peft(attached):
    models = []
    for cut_at in (None, 10):
        model = make_model()
        optimizer, allocator = make_optimizer(model), make_allocator(model)
        if attached:
            allocator.attach(optimizer)
        for t in range(12):
            if t == cut_at:
                ranks = compact(model, optimizer)
                assert sum(ranks.values()) == 5 and len(ranks) == 3
                scales = [layer.scaling for layer in layers_of(model)]
                assert scales == [16 / (r + 1e-5) for r in (4, 3, 5)]
                assert [layer.r for layer in layers_of(model)] == list(ranks.values())
            backward(model, t, gamma=0.0)
            optimizer.step()
            if not attached:
                allocator.step()
            optimizer.zero_grad()
        models.append(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(models[1](x), models[0](x), **EXACT)


# -- what is refused, with nothing changed -------------------------------------------------------


def refuse(kind, pieces, model, optimizer=None):
    weights, objects, expected = trained_weights(model), list(model.parameters()), logits(model)
    state = model.base_model.rankallocator.state_dict()
    with one_line(kind, *pieces):
        compact(model, optimizer)
    now = trained_weights(model)
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert all(old is new for old, new in zip(objects, model.parameters(), strict=True))
    assert torch.equal(logits(model), expected)
    assert same_state(model.base_model.rankallocator.state_dict(), state)
    assert model.peft_config["default"].rank_pattern is None


def test_before_the_final_mask():
    model = fused()
    optimizer = OPTIMIZERS["SGD"](trainable(model))
    run(model, optimizer, 0, 5)
    refuse(ValueError, ("final mask", "step 5", FINAL, "finalize()"), model, optimizer)


class EightBit(torch.optim.SGD):
    """Keeps a quantised moment, and its scales by block."""


class Factored(torch.optim.SGD):
    """Keeps the mean square of each row."""


@pytest.mark.parametrize(
    ("kind", "state", "said"),
    [
        (EightBit, lambda p: {"state1": torch.zeros(p.shape, dtype=torch.uint8)}, "state1"),
        (EightBit, lambda p: {"absmax1": torch.zeros(7)}, "absmax1 (7,)"),
        (Factored, lambda p: {"exp_avg_sq_row": p.new_zeros(p.shape[0], 5)}, "exp_avg_sq_row"),
        (Factored, lambda p: {"history": [p.clone()]}, "history list"),
    ],
)
def test_state_that_cannot_be_cut(kind, state, said):
    model = fused()
    optimizer = OPTIMIZERS["SGD"](trainable(model))
    run(model, optimizer, 0, CUT)
    other = kind(trainable(model), lr=1e-2)
    last = next(iter(reversed(adapter_layers(model).values()))).lora_B["default"]
    other.state[last] = {"step": 3, **state(last)}
    refuse(ValueError, (kind.__name__, said, "AdamW or SGD"), model, other)


def test_the_wrong_optimizer():
    model = fused()
    optimizer = OPTIMIZERS["SGD"](trainable(model))
    model.base_model.rankallocator.attach(optimizer, automatic=False)
    run(model, optimizer, 0, CUT)
    refuse(ValueError, ("attached", "compact(model, optimizer)"), model)
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    refuse(ValueError, ("SGD", "holds none"), model, foreign)
    compact(model, optimizer)
    run(model, optimizer, CUT, END)  # still attached


def test_parameters_with_hooks():
    model = fused()
    optimizer = OPTIMIZERS["SGD"](trainable(model))
    run(model, optimizer, 0, CUT)
    parameter = next(iter(adapter_layers(model).values())).lora_A["default"]
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    refuse(ValueError, ("query.lora_A", "hooks"), model, optimizer)


def test_other_models():
    with one_line(TypeError, "fuse(model)"):
        compact(adapted("bert"))
    with one_line(TypeError, "Linear", "RankAllocator"):
        compact(nn.Linear(2, 2))
    with one_line(TypeError, "DataParallel", "wrappers"):
        compact(nn.DataParallel(fused()))
