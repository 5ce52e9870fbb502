"""Batches without the adapted part, in all processes or in some: nobody waits for nobody, one mask in all."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_fast import JoinableAllocator, RankAllocator
from tests.allocator.test_steps_without_gradients import SCHEDULE, STEPS, WITHOUT, Seeing, backward
from tests.distributed.runs import agree
from tests.helpers.small_model import kept

WHO = {1: (0,), 2: (1,), 3: (0, 1)}  # at steps t % 4, the processes whose batch is text alone


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def weights_of(model):
    parameters = [p.detach() for p in model.parameters() if p.requires_grad]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in parameters]


def loop(model, inner, optimizer, allocator, attached, steps, without):
    if attached:
        allocator.attach(optimizer)
    masks = []
    for t in steps:
        backward(model, t, without)
        optimizer.step()
        if not attached:
            allocator.step()
        optimizer.zero_grad()
        masks.append(kept(allocator))
    updates = allocator.state_dict()["config"]["update_count"]
    return {"masks": masks, "weights": weights_of(inner), "t": allocator.t, "updates": updates}


def run_data_parallel(attached: bool):
    inner = Seeing()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    without = [t for t in range(STEPS) if dist.get_rank() in WHO.get(t % 4, ())]
    allocator = RankAllocator(inner, **SCHEDULE)
    return loop(model, inner, optimizer_of(inner), allocator, attached, range(STEPS), without)


@pytest.mark.parametrize("attached", [True, False])
def test_data_parallel(pair, attached):
    """A process whose batch has no picture gets the others' gradient; only if none has one it is missing."""
    results = pair.run(run_data_parallel, attached)
    agree(results)
    for found in results:
        assert found["t"] == STEPS and sum(found["masks"][-1]) == 4
        assert found["updates"] == sum(t % 4 != 3 for t in range(STEPS - SCHEDULE["tfinal"]))


def run_sharded(attached: bool, wrapping: str):
    model = Seeing()
    allocator = RankAllocator(model, **SCHEDULE)
    mesh = init_device_mesh("cpu", (2,))
    if wrapping == "layers":
        for layer in model.vision[::2]:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(model, model, optimizer_of(model), allocator, attached, range(STEPS), WITHOUT)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("wrapping", ["layers", "root"])
def test_sharded(pair, attached, wrapping):
    results = pair.run(run_sharded, attached, wrapping)
    agree(results)
    model = Seeing()
    alone = loop(
        model, model, optimizer_of(model), RankAllocator(model, **SCHEDULE), attached, range(STEPS), WITHOUT
    )
    for found in results:
        assert found["masks"] == alone["masks"] and found["updates"] == alone["updates"]
        for ours, theirs in zip(found["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def run_joined(batches):
    inner = Seeing()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    allocator = RankAllocator(inner, **SCHEDULE)
    with Join([model, JoinableAllocator(allocator)]):
        steps = range(batches[dist.get_rank()])
        found = loop(model, inner, optimizer_of(inner), allocator, False, steps, WITHOUT)
    return {**found, "masks": [kept(allocator)], "weights": weights_of(inner), "t": allocator.t}


@pytest.mark.parametrize("batches", [(STEPS, 9), (9, STEPS)], ids=str)
def test_a_process_that_runs_out_of_data(pair, batches):
    results = pair.run(run_joined, batches)
    agree(results)
    assert [found["t"] for found in results] == [STEPS, STEPS]
    assert sum(results[0]["masks"][0]) == 4
