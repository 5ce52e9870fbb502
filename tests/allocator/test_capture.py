"""The allocator that a CUDA graph may contain: the same run as the ordinary one's, from one recorded step."""

import copy
import os

import pytest
import torch

from adalora_fast import RankAllocator, register_score
from adalora_fast.allocator import capture, scores
from adalora_fast.allocator.capture import CapturableRankAllocator, DeviceSchedule
from adalora_fast.allocator.schedule import BudgetSchedule, Position
from adalora_fast.ops.dispatch import backend, launch, tables
from tests.helpers.backends import force
from tests.helpers.scoring import SCORES, SMOOTHINGS
from tests.helpers.small_model import (  # fmt: skip
    SCHEDULE,
    backward,
    kept,
    make_allocator,
    make_model,
    make_optimizer,
    parameters_of,
    same,
    snapshot,
)
from tests.helpers.tape import Tape

SCHEDULES = {
    "every part": SCHEDULE,
    "no warm-up, no final phase": {"total_step": 6, "tinit": 0, "tfinal": 0, "deltaT": 1},
    "one mask": {"total_step": 9, "tinit": 3, "tfinal": 5, "deltaT": 100},
    "a single step": {"total_step": 1, "tinit": 0, "tfinal": 0},
}


@pytest.fixture(autouse=True)
def unproven(monkeypatch):
    """What is tested here is what a GPU has to prove yet."""
    monkeypatch.setattr(capture, "require_proof", lambda: None)


def pair(dtype=torch.float64, **options):
    """(model, optimizer, allocator) twice: ordinary and capturable."""
    runs = []
    for capturable in (False, True):
        model = make_model(dtype=dtype)
        allocator = make_allocator(model, **{**options, "capturable": capturable})
        runs.append((model, make_optimizer(model), allocator))
    assert type(runs[1][2]) is CapturableRankAllocator and type(runs[0][2]) is RankAllocator
    return runs


def one_step(model, optimizer, t, step, spoil=None):
    optimizer.zero_grad(set_to_none=False)
    backward(model, t)
    if t == spoil:
        parameters_of(model)[4].grad[0, 0] = float("inf")
    optimizer.step()
    step()


def run_both(runs, steps, spoil=None):
    """The capturable allocator's Python runs once; from then on its recorded operations run."""
    (model, optimizer, allocator), (twin, twin_optimizer, capturable) = runs
    tape = None

    def recorded():
        nonlocal tape
        if tape is None:
            tape = Tape(capturable.step)
        else:
            tape.replay()

    for t in range(steps):
        one_step(model, optimizer, t, allocator.step, spoil)
        one_step(twin, twin_optimizer, t, recorded, spoil)
        assert kept(allocator) == kept(capturable), f"step {t}"
        if allocator._scores is not None:
            assert torch.equal(allocator._scores, capturable._scores), "not those that the mask was made of"
        here = (allocator.t, allocator.is_final, allocator.is_over, allocator.budget)
        assert here == (capturable.t, capturable.is_final, capturable.is_over, capturable.budget)
        assert same(snapshot(model, allocator), snapshot(twin, capturable)), f"step {t}"


@pytest.mark.filterwarnings("ignore:the final allocation rests on")
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("score", SCORES)
def test_a_recorded_step_is_the_ordinary_one_at_every_step(score, smoothing):
    run_both(pair(score=score, smoothing=smoothing), SCHEDULE["total_step"] + 2)


@pytest.mark.filterwarnings("ignore:the final allocation rests on")
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule(name):
    schedule = {**SCHEDULE, **SCHEDULES[name]}
    run_both(pair(**schedule), schedule["total_step"] + 2)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.skipif(not launch.is_interpreted(), reason="on a GPU test_capture_gpu.py captures them")
@pytest.mark.parametrize("score", ["sensitivity", "gsnr"])
def test_with_the_kernels(score):
    """In the interpreter; the recording then holds the ops that launch them."""
    before = os.environ.get(backend.VARIABLE, "auto")
    force("triton")
    try:
        runs = pair(torch.float32, score=score, deltaT=1)
        run_both(runs, SCHEDULE["total_step"] + 1, spoil=4)
    finally:
        force(before)


@pytest.mark.parametrize("score", ["movement", "sensitivity"])
@pytest.mark.parametrize(
    "options",
    [{"hysteresis": 0.5}, {"remember": True}, {"triplet": "lambda"}],
    ids=["hysteresis", "remember", "lambda"],
)
def test_stable_allocation(score, options):
    run_both(pair(score=score, deltaT=1, **options), SCHEDULE["total_step"] + 1, spoil=4)


def test_gsnr_waits_for_its_second_update_on_the_device():
    """With an overflow at step 1 the second update is step 2's; masks before keep everything."""
    options = {"score": "gsnr", "tinit": 0, "deltaT": 1, "total_step": 8}
    runs = pair(**options)
    run_both(runs, 10, spoil=1)


def test_an_overflow_changes_no_statistic():
    run_both(pair(deltaT=1), SCHEDULE["total_step"], spoil=5)


def test_no_tensor_of_the_allocator_moves():
    _, (model, optimizer, allocator) = pair(remember=True)

    def places():
        statistics = allocator._statistics
        held = (allocator._mask, allocator._scores, statistics.values, statistics.updates)
        held = (*held, allocator._mask_before, allocator._remembered)
        return [
            tensor.data_ptr()
            for tensor in (*held, *vars(allocator._clock).values())
            if torch.is_tensor(tensor)
        ]

    before = places()
    assert len(before) == 11
    for t in range(4):
        one_step(model, optimizer, t, allocator.step)
    state = copy.deepcopy(allocator.state_dict())
    for t in range(4, SCHEDULE["total_step"]):
        one_step(model, optimizer, t, allocator.step)
    allocator.load_state_dict(state)
    assert allocator.t == 4 and not allocator.is_final
    with pytest.warns(UserWarning, match="the run ended after 4 of 12 steps"):
        allocator.finalize()
    assert allocator.is_final and allocator.is_over and places() == before
    allocator.reset()
    assert allocator.t == 0 and all(kept(allocator)) and places() == before
    assert not allocator.is_final and not allocator.is_over


@pytest.mark.parametrize("at", [1, 4, 9, 11])
@pytest.mark.parametrize("to_capturable", [True, False])
def test_a_state_goes_from_one_kind_to_the_other(at, to_capturable):
    runs = pair()
    (model, optimizer, allocator), (twin, twin_optimizer, capturable) = runs if to_capturable else runs[::-1]
    for t in range(at):
        one_step(model, optimizer, t, allocator.step)
    twin.load_state_dict(model.state_dict())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    capturable.load_state_dict(allocator.state_dict())
    assert same(snapshot(model, allocator), snapshot(twin, capturable))
    for t in range(at, SCHEDULE["total_step"]):
        for m, o, a in ((model, optimizer, allocator), (twin, twin_optimizer, capturable)):
            one_step(m, o, t, a.step)
    assert same(snapshot(model, allocator), snapshot(twin, capturable))


def test_a_run_that_ends_early_is_pruned_and_stays_so():
    ends = []
    for model, optimizer, allocator in pair():
        for t in range(5):
            one_step(model, optimizer, t, allocator.step)
        with pytest.warns(UserWarning, match="the run ended after 5 of 12 steps"):
            allocator.finalize()
        assert sum(kept(allocator)) == SCHEDULE["target_total_rank"]
        one_step(model, optimizer, 5, allocator.step)
        ends.append(snapshot(model, allocator))
    assert same(*ends)


def test_attached_to_an_optimizer():
    ends = []
    for model, optimizer, allocator in pair():
        allocator.attach(optimizer)
        for t in range(SCHEDULE["total_step"]):
            one_step(model, optimizer, t, lambda: None)
        with pytest.raises(RuntimeError, match=r"without an optimizer\.step\(\)"):
            allocator.step()
        ends.append(snapshot(model, allocator))
    assert same(*ends)


def test_what_is_refused(monkeypatch):
    model, _, allocator = pair()[1]
    backward(model, 0)
    with pytest.raises(ValueError, match=r"counts its steps itself; call step\(\) without t=3"):
        allocator.step(3)
    with pytest.raises(RuntimeError, match="keeps its schedule; make a new allocator"):
        allocator.set_total_step(100)
    with pytest.raises(RuntimeError, match="keeps its schedule; make a new allocator"):
        allocator.rebind()
    model.float()
    with pytest.raises(RuntimeError, match=r"was moved or cast.*make a new allocator"):
        allocator.step()
    assert allocator.t == 0
    with pytest.raises(ValueError, match="'task' looks at gradients on the host"):
        make_allocator(make_model(), capturable=True, score_gradient="task")
    monkeypatch.setattr(scores, "_scores", dict(scores._scores))
    register_score("mine", lambda w, g, state: g.abs())
    with pytest.raises(ValueError, match="score 'mine' is a registered function"):
        make_allocator(make_model(), capturable=True, score="mine")
    with pytest.warns(UserWarning, match="the final allocation rests on 1 updates"):
        make_allocator(make_model(), capturable=True, score="gsnr", total_step=2, tinit=0, tfinal=0)


def test_a_copy_of_the_model_has_a_capturable_allocator_of_its_own():
    model, optimizer, allocator = pair()[1]
    twin = copy.deepcopy(model)
    assert type(twin.rankallocator) is CapturableRankAllocator
    one_step(model, optimizer, 0, allocator.step)
    assert (allocator.t, twin.rankallocator.t) == (1, 0)


def test_the_schedule_on_the_device_is_the_schedule():
    schedule = BudgetSchedule(initial=40, target=7, tinit=3, tfinal=4, deltaT=3, total_step=20)
    device = DeviceSchedule(schedule, torch.device("cpu"))
    position = Position()
    for t in range(25):
        now = device.now()
        assert int(now.budget) == schedule.budget(t)
        assert bool(now.selects) == schedule.masks_at(t)
        assert bool(now.updates) == (t < schedule.final_step)
        assert bool(now.masks) == (schedule.masks_at(t) or t > schedule.final_step)
        device.advance(now)
        device.read(position)
        assert position == Position(
            t=t + 1, is_final=t >= schedule.final_step, updates=min(t + 1, schedule.final_step)
        )


class TestTables:
    """Tables of addresses while a graph is captured."""

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        tables.table.cache_clear()
        monkeypatch.setattr(tables, "_in_graphs", {})
        yield
        tables.table.cache_clear()

    def test_one_that_a_step_before_has_made_is_taken_and_kept(self, monkeypatch):
        device = torch.device("cpu")
        made = tables.table((1, 2, 3), torch.int64, tables.place_on(device))
        monkeypatch.setattr(tables, "is_capturing", lambda device: True)
        found = tables.table((1, 2, 3), torch.int64, tables.place_on(device))
        assert found is made
        tables.table.cache_clear()
        assert list(tables._in_graphs.values()) == [made]

    def test_one_that_would_have_to_be_copied_is_refused(self, monkeypatch):
        monkeypatch.setattr(tables, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"no step before the capture.*set_to_none=False"):
            tables.table((1, 2, 4), torch.int64, tables.place_on(torch.device("cpu")))

    def test_one_that_was_dropped_is_refused_too(self, monkeypatch):
        device = torch.device("cpu")
        tables.table((5, 6), torch.int64, tables.place_on(device))
        tables.table.cache_clear()
        monkeypatch.setattr(tables, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="no step before the capture"):
            tables.table((5, 6), torch.int64, tables.place_on(device))
