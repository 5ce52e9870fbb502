"""Uneven data: an allocator that keeps up while its process has run out of batches and others have not.

::

    with Join([ddp, JoinableAllocator(allocator)]):  # torch.distributed.algorithms.join.Join
        for batch in loader:
            ddp(batch).backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()

``ddp.join()`` alone does not know of the allocator, whose agreement on a mask would wait for the processes
that left. One forward pass must be one optimizer step.
"""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook

from adalora_fast.allocator.allocator import RankAllocator


class JoinableAllocator(Joinable):
    """``allocator`` for a ``Join`` context, behind its ``DistributedDataParallel`` model."""

    def __init__(self, allocator: RankAllocator) -> None:
        super().__init__()
        self._allocator = allocator

    def join_hook(self, **kwargs) -> JoinHook:
        """The context begins: every process still has data."""
        self._allocator.processes.has_data = True
        return _Follow(self._allocator)

    @property
    def join_device(self) -> torch.device:
        """Where the allocator's tensors are."""
        return self._allocator._mask.device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        """The processes that agree."""
        return self._allocator.processes.group or dist.group.WORLD


class _Follow(JoinHook):
    def __init__(self, allocator: RankAllocator) -> None:
        self._allocator = allocator

    def main_hook(self) -> None:
        """Others take a step for which this process has no data: take their mask."""
        self._allocator.processes.has_data = False
        allocator = self._allocator
        allocator.follow_regulariser()
        schedule, t = allocator.schedule, allocator.t
        if not allocator.is_final:
            if t >= schedule.final_step:
                allocator._make_final()
            elif schedule.masks_at(t):
                allocator._prune(schedule.budget(t))
        allocator._position.t = t + 1
        allocator._note_end()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Nobody has data left: take the statistics of one that had all of it."""
        allocator = self._allocator
        processes, position, statistics = allocator.processes, allocator._position, allocator._statistics
        processes.has_data = is_last_joiner
        steps = torch.tensor(position.updates, device=statistics.device)
        for tensor in (statistics.values, statistics.updates, steps, *statistics.user_state.values()):
            processes.agree_(tensor)
        position.updates = int(steps)
        processes.has_data = None
