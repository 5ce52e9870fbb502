"""The budget of triplets over a run: warm-up, cubic decrease, final phase (arXiv 2303.10512, eq. 14, as its
code has it).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """How many triplets step t may keep, and whether it selects them.

    With T = ``total_step``, t counted from 0, f = min(T - tfinal, T - 1) the step of the final mask::

        t ≤ tinit          b(0), no mask
        tinit < t < f      int(b(T) + (b(0) - b(T)) (1 - (t - tinit) / (T - tfinal - tinit))³),
                           a mask iff t % deltaT == 0
        t = f              b(T), always a mask
        t > f              b(T), the mask of step f stays

    (Eq. 14 of the paper has t - tinit - tfinal in the numerator, which jumps at both ends; the public code
    does not.)

    Args:
        initial: b(0), all triplets.
        target: b(T).
        tinit, tfinal: steps of the warm-up and of the final phase.
        deltaT: steps between two masks.
        total_step: T, the optimizer steps of the whole run.

    Raises:
        TypeError, ValueError: an argument that is no integer or out of range, with its value and the remedy.
    """

    initial: int
    target: int
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    total_step: int

    def __post_init__(self) -> None:
        for name in ("initial", "target", "tinit", "tfinal", "deltaT", "total_step"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if self.total_step < 1:
            raise ValueError(
                f"total_step must be at least 1, got {self.total_step}; give the run's optimizer steps"
            )
        if self.tinit < 0 or self.tfinal < 0:
            raise ValueError(f"tinit ({self.tinit}) and tfinal ({self.tfinal}) must not be negative")
        if self.deltaT < 1:
            raise ValueError(f"deltaT must be at least 1, got {self.deltaT}")
        if self.tinit + self.tfinal >= self.total_step:
            raise ValueError(
                f"tinit ({self.tinit}) + tfinal ({self.tfinal}) must be smaller than total_step "
                f"({self.total_step}); shorten the schedule or train longer"
            )
        if self.target < 1:
            raise ValueError(
                f"the target budget must be at least 1 triplet, got {self.target}; raise target_r"
            )
        if self.target > self.initial:
            raise ValueError(
                f"the target budget ({self.target} triplets) exceeds the initial one ({self.initial})"
            )

    @property
    def final_step(self) -> int:
        """The step whose mask is final."""
        return min(self.total_step - self.tfinal, self.total_step - 1)

    def budget(self, t: int) -> int:
        """b(t), in triplets over all matrices."""
        if t >= self.final_step:
            return self.target
        if t <= self.tinit:
            return self.initial
        progress = 1 - (t - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        return int((self.initial - self.target) * progress**3 + self.target)

    def masks_at(self, t: int) -> bool:
        """Whether step t selects triplets anew."""
        if t >= self.final_step:
            return t == self.final_step
        return t > self.tinit and t % self.deltaT == 0


@dataclass(kw_only=True)
class Position:
    """Where a run is in its schedule.

    Args:
        t: steps taken.
        is_final: the mask of the final step has been made.
        is_over: the run has ended; checkpoints may drop the pruned triplets.
        updates: steps whose gradients the statistics took in.
    """

    t: int = 0
    is_final: bool = False
    is_over: bool = False
    updates: int = 0
