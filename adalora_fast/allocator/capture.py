"""An allocator whose step a CUDA graph may contain.

A graph replays the same kernels at every step and asks the host nothing. Which step it is, what its budget
is and whether it updates, selects or masks are therefore tensors: a counter t, the budget b(t) and "selects"
as tables over t (:class:`.schedule.BudgetSchedule`), and a flag that the final mask was made::

    closes  = t ≥ f                                 f the schedule's final step
    selects = (t selects by the schedule, or closes) and not final
    updates = t < f and not final
    masks   = selects or final                      then  final ← final or closes,  t ← t + 1
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adalora_fast.ops import apply_mask_, select_triplets
from adalora_fast.ops.dispatch.tables import is_capturing

from .allocator import RankAllocator
from .layers import Snapshot
from .schedule import BudgetSchedule, Position

# A file for every GPU, written by `python -m benchmarks.capture`.
PROOFS = Path(__file__).parents[1] / "proofs"


def require_proof() -> None:
    """Nothing unproven is offered.

    Raises:
        NotImplementedError: no GPU has shown yet that a replayed step equals an eager one.
    """
    if not any(json.loads(path.read_text())["proven"] for path in PROOFS.glob("*.json")):
        raise NotImplementedError(
            "capturable=True needs a measured run on a GPU that shows replayed steps equal to eager ones, "
            "and there is none yet; use capturable=False, which does not wait for the device either, or make "
            "the run with `python -m benchmarks.capture`"
        )


@dataclass(frozen=True)
class Now:
    """What the schedule says of the step that begins; scalars on the device."""

    budget: Tensor
    updates: Tensor
    selects: Tensor
    closes: Tensor
    masks: Tensor


class DeviceSchedule:
    """``schedule`` as tables on ``device`` and the position in it; no tensor ever changes its address."""

    def __init__(self, schedule: BudgetSchedule, device: torch.device) -> None:
        steps = range(schedule.final_step + 1)
        self._final_step = schedule.final_step
        self._budgets = torch.tensor([schedule.budget(t) for t in steps], dtype=torch.int64).to(device)
        self._selects = torch.tensor([schedule.masks_at(t) for t in steps], dtype=torch.bool).to(device)
        self._t, self._updates = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._final = torch.zeros((), dtype=torch.bool, device=device)

    def now(self) -> Now:
        """What the step that begins has to do."""
        late = self._t >= self._final_step
        at = self._t.clamp(max=self._final_step)
        unfinished = self._final.logical_not()
        selects = self._selects.take(at) & unfinished
        return Now(
            budget=self._budgets.take(at),
            updates=unfinished & ~late,
            selects=selects,
            closes=late,
            masks=selects | self._final,
        )

    def advance(self, now: Now) -> None:
        """The step is done."""
        self._updates.add_(now.updates)
        self._final.logical_or_(now.closes)
        self._t.add_(1)

    def set(self, position: Position) -> None:
        """Go to ``position``."""
        self._t.fill_(position.t)
        self._updates.fill_(position.updates)
        self._final.fill_(position.is_final)

    def read(self, position: Position) -> None:
        """Write the current position into ``position``; waits for the device."""
        position.t, position.updates = int(self._t), int(self._updates)
        position.is_final = bool(self._final)


class CapturableRankAllocator(RankAllocator):
    """What ``RankAllocator(capturable=True)`` makes; see there.

    Its step is a fixed sequence of kernels over tensors that keep their places, equal bit for bit to the
    other's in what it leaves behind. Gradients must keep their places too: ``zero_grad(set_to_none=False)``,
    and a few steps on the stream of the capture before it, which make the kernels' tables of addresses.
    """

    _clock: DeviceSchedule | None = None  # while the base class sets things up

    def __init__(self, model: nn.Module, *, capturable: bool = True, **options) -> None:
        require_proof()
        super().__init__(model, **options)
        if self.score.function is not None:
            raise ValueError(
                f"score {self.score.name!r} is a registered function, which looks at its gradients on the "
                "host; use capturable=False with it"
            )
        if self.score_gradient == "task":
            raise ValueError(
                "score_gradient='task' looks at gradients on the host; use 'total' with capturable"
            )
        if self.weights == "before":
            raise ValueError("weights='before' is not recorded in graphs; use 'after' with capturable")
        self._warn_of_few_updates(self.schedule.final_step)  # nobody could at the final step
        self._scores = self._statistics.values.new_zeros(self._mask.shape)
        self._mask_before = self._mask.clone()
        self._clock = DeviceSchedule(self.schedule, self._statistics.device)
        self._clock.set(self._position)

    def set_schedule(self, **steps: int) -> None:
        """As in the base class, until the allocator is made.

        Raises:
            RuntimeError: afterwards; the schedule is part of the graphs.
        """
        if self._clock is not None:
            raise RuntimeError("a capturable allocator keeps its schedule; make a new allocator")
        super().set_schedule(**steps)

    def reset(self) -> None:
        """Forget everything that was learnt: the run starts again at t = 0 with every triplet kept."""
        if self._clock is None:
            return super().reset()
        for tensor in (self._statistics.values, self._statistics.updates, self._scores, self._remembered):
            tensor.zero_()
        self._mask.fill_(True)
        self._mask_before.fill_(True)
        self._said_nan = False
        self._go_to(Position())

    def _go_to(self, position: Position) -> None:
        self._position = position
        if self._clock is not None:
            self._clock.set(position)

    def _here(self) -> Position:
        if self._clock is not None:
            self._clock.read(self._position)
            self._note_end()
        return self._position

    @torch.no_grad()
    def step(self, t: int | None = None) -> None:
        """Take in the gradients of the optimizer step just done and, where the schedule says so, prune.

        Raises:
            ValueError: ``t`` is given, or no adapter parameter has a gradient and it is not known that the
                step had none.
            RuntimeError: the attached optimizer has not stepped since the last call, the model was moved, or
                several processes train together.
        """
        if t is not None:
            raise ValueError(f"a capturable allocator counts its steps itself; call step() without t={t!r}")
        if self.processes.are_several():
            raise RuntimeError(
                "capturable=True works in one process only; use capturable=False for distributed runs"
            )
        self._check_order()
        parameters = self.parameters()
        grads = self._gradients.of_step(parameters, self._model, self._attachment)
        # A graph has the gradients of its capture for good: a layer without one then never gets one.
        self._untrained.look(self._layers, parameters, grads, at_once=is_capturing(self._statistics.device))
        if not self._statistics.fit(parameters):
            raise RuntimeError(
                "the model of a capturable allocator was moved or cast, which its graphs cannot follow; make "
                "a new allocator"
            )
        now = self._clock.now()
        if all(grad is None for grad in grads):
            now = replace(now, updates=torch.zeros_like(now.updates))
        self._statistics.update_(parameters, grads, now.updates)
        scores = self._statistics.scores(parameters)
        scores = torch.where(now.closes, self._unless_unlearnt(scores), scores)
        budget = torch.where(now.closes, now.budget, self._unless_too_early(now.budget))
        selected = torch.where(now.selects, select_triplets(self._in_order(scores), budget), self._mask)
        current = self._current_lambdas() if self.remember else None
        if current is not None:  # what is added to λ that are pruned is zero, so it may come before the mask
            self._exchange(selected, current)
        self._mask_before.copy_(torch.where(now.selects, self._mask, self._mask_before))
        self._keep(selected, torch.where(now.selects, scores, self._scores))
        mask = self._mask | ~now.masks
        apply_mask_(mask, self.lambdas())
        self._mask_optimizers(mask)
        self._clock.advance(now)
        self._gradients.remember(self.lambdas())

    def _keep(self, mask: Tensor, scores: Tensor) -> None:
        self._mask.copy_(mask)
        self._scores.copy_(scores)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there; no tensor changes its place."""
        for held, given in (
            (self._mask, snapshot.mask),
            (self._mask_before, snapshot.mask),
            (self._remembered, snapshot.remembered),
            (self._statistics.values, snapshot.values),
            (self._statistics.updates, snapshot.updates),
        ):
            held.copy_(given)
        self._go_to(snapshot.position)


RankAllocator._when_capturable = CapturableRankAllocator
