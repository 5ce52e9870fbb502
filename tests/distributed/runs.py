"""One training run, in one process or in several that share each batch, and what is left of it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adalora_fast import RankAllocator, orthogonality_loss
from tests.helpers.small_model import kept, make_allocator, make_model, make_optimizer, parameters_of

STEPS = 12
ROWS = 8  # of a step's batch, all processes together
GAMMA = 0.1


def data(t: int, start: int = 0, stop: int = ROWS) -> tuple[Tensor, Tensor]:
    """Rows of the batch of step t."""
    generator = torch.Generator().manual_seed(1000 + t)
    x, y = (torch.randn(ROWS, n, generator=generator, dtype=torch.float64) for n in (6, 4))
    return x[start:stop], y[start:stop]


def share(t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """This process's rows of that batch: its equal part, or all of it."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    part = ROWS // size
    x, y = data(t, rank * part, (rank + 1) * part)
    return x.to(dtype), y.to(dtype)


def step(model: nn.Module, inner: nn.Module, optimizer, allocator: RankAllocator, t: int) -> None:
    """One step of the documentation's loop."""
    x, y = share(t)
    loss = (model(x) - y).square().mean()
    (loss + GAMMA * orthogonality_loss(inner)).backward()
    optimizer.step()
    allocator.step()
    optimizer.zero_grad()


def train(model: nn.Module, inner: nn.Module, optimizer, allocator: RankAllocator, steps: Iterable[int]):
    """Those steps; the mask after each."""
    masks = []
    for t in steps:
        step(model, inner, optimizer, allocator, t)
        masks.append(kept(allocator))
    return masks


def result(inner: nn.Module, masks: list) -> dict:
    """Weights and masks, to be compared elsewhere."""
    return {"masks": masks, "weights": [parameter.detach().clone() for parameter in parameters_of(inner)]}


def alone(steps: Iterable[int] = range(STEPS), ranks=(4, 3, 5), **options) -> dict:
    """The run in one process."""
    model = make_model(ranks)
    allocator = make_allocator(model, **options)
    return result(model, train(model, model, make_optimizer(model), allocator, steps))


def data_parallel(bucket_view: bool = False, seed: int = 0, **options):
    """(DDP model, the model in it, optimizer, allocator)."""
    inner = make_model(seed=seed)
    model = DistributedDataParallel(inner, gradient_as_bucket_view=bucket_view)
    return model, inner, make_optimizer(inner), make_allocator(inner, **options)


def same_run(found: dict, expected: dict) -> None:
    """The same masks at every step; weights as far as the order of sums allows."""
    assert found["masks"] == expected["masks"]
    for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def agree(results: list[dict]) -> None:
    """All processes have the same, bit for bit."""
    for other in results[1:]:
        assert other["masks"] == results[0]["masks"]
        for ours, theirs in zip(other["weights"], results[0]["weights"], strict=True):
            assert torch.equal(ours, theirs)
