"""Steps in which no adapter has a gradient: a batch of text alone, a dropped layer, a frozen phase."""

import warnings

import pytest
import torch
from torch import nn

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss, register_score
from adalora_fast.allocator import capture, gradients
from adalora_fast.allocator import scores as score_registry
from tests.helpers.small_model import kept

STEPS, WITHOUT = 24, (2, 3, 7, 11, 12)
SCHEDULE = {"total_step": STEPS, "tinit": 2, "tfinal": 5, "deltaT": 1, "target_r": 2}


class Seeing(nn.Module):
    """Adapters in the vision part, and a head that every batch trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Sequential(AdaLoraLinear(6, 8, 4), nn.Tanh(), AdaLoraLinear(8, 5, 4))
        self.text, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        for parameter in self.vision.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)

    def forward(self, text, pixels=None):
        hidden = self.text(text)
        return self.head(hidden if pixels is None else hidden + self.vision(pixels))


def backward(model, t, without=WITHOUT, gamma=0.0):
    draw = torch.Generator().manual_seed(t)
    text, pixels = torch.randn(4, 3, generator=draw), torch.randn(4, 6, generator=draw)
    loss = model(text, None if t in without else pixels).square().mean()
    (loss + gamma * orthogonality_loss(model) if gamma else loss).backward()


@pytest.fixture
def run():
    model = Seeing()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def statistics(allocator):
    state = allocator.state_dict()
    return {**state["tensors"], "count": torch.tensor(state["config"]["update_count"])}


def train(model, optimizer, allocator, by_hand, steps=range(STEPS), **options):
    for t in steps:
        before = statistics(allocator)
        backward(model, t, **options)
        optimizer.step()
        if by_hand:
            allocator.step()
        optimizer.zero_grad()
        assert allocator.t == t + 1, "it counts"
        if t in options.get("without", WITHOUT) and t < allocator.schedule.final_step:
            after = statistics(allocator)
            assert all(torch.equal(before[name], after[name]) for name in before if name != "mask")


@pytest.fixture
def own_score(monkeypatch):
    monkeypatch.setattr(score_registry, "_scores", dict(score_registry._scores))

    def remembering(w, g, state):
        state["seen"] = 0.9 * state.get("seen", torch.zeros_like(g)) + g
        return (w * state["seen"]).abs()

    register_score("remembering", remembering, smoothing="ema")


ALL_SCORES = ["sensitivity", "movement", "fisher", "gsnr", "magnitude", "remembering"]


@pytest.mark.parametrize("how", ["attached", "attached, called", "by hand"])
@pytest.mark.parametrize("score", ALL_SCORES)
def test_they_change_no_statistic_and_count(run, own_score, score, how):
    model, optimizer = run
    allocator = RankAllocator(model, score=score, **SCHEDULE)
    if how != "by hand":
        allocator.attach(optimizer, automatic=how == "attached")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, allocator, by_hand=how != "attached")
    assert allocator.is_final and sum(kept(allocator)) == 4
    alive = torch.cat([layer.lora_E for layer in model.vision[::2]]).flatten() != 0
    assert alive.tolist() == kept(allocator)


def test_the_schedule_prunes_in_such_a_step_too(run):
    model, optimizer = run
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.attach(optimizer)
    for t in range(13):
        backward(model, t)
        optimizer.step()
        optimizer.zero_grad()
    assert 12 in WITHOUT and sum(kept(allocator)) == allocator.schedule.budget(12)


@pytest.mark.parametrize("attached", [True, False])
def test_the_task_gradient(run, attached):
    """The orthogonality term gives A and B a gradient of its own there, which is not the task's."""
    model, optimizer = run
    allocator = RankAllocator(model, score="fisher", score_gradient="task", **SCHEDULE)
    if attached:
        allocator.attach(optimizer)
    train(model, optimizer, allocator, by_hand=not attached, steps=range(8), gamma=0.1)


def test_a_capturable_allocator(run, monkeypatch):
    monkeypatch.setattr(capture, "require_proof", lambda: None)
    model, optimizer = run
    allocator = RankAllocator(model, capturable=True, **SCHEDULE)
    allocator.attach(optimizer)
    train(model, optimizer, allocator, by_hand=False)
    twin = Seeing()
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    ordinary = RankAllocator(twin, **SCHEDULE)
    ordinary.attach(other)
    train(twin, other, ordinary, by_hand=False)
    assert kept(allocator) == kept(ordinary)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("zeroed", ["before the optimizer", "before the allocator"])
def test_zero_grad_at_the_wrong_place_is_not_silent(run, monkeypatch, automatic, zeroed):
    """The optimizer saw gradients: an error. It saw none, ever: a warning."""
    monkeypatch.setattr(gradients, "LONG", 10)
    model, optimizer = run
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.attach(optimizer, automatic=automatic)

    def wrong():
        for t in range(15):
            backward(model, t, without=())
            if zeroed == "before the optimizer":
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            if not automatic:
                allocator.step()

    if zeroed == "before the optimizer":
        with pytest.warns(UserWarning, match=r"10 optimizer steps in a row .* zero_grad\(\) comes before"):
            wrong()
    elif automatic:
        wrong()
        assert statistics(allocator)["count"] == 15
    else:
        with pytest.raises(ValueError, match=r"no adapter parameter has a gradient; call .* zero_grad"):
            wrong()


@pytest.mark.parametrize("zeroed", ["all", "the adapter's"])
def test_by_hand_after_zero_grad_is_an_error_in_every_step(run, zeroed):
    """Also if other parameters still have gradients: the optimizer has moved λ."""
    model, optimizer = run
    allocator = RankAllocator(model, **SCHEDULE)
    for t in range(2):
        backward(model, t)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    for t in range(4, 7):
        backward(model, t)
        optimizer.step()
        (model if zeroed == "all" else model.vision).zero_grad()
        with pytest.raises(ValueError, match=r"no adapter .* or attach\(optimizer\) if some steps"):
            allocator.step()
        assert allocator.t == 2
        optimizer.zero_grad()


def test_many_in_a_row_are_named_once(run, monkeypatch):
    monkeypatch.setattr(gradients, "LONG", 6)
    model, optimizer = run
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, allocator, by_hand=False, steps=range(18), without=range(1, 15))
    (warning,) = caught
    message = str(warning.message)
    assert (
        message.startswith("6 optimizer steps in a row without a gradient for any adapter")
        and "\n" not in message
    )


def test_a_frozen_phase(run):
    model, optimizer = run
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.attach(optimizer)
    for t in range(STEPS):
        model.vision.requires_grad_(t >= 6)
        for layer in model.vision[::2]:
            layer.weight.requires_grad_(False)
        backward(model, t, without=())
        optimizer.step()
        optimizer.zero_grad()
    assert allocator.is_final and sum(kept(allocator)) == 4


def test_no_gradient_in_the_whole_run_leaves_the_largest(run):
    model, optimizer = run
    sizes = torch.cat([layer.lora_E.detach().abs() for layer in model.vision[::2]]).flatten()
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.attach(optimizer)
    with pytest.warns(UserWarning, match=r"rests on 0 updates .* the largest \|λ\| are kept"):
        train(model, optimizer, allocator, by_hand=False, without=range(STEPS))
    assert kept(allocator) == (sizes >= sizes.sort().values[-4]).tolist()


def test_a_layer_without_a_gradient_keeps_its_statistics(run, own_score):
    """The state of a registered score too."""
    for score in ("sensitivity", "gsnr", "remembering"):
        model = nn.ModuleList([AdaLoraLinear(6, 6, 3), AdaLoraLinear(6, 6, 3)])
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        allocator = RankAllocator(model, total_step=20, tinit=10, target_r=2, score=score)
        allocator.attach(optimizer)
        x = torch.randn(4, 6)
        for used in ((0, 1), (0, 1), (0,), (0,)):
            before = statistics(allocator)
            sum(model[i](x).square().mean() for i in used).backward()
            optimizer.step()
            optimizer.zero_grad()
            if used == (0,):
                after = statistics(allocator)
                for name, tensor in after.items():
                    if "/1." in name and not name.startswith("user/"):
                        assert torch.equal(tensor, before[name]), (score, name)
                    if name.startswith("user/"):
                        assert torch.equal(tensor[1], before[name][1]), (score, name)
                        assert not torch.equal(tensor[0], before[name][0]), (score, name)
