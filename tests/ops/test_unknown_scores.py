"""A score or smoothing that is added to the reference alone: every backend computes it and says how."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

import adalora_fast.__main__ as command
from adalora_fast import AdaLoraLinear, RankAllocator
from adalora_fast.allocator import scores
from adalora_fast.ops import importance, importance_scores, importance_update_
from adalora_fast.ops.dispatch import backend
from adalora_fast.ops.importance import ScoreRule, not_computed, reference
from tests.helpers.backends import each_backend
from tests.helpers.scoring import make_buffers, make_parameters
from tests.helpers.tolerances import assert_accurate

backend_in_use = each_backend("importance", "reference", "cpu", "triton")
BETAS = (0.85, 0.7)
REASON = "importance runs in plain PyTorch: the .* kernels do not compute {} {!r}, they have"


def cube(w, g):
    return (w * g) ** 3 - w  # in another order than |w|


@pytest.fixture(autouse=True)
def told_anew():
    importance._within_limits.cache_clear()
    yield
    importance._within_limits.cache_clear()


@pytest.fixture
def cubic(monkeypatch):
    """What CONTRIBUTING.md says of a score: one line of formula. |w| would be far from it."""
    monkeypatch.setitem(reference.SIGNALS, "cubic", cube)
    return "cubic"


@pytest.fixture
def largest(monkeypatch):
    """A smoothing of its own: the largest signal so far."""
    smooth_ = reference.smooth_

    def with_largest_(rows, value, rule, alive):
        if rule.smoothing == "largest":
            torch.where(alive > 0, rows["largest"].maximum(value), rows["largest"], out=rows["largest"])
        else:
            smooth_(rows, value, rule, alive)

    monkeypatch.setitem(reference.SMOOTHINGS, "largest", ("largest",))
    monkeypatch.setattr(reference, "smooth_", with_largest_)
    return "largest"


def run(score, smoothing, steps=3):
    """(scores, [(w, g) of every step] of every parameter) through the public op."""
    parameters = make_parameters(((5, 3, 7), (6, 2, 4)), torch.float32)
    statistics, updates = make_buffers(parameters, score, smoothing, torch.float32)
    histories = [[] for _ in parameters]
    for step in range(steps):
        grads = [torch.full_like(p, 0.5 + step) + p for p in parameters]
        for history, parameter, grad in zip(histories, parameters, grads, strict=True):
            history.append((parameter.double(), grad.double()))
        importance_update_(parameters, grads, statistics, updates, ScoreRule(score, smoothing, *BETAS))
    assert (updates == steps).all()
    return importance_scores(parameters, statistics, ScoreRule(score, smoothing)), histories


def triplets(elements):
    """S of every triplet from the element scores of A_0, E_0, B_0, A_1, ..."""
    rows = zip(elements[::3], elements[1::3], elements[2::3], strict=True)
    return torch.cat([E[:, 0] + A.mean(1) + B.mean(0) for A, E, B in rows])


def expecting(backend_in_use, what, name):
    """The warning that names what falls back; the reference has nothing to say."""
    if backend_in_use == "reference":
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=REASON.format(what, name))


def test_an_unknown_score(backend_in_use, cubic):
    with expecting(backend_in_use, "score", cubic):
        got, histories = run(cubic, "none")
    truth = triplets([cube(*history[-1]) for history in histories])
    assert_accurate(got, truth, torch.float32, factor=10)


def test_an_unknown_smoothing(backend_in_use, largest):
    with expecting(backend_in_use, "smoothing", largest):
        got, histories = run("movement", largest)
    signals = [torch.stack([-w * g for w, g in history]) for history in histories]
    truth = triplets([signal.amax(0).clamp(min=0) for signal in signals])  # the row begins at zero
    assert_accurate(got, truth, torch.float32, factor=10)


def test_it_is_said_once(backend_in_use, cubic):
    with expecting(backend_in_use, "score", cubic):
        run(cubic, "ema")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(cubic, "ema")


def test_the_report_names_what_falls_back(backend_in_use, cubic, monkeypatch):
    on_cpu, missing = " ".join(command.report().partition("on cuda")[0].split()), not_computed("cpu")
    assert len(missing) == (backend_in_use != "reference")
    assert all(f"but reference {reason}" in on_cpu for reason in missing)
    monkeypatch.delitem(reference.SIGNALS, cubic)
    assert not_computed("cpu") == [] and "    but " not in command.report()


def test_what_is_computed_does_not_fall_back(backend_in_use):
    functions = backend.kernel("importance", "cpu")
    for score in reference.SIGNALS:
        for smoothing in reference.SMOOTHINGS:
            assert importance._within_limits(functions, score, smoothing) is functions


def test_kernels_that_declare_nothing_compute_nothing(backend_in_use):
    with pytest.warns(UserWarning, match="its kernels do not declare what they compute"):
        assert importance._within_limits(object(), "sensitivity", "ema") is reference


def test_a_smoothing_without_a_branch_ends_the_step(backend_in_use, monkeypatch):
    monkeypatch.setitem(reference.SMOOTHINGS, "median", ("ema",))
    with pytest.raises(NotImplementedError, match="smooth_ has no branch for smoothing 'median'"):
        run("movement", "median", steps=1)
    monkeypatch.setitem(reference.SMOOTHINGS, "median", ("ema", "spread"))
    with pytest.raises(NotImplementedError, match="smoothing 'median' keeps"):
        reference.element_scores({}, ScoreRule("movement", "median"))


def test_a_whole_run_with_an_unknown_score(backend_in_use, cubic, monkeypatch):
    """As CONTRIBUTING.md says: one line in SIGNALS, one Score; the right triplets are kept."""
    monkeypatch.setitem(scores._scores, cubic, scores.Score(name=cubic, smoothing="none", source="a test"))
    torch.manual_seed(0)
    model = nn.Sequential(AdaLoraLinear(6, 6, 3), AdaLoraLinear(6, 4, 3))
    for layer in model:
        nn.init.normal_(layer.lora_E)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with expecting(backend_in_use, "score", cubic):
        allocator = RankAllocator(model, target_r=1, total_step=3, tfinal=1, score=cubic)
        for step in range(3):
            model(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            if step < allocator.schedule.final_step:
                elements = [cube(p, p.grad).detach() for p in allocator.parameters()]
            allocator.step()
            optimizer.zero_grad()
    kept = torch.tensor([kept for row in allocator.rank_pattern().values() for kept in row])
    best = triplets(elements).topk(2).indices
    assert sorted(best.tolist()) == kept.nonzero().flatten().tolist()
