"""DistributedDataParallel: every process has the same mask, whatever happens, and one process would, too."""

import copy
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join

from adalora_fast import JoinableAllocator, orthogonality_loss, register_score
from adalora_fast.allocator import capture, scores
from adalora_fast.distributed import processes as distributed
from tests.distributed.processes import Processes
from tests.distributed.runs import (
    GAMMA,
    ROWS,
    STEPS,
    agree,
    alone,
    data,
    data_parallel,
    result,
    same_run,
    share,
    train,
)
from tests.helpers.small_model import kept, make_allocator, make_model, parameters_of


def run_even(bucket_view=False, **options):
    model, inner, optimizer, allocator = data_parallel(bucket_view, **options)
    return result(inner, train(model, inner, optimizer, allocator, range(STEPS)))


@pytest.mark.parametrize("bucket_view", [False, True], ids=["own gradients", "bucket views"])
@pytest.mark.parametrize("score", ["sensitivity", "gsnr", "movement"])
def test_equals_one_process(pair, score, bucket_view):
    results = pair.run(run_even, bucket_view, score=score)
    agree(results)
    expected = alone(score=score)
    assert 0 < sum(expected["masks"][-1]) < sum(expected["masks"][0])
    same_run(results[0], expected)


def run_accumulating():
    model, inner, optimizer, allocator = data_parallel()
    masks = []
    for t in range(STEPS):
        x, y = share(t)
        with model.no_sync():
            ((model(x[:2]) - y[:2]).square().mean() / 2).backward()
        ((model(x[2:]) - y[2:]).square().mean() / 2 + GAMMA * orthogonality_loss(inner)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    return result(inner, masks)


def test_gradient_accumulation(pair):
    results = pair.run(run_accumulating)
    agree(results)
    same_run(results[0], alone())


def run_attached():
    model, inner, optimizer, allocator = data_parallel()
    allocator.attach(optimizer)
    masks = []
    for t in range(STEPS):
        x, y = share(t)
        ((model(x) - y).square().mean() + GAMMA * orthogonality_loss(inner)).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    return result(inner, masks)


def test_an_attached_optimizer(pair):
    results = pair.run(run_attached)
    same_run(results[1], alone())


def run_disturbed():
    model, inner, optimizer, allocator = data_parallel()
    masks = []
    for t in range(STEPS):
        if dist.get_rank() == 1:
            allocator._statistics.values.uniform_()
        masks += train(model, inner, optimizer, allocator, [t])
    return result(inner, masks)


def test_statistics_that_differ_give_one_mask(pair):
    results = pair.run(run_disturbed)
    agree(results)
    same_run(results[0], alone())  # the first process's, which nothing disturbed


def run_overflow():
    model, inner, optimizer, allocator = data_parallel()
    seen = []
    for t in range(STEPS):
        x, y = share(t)
        if t == 5 and dist.get_rank() == 1:
            x = x * float("inf")
        (model(x) - y).square().mean().backward()
        if all(p.grad.isfinite().all() for p in parameters_of(inner)):
            optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        seen.append((kept(allocator), allocator._statistics.updates.max().item()))
    return seen


def test_an_overflow_in_one_process_counts_in_none(pair):
    first, second = pair.run(run_overflow)
    assert first == second
    assert first[5][1] == first[4][1] and first[6][1] == first[5][1] + 1


# -- uneven data -------------------------------------------------------------------------------


def run_weighted(last: int):
    """The second process has the ``last`` rows of every batch; gradients are weighted by the rows."""
    model, inner, optimizer, allocator = data_parallel()
    masks = []
    for t in range(STEPS):
        x, y = data(t, 0, ROWS - last) if dist.get_rank() == 0 else data(t, ROWS - last)
        loss = (model(x) - y).square().sum() / (ROWS * 4) * dist.get_world_size()
        (loss + GAMMA * orthogonality_loss(inner)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    return result(inner, masks)


@pytest.mark.parametrize("last", [3, 0], ids=["fewer rows", "no rows"])
def test_uneven_batches_with_weighted_gradients(pair, last):
    results = pair.run(run_weighted, last)
    agree(results)
    same_run(results[0], alone())


def run_joined(batches: tuple[int, int]):
    model, inner, optimizer, allocator = data_parallel()
    with Join([model, JoinableAllocator(allocator)]):
        for t in range(batches[dist.get_rank()]):
            train(model, inner, optimizer, allocator, [t])
    assert allocator.processes.has_data is None
    found = result(inner, [kept(allocator)])
    return {**found, "state": allocator.state_dict(), "scores": allocator._scores}


@pytest.mark.parametrize("batches", [(12, 5), (5, 12), (12, 0), (0, 12), (7, 3), (12, 12)], ids=str)
def test_a_process_that_runs_out_of_data(pair, batches):
    results = pair.run(run_joined, batches)
    agree(results)
    first, second = (found["state"] for found in results)
    assert first["config"] == second["config"] and first["config"]["t"] == max(batches)
    for name, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][name]), name
    budget = make_allocator(make_model()).schedule.budget(max(batches) - 1)
    scores = results[batches.index(max(batches))]["scores"]  # of the first that had data to the end
    best = scores.sort(descending=True, stable=True).indices[:budget].tolist()
    assert [i for i, keep in enumerate(results[0]["masks"][0]) if keep] == sorted(best)


# -- who agrees --------------------------------------------------------------------------------


def run_models_of_their_own():
    inner = make_model(seed=dist.get_rank())
    allocator = make_allocator(inner)
    allocator.processes.group = dist.new_subgroups(1)[0]
    copied = copy.deepcopy(allocator)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    masks = []
    for t in range(STEPS):
        x, y = data(t)
        ((inner(x) - y).square().mean() + GAMMA * orthogonality_loss(inner)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    return masks, copied.processes.group is allocator.processes.group


def test_processes_with_models_of_their_own(pair):
    (first, one), (second, other) = pair.run(run_models_of_their_own)
    assert first[-1] != second[-1] and one and other


def test_one_process_asks_nobody(monkeypatch):
    for name in ("broadcast", "all_reduce", "all_gather_into_tensor"):
        monkeypatch.setattr(distributed.dist, name, None)
    assert alone()["masks"]


# -- what is refused ---------------------------------------------------------------------------


def run_task_gradient():
    model, inner, optimizer, allocator = data_parallel(score_gradient="task")
    with pytest.raises(RuntimeError, match="score_gradient='task' works in one process only; use 'total'"):
        train(model, inner, optimizer, allocator, [0])


def run_capturable():
    capture.require_proof = lambda: None
    model, inner, optimizer, allocator = data_parallel(capturable=True)
    with pytest.raises(RuntimeError, match="capturable=True works in one process only; use capturable=False"):
        train(model, inner, optimizer, allocator, [0])


@pytest.mark.parametrize("run", [run_task_gradient, run_capturable])
def test_what_works_in_one_process_only(pair, run):
    pair.run(run)


def with_curvature(run):
    """``run`` with a score of the user's own."""
    if "curvature" not in scores.score_names():
        register_score("curvature", lambda w, g, state: (w * g).square())
    return run(score="curvature")


def test_a_registered_score(pair):
    results = pair.run(with_curvature, run_even)
    agree(results)
    same_run(results[0], with_curvature(alone))


# -- a process that dies -----------------------------------------------------------------------


def run_and_die(at: int):
    model, inner, optimizer, allocator = data_parallel()
    for t in range(STEPS):
        if t == at and dist.get_rank() == 1:
            os._exit(1)
        train(model, inner, optimizer, allocator, [t])


def run_and_sleep_before_the_mask(at: int):
    model, inner, optimizer, allocator = data_parallel()
    for t in range(STEPS):
        if t == at and dist.get_rank() == 1:
            allocator._prune = lambda *_, **__: time.sleep(3600)  # alive, and never there
        train(model, inner, optimizer, allocator, [t])


@pytest.mark.parametrize(
    "run, fate", [(run_and_die, "died"), (run_and_sleep_before_the_mask, "hangs")], ids=["dead", "stuck"]
)
def test_the_others_end_with_an_error(run, fate):
    processes = Processes(timeout=timedelta(seconds=4))
    try:
        processes.run(dist.get_rank)  # they have started
        start = time.monotonic()
        survivor, lost = processes.answers(run, 4, limit=30)
        assert not survivor[0] and "RuntimeError" in survivor[1], survivor
        assert time.monotonic() - start < 30 and not lost[0] and lost[1] == fate, lost
    finally:
        processes.end()
