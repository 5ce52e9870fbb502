"""Whole training steps on a GPU: nothing waits for the device, and the bookkeeping is a dozen launches."""

import pytest
import torch

from adalora_fast import AdaLoraLinear, RankAllocator, orthogonality_loss
from tests.helpers.kernel_cases import DEVICE, NEEDS_GPU
from tests.helpers.scoring import SCORES

pytestmark = NEEDS_GPU
WARM_UP, STEPS = 4, 20


class Run:
    """A small model that trains on the device alone: its data are made there."""

    def __init__(self, score: str) -> None:
        torch.manual_seed(0)
        sizes = [(64, 96), (96, 96), (96, 32)]
        layers = [AdaLoraLinear(k, n, 8) for k, n in sizes]
        self.model = torch.nn.Sequential(*layers).to(DEVICE)
        self.x, self.y = torch.randn(48, 64, device=DEVICE), torch.randn(48, 32, device=DEVICE)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        schedule = {"tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": WARM_UP + STEPS + 8}
        self.allocator = RankAllocator(self.model, target_r=4, score=score, **schedule)

    def step(self) -> None:
        loss = (self.model(self.x) - self.y).square().mean() + 0.1 * orthogonality_loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.allocator.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("score", SCORES)
def test_twenty_steps_wait_for_nothing(score):
    run = Run(score)
    for _ in range(WARM_UP):  # compiles kernels, copies tables
        run.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(run.allocator.ranks().values()) < 24, "the budget never moved"


def test_the_bookkeeping_of_an_allocation_step_is_a_dozen_launches():
    """Eight are the goal; PyTorch's own for the budget and the mask's minimum come on top."""
    run = Run("sensitivity")
    for _ in range(WARM_UP):
        run.step()
    (run.model(run.x) - run.y).square().mean().backward()
    run.optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        run.allocator.step()
        torch.cuda.synchronize()
    launches = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launches) <= 12, [event.name for event in launches]
