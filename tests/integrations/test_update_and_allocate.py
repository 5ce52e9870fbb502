"""PEFT's own entry, ``update_and_allocate``, on fused models, and the RankAllocator tied to an optimizer."""

import warnings

import pytest
import torch

from adalora_fast import AdaLoraLinear, RankAllocator, fuse, orthogonality_loss
from tests.helpers.models import adapted, batch, trainable
from tests.helpers.peft_models import adamw, no_warning, one_line, same_state, steps

SHORT = {"total_step": 20, "tinit": 2, "tfinal": 4}


def ready(model, step: int = 0) -> None:
    """Gradients of one batch."""
    model.train()(**batch(step)).loss.backward()


def messages(caught) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


# -- order -------------------------------------------------------------------------------------


def test_the_right_order_says_nothing():
    model = fuse(adapted("bert", **SHORT))
    with no_warning():
        steps(model, adamw(model), 0, 20)
    ranks = model.base_model.rankallocator.ranks()
    assert sum(ranks.values()) == 2 * len(ranks) and len(set(ranks.values())) > 1


def test_before_the_optimizer_warns_once():
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            ready(model, step)
            model.base_model.update_and_allocate(step)
            optimizer.step()
            optimizer.zero_grad()
    found = messages(caught)
    assert len(found) == 1 and "\n" not in found[0]
    assert "before optimizer.step()" in found[0] and "zero_grad()" in found[0]


def test_called_twice_warns_once():
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            ready(model, step)
            optimizer.step()
            model.base_model.update_and_allocate(step)
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    assert len([message for message in messages(caught) if "twice" in message]) == 1


def test_finalize_ends_with_every_pruned_triplet_at_zero():
    # PEFT's first defect: in the wrong order the last optimizer step brings pruned triplets back.
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(20):
            ready(model, step)
            model.base_model.update_and_allocate(step)
            optimizer.step()
            optimizer.zero_grad()
    allocator = model.base_model.rankallocator
    allocator.finalize()
    for name, flags in allocator.rank_pattern().items():
        layer = model.base_model.model.get_submodule(name)
        alive = (layer.lora_E["default"].flatten() != 0).tolist()
        assert all(flag or not living for flag, living in zip(flags, alive, strict=True)), name


def test_after_zero_grad_is_an_error():
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    ready(model)
    optimizer.step()
    optimizer.zero_grad()
    state = model.base_model.rankallocator.state_dict()
    with one_line(ValueError, "no adapter parameter has a gradient", "before zero_grad()"):
        model.base_model.update_and_allocate(0)
    assert same_state(model.base_model.rankallocator.state_dict(), state)


@pytest.mark.parametrize("step", [-1, 1.5, None, "3"])
def test_a_step_that_is_no_index(step):
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    ready(model)
    optimizer.step()
    if step is None:  # continues from the last one
        model.base_model.update_and_allocate(step)
        assert model.base_model.rankallocator.t == 1
        return
    with one_line(ValueError, repr(step), "integer"):
        model.base_model.update_and_allocate(step)
    assert model.base_model.rankallocator.t == 0


def test_an_inference_only_model():
    model = fuse(adapted("bert", inference_mode=True))
    with one_line(ValueError, "is_trainable=True"):
        model.base_model.update_and_allocate(0)


# -- what PEFT stumbles over -------------------------------------------------------------------


def test_a_missed_final_step_is_made_up_for_with_a_warning():
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    steps(model, optimizer, 0, 16)
    allocator = model.base_model.rankallocator
    assert not allocator.is_final and allocator.schedule.final_step == 16
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, optimizer, 17, 20)
    found = messages(caught)
    assert len(found) == 1 and "\n" not in found[0] and "step 16" in found[0] and "step 17" in found[0]
    assert allocator.is_final and sum(allocator.ranks().values()) == 26


def test_a_module_without_gradient():
    class Skipping(torch.nn.Module):
        """Its second layer takes part in even steps only."""

        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (AdaLoraLinear(5, 5, 4) for _ in range(3))

        def forward(self, x, step):
            return self.three(self.one(x) if step % 2 else self.two(self.one(x)))

    torch.manual_seed(0)
    model = Skipping()
    allocator = RankAllocator(model, target_r=2, total_step=20, tinit=2, tfinal=4)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for step in range(20):
        model(torch.randn(6, 5), step).square().mean().backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert sum(allocator.ranks().values()) == 6


def test_a_peft_layer_without_gradient():
    model = fuse(adapted("bert", target_modules=["query", "value", "pooler.dense"], **SHORT))
    optimizer = adamw(model)
    for step in range(20):
        ready(model, step)
        for parameter in model.base_model.model.bert.pooler.dense.parameters():
            parameter.grad = None
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    ranks = model.base_model.rankallocator.ranks()
    assert ranks["bert.pooler.dense"] == 0 and sum(ranks.values()) == 2 * len(ranks)  # it never scored


def test_one_infinite_gradient_changes_no_statistic():
    model = fuse(adapted("bert", **SHORT))
    optimizer = adamw(model)
    steps(model, optimizer, 0, 5)
    allocator = model.base_model.rankallocator
    before = allocator.state_dict()["tensors"]
    ready(model, 5)
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    parameter.grad[0, 0] = float("inf")
    with no_warning():
        model.base_model.update_and_allocate(5)  # the optimizer's step was skipped, as a GradScaler does
    after = allocator.state_dict()["tensors"]
    assert all(torch.equal(after[name], before[name]) for name in before if name != "mask")
    assert allocator.t == 6
    optimizer.zero_grad()
    steps(model, optimizer, 6, 20)
    assert sum(allocator.ranks().values()) == 26


def test_a_forgotten_allocator_warns():
    model = fuse(adapted("bert", target_modules=["query"], **SHORT))
    optimizer = adamw(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            model.train()(**batch(0, size=1, length=2)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = [message for message in messages(caught) if "never moves" in message]
    assert len(found) == 1 and "AdaLoraCallback" in found[0] and "\n" not in found[0]


# -- RankAllocator.attach ----------------------------------------------------------------------


def network() -> tuple[torch.nn.Module, RankAllocator, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(AdaLoraLinear(6, 8, 4), torch.nn.ReLU(), AdaLoraLinear(8, 3, 4))
    allocator = RankAllocator(model, target_r=2, total_step=12, tinit=2, tfinal=3)
    return model, allocator, torch.optim.AdamW(trainable(model), lr=1e-2)


def backward(model: torch.nn.Module, step: int) -> None:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step))
    (model(x).square().mean() + 0.1 * orthogonality_loss(model)).backward()


def test_attached_needs_no_call():
    hand, hand_allocator, hand_optimizer = network()
    model, allocator, optimizer = network()
    allocator.attach(optimizer)
    with no_warning():
        for step in range(12):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            backward(hand, step)
            hand_optimizer.step()
            hand_allocator.step()
            hand_optimizer.zero_grad()
    assert allocator.t == 12 and allocator.is_final
    assert allocator.rank_pattern() == hand_allocator.rank_pattern()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), hand.parameters(), strict=True))


def test_a_call_beside_the_attached_one_raises():
    model, allocator, optimizer = network()
    allocator.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    with one_line(RuntimeError, "attach() already does", "remove the call"):
        allocator.step()
    assert allocator.t == 1


def test_manual_calls_are_checked():
    model, allocator, optimizer = network()
    allocator.attach(optimizer, automatic=False)
    backward(model, 0)
    with one_line(
        RuntimeError, "without an optimizer.step()", "after optimizer.step() and before zero_grad()"
    ):
        allocator.step()
    assert allocator.t == 0
    optimizer.step()
    allocator.step()
    with one_line(RuntimeError, "without an optimizer.step()"):
        allocator.step()
    assert allocator.t == 1


def test_a_step_skipped_for_infinite_gradients_is_accepted():
    model, allocator, optimizer = network()
    allocator.attach(optimizer, automatic=False)
    for step in range(12):
        backward(model, step)
        if step == 4:
            model[0].lora_A.grad[0, 0] = float("inf")
        else:
            optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert allocator.t == 12 and allocator.is_final and sum(allocator.ranks().values()) == 4


def test_another_optimizer_is_refused():
    _, allocator, _ = network()
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with one_line(ValueError, "none of the adapter's parameters", "attach the one that trains them"):
        allocator.attach(other)
    with one_line(ValueError, "list", "by hand"):
        allocator.attach([])


def test_a_second_optimizer_is_refused_until_detached():
    model, allocator, optimizer = network()
    allocator.attach(optimizer)
    with one_line(RuntimeError, "attached already", "detach()"):
        allocator.attach(torch.optim.SGD(trainable(model), lr=0.1))
    allocator.detach()
    backward(model, 0)
    optimizer.step()
    assert allocator.t == 0
    allocator.attach(optimizer)
    optimizer.step()
    assert allocator.t == 1


def test_a_wrapped_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model, allocator, optimizer = network()
    wrapped = Wrapper(Wrapper(optimizer))
    allocator.attach(wrapped)
    backward(model, 0)
    wrapped.step()
    assert allocator.t == 1


def test_accumulating_many_batches_is_no_forgotten_allocator():
    model = fuse(adapted("bert", target_modules=["query"], **SHORT))
    with no_warning():
        for _ in range(120):
            model.train()(**batch(0, size=1, length=2))
