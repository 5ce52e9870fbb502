"""A run that stops and goes on is the run that never stopped, bit for bit, from every kind of step."""

import copy

import pytest
import torch

from adalora_fast import register_score
from adalora_fast.allocator import scores
from adalora_fast.allocator.state import read_state, write_state
from tests.helpers.small_model import (
    kept,
    lambdas,
    make_allocator,
    make_model,
    make_optimizer,
    same,
    snapshot,
    train,
)

STEPS = 14  # two beyond the schedule


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(scores, "_scores", dict(scores._scores))

    def momentum(w, g, state):
        state["mean"] = state.get("mean", torch.zeros_like(g)).lerp(g, 0.2)
        return (w * state["mean"]).abs()

    register_score("momentum", momentum, smoothing="ema_uncertainty")


def start(dtype=torch.float32, **options):
    model = make_model(dtype=dtype)
    return model, make_optimizer(model), make_allocator(model, **options)


def checkpoint(run):
    model, optimizer, allocator = run
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), allocator.state_dict()))


def resume(saved, dtype=torch.float32, **options):
    """A fresh process: another seed, then everything from the checkpoint."""
    model = make_model(seed=99, dtype=dtype)
    optimizer, allocator = make_optimizer(model), make_allocator(model, **options)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    allocator.load_state_dict(saved[2])
    return model, optimizer, allocator


@pytest.mark.parametrize(
    ("score", "score_gradient"),
    [
        ("sensitivity", "total"),
        ("movement", "total"),
        ("fisher", "task"),
        ("gsnr", "total"),
        ("magnitude", "total"),
        ("momentum", "total"),
    ],
)
def test_from_every_step(score, score_gradient):
    options = {"score": score, "score_gradient": score_gradient}
    run, saved = start(**options), []
    for t in range(STEPS):
        saved.append(checkpoint(run))
        train(*run, [t])
    want = snapshot(run[0], run[2])
    for t, state in enumerate(saved):
        again = resume(state, **options)
        assert again[2].t == t
        train(*again, range(t, STEPS))
        assert same(snapshot(again[0], again[2]), want), f"resumed at step {t}"


@pytest.mark.parametrize(
    "options",
    [{"remember": True}, {"hysteresis": 0.5}, {"triplet": "lambda"}, {"triplet": "lambda", "remember": True}],
    ids=str,
)
def test_stable_allocation_from_every_step(options, tmp_path):
    options = {"score": "movement", "smoothing": "none", "deltaT": 1, **options}
    run, saved = start(**options), []
    for t in range(STEPS):
        saved.append(checkpoint(run))
        write_state(run[2], tmp_path)
        assert torch.equal(read_state(tmp_path)["tensors"]["mask"], saved[-1][2]["tensors"]["mask"])
        saved[-1] = (*saved[-1][:2], read_state(tmp_path))
        train(*run, [t])
    want = snapshot(run[0], run[2])
    for t, state in enumerate(saved):
        again = resume(state, **options)
        train(*again, range(t, STEPS))
        assert same(snapshot(again[0], again[2]), want), f"resumed at step {t}"


@pytest.mark.parametrize("t", [0, 1, 4, 5, 9, 10, 13])
def test_through_a_file(t, tmp_path):
    run = start()
    train(*run, range(t))
    saved = checkpoint(run)
    path = write_state(run[2], tmp_path)
    assert path.parent == tmp_path and path.suffix == ".safetensors"
    state = read_state(tmp_path)
    assert state["config"] == saved[2]["config"]
    again = resume((saved[0], saved[1], state))
    train(*run, range(t, STEPS))
    train(*again, range(t, STEPS))
    assert same(snapshot(run[0], run[2]), snapshot(again[0], again[2]))


@pytest.mark.parametrize("t", [0, 4, 9, 12])
def test_into_an_allocator_that_has_finished_its_own_run(t):
    """As loading the best checkpoint does: back from the end to the middle, in the same process."""
    run = start()
    train(*run, range(t))
    saved = checkpoint(run)
    train(*run, range(t, STEPS))
    run[2].finalize()
    want = snapshot(run[0], run[2])
    run[0].load_state_dict(saved[0])
    run[1].load_state_dict(saved[1])
    run[2].load_state_dict(saved[2])
    assert (run[2].t, run[2].is_over) == (t, t >= run[2].schedule.total_step)
    train(*run, range(t, STEPS))
    run[2].finalize()
    assert same(snapshot(run[0], run[2]), want)


def test_after_an_early_end():
    run = start()
    train(*run, range(5))
    with pytest.warns(UserWarning, match="before the final allocation"):
        run[2].finalize()
    again = resume(checkpoint(run))
    assert again[2].is_final and again[2].is_over and kept(again[2]) == kept(run[2])
    train(*again, range(5, 8))
    assert (lambdas(again[0]) != 0).sum() == 5


@pytest.mark.parametrize("attached", [True, False])
def test_the_state_says_nothing_of_optimizers(attached):
    run = start()
    if attached:
        run[2].attach(run[1])
    text = repr(run[2].state_dict()["config"])
    assert "optim" not in text.lower()


def test_a_state_is_a_copy_both_ways():
    run = start()
    train(*run, range(5))
    state = run[2].state_dict()
    frozen = copy.deepcopy(state)
    again = resume((run[0].state_dict(), copy.deepcopy(run[1].state_dict()), state))
    train(*again, range(5, STEPS))
    train(*run, range(5, STEPS))
    assert state["config"] == frozen["config"]
    assert all(torch.equal(state["tensors"][name], tensor) for name, tensor in frozen["tensors"].items())


def test_another_type_of_model():
    run = start(torch.float64)
    train(*run, range(5))
    saved = checkpoint(run)
    model = make_model(dtype=torch.float32)
    allocator = make_allocator(model)
    allocator.load_state_dict(saved[2])
    train(model, make_optimizer(model), allocator, range(5, STEPS))
    assert sum(allocator.ranks().values()) == 5 and allocator.is_final


def test_the_states_tensors_explain_themselves():
    run = start()
    train(*run, range(3))
    state = run[2].state_dict()
    assert state["config"]["layers"] == {"0": 4, "2": 3, "4": 5}
    names = {f"{row}/{layer}.lora_{k}" for row in ("ema", "uncertainty") for layer in "024" for k in "AEB"}
    assert set(state["tensors"]) == names | {"mask", "updates"}
    for layer, module in zip("024", (run[0][0], run[0][2], run[0][4]), strict=True):
        assert state["tensors"][f"ema/{layer}.lora_A"].shape == module.lora_A.shape
    assert all(tensor.device.type == "cpu" for tensor in state["tensors"].values())
