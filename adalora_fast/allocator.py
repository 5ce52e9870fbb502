"""RankAllocator: moves the rank budget to the triplets that matter most, once per optimizer step.

Order in a training step: ``loss.backward()`` → clip → ``optimizer.step()`` → ``allocator.step()`` →
``zero_grad()``.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from adalora_fast.allocator_state import AllocatorState, load_state, save_state
from adalora_fast.attachment import Attachment
from adalora_fast.distributed import Processes, allocate_, apply_mask_
from adalora_fast.guard import UntrainedLayers, about_nan
from adalora_fast.nn import Factors, adapted_layers
from adalora_fast.nn.calls import call_every_layer
from adalora_fast.schedule import BudgetSchedule, Position
from adalora_fast.scores import get_score, resolve_smoothing
from adalora_fast.statistics import Statistics
from adalora_fast.task_gradient import TaskGradient

SCORE_GRADIENTS = ("total", "task")


class RankAllocator:
    """Scores the triplets (P column, λ, Q row) of all adapted layers and keeps the best b(t) of them.

    Statistics follow AdaLoRA (arXiv 2303.10512, eq. 7-11) with w after the optimizer's step, as in the public
    code; the budget is :class:`BudgetSchedule`'s; exactly b(t) triplets are kept, ties go to the lower layer,
    then the lower triplet. Nothing but :meth:`ranks`, :meth:`rank_pattern` and saving waits for the device.

    Args:
        model: a model with ``AdaLoraLinear`` layers (or any modules with a method ``factors()``). The
            allocator becomes its attribute ``rankallocator``.
        target_r: mean rank of a layer at the end.
        tinit, tfinal, deltaT, total_step: the schedule, in optimizer steps.
        score: ``sensitivity``, ``movement``, ``fisher``, ``gsnr``, ``magnitude`` or a registered name.
        smoothing: ``ema_uncertainty``, ``ema``, ``sum``, ``none``; None takes the score's default.
        beta1, beta2: decay of Ī (and gsnr's moments) and of Ū, in (0, 1).
        target_total_rank: the final budget in triplets, instead of ``target_r`` times the number of layers.
        score_gradient: ``"total"`` scores the full gradient, ``"task"`` without the orthogonality term's
            part.
        layers: name → function returning the layer's :class:`Factors`; None collects them from ``model``.
        finished: the layers were cut down to their final ranks already; nothing is left to prune.
        capturable: :meth:`step` may be captured in a CUDA graph: it takes the same path every time, counts
            on the device and keeps its tensors in their places. It scores and selects at every step, so
            leave it off elsewhere. Reading ``t``, ``is_final``, ``is_over`` and ``budget`` then waits for
            the device.

    Raises:
        ValueError, TypeError: any argument out of range, or a model without adapted layers.
        NotImplementedError: ``capturable=True`` while no GPU has shown it to be right.
    """

    def __new__(cls, *args, capturable: bool = False, **options) -> "RankAllocator":
        if capturable and cls is RankAllocator:
            from adalora_fast.capture import CapturableRankAllocator as cls
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        *,
        total_step: int,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        score: str = "sensitivity",
        smoothing: str | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        target_total_rank: int | None = None,
        score_gradient: str = "total",
        layers: Mapping[str, Callable[[], Factors | None]] | None = None,
        finished: bool = False,
        capturable: bool = False,  # for __new__
    ) -> None:
        self._layers = dict(adapted_layers(model) if layers is None else layers)
        if layers is None:
            call_every_layer(model)
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no adapted layer; make some with AdaLoraLinear.from_linear"
            )
        if score_gradient not in SCORE_GRADIENTS:
            raise ValueError(f"score_gradient {score_gradient!r} is not one of {SCORE_GRADIENTS}")
        self.score = get_score(score)
        self.smoothing = resolve_smoothing(self.score, smoothing)
        self.beta1, self.beta2, self.score_gradient = beta1, beta2, score_gradient
        self._statistics = Statistics(self.score, self.smoothing, beta1, beta2)
        if target_total_rank is None:
            target_total_rank = target_r * len(self._layers)
        self._wanted = target_total_rank
        initial = self.total_rank()
        if finished:
            target_total_rank = initial
        elif target_total_rank >= initial:
            raise ValueError(
                f"the target budget ({target_total_rank} triplets over {len(self._layers)} layers) must be "
                f"smaller than the initial one ({initial}); choose target_r < init_r"
            )
        self._initial, self._target = initial, target_total_rank
        self.set_schedule(tinit=tinit, tfinal=tfinal, deltaT=deltaT, total_step=total_step)
        self._attachment: Attachment | None = None
        self.processes = Processes()  # in a distributed run: who agrees on the mask
        self._task_gradient = TaskGradient()
        self.keep_whole = False  # whoever ends the run says so with finalize(); the last step alone does not
        self.reset()
        self._go_to(Position(is_final=finished, is_over=finished))
        model.rankallocator = self

    def set_schedule(self, *, tinit: int, tfinal: int, deltaT: int, total_step: int) -> None:
        """Replace the schedule (see :class:`BudgetSchedule`, which also says what is refused)."""
        self.schedule = BudgetSchedule(
            initial=self._initial,
            target=self._target,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            total_step=total_step,
        )

    def set_total_step(self, total_step: int) -> None:
        """Change the length of the run only (PEFT's name for it)."""
        now = self.schedule
        self.set_schedule(tinit=now.tinit, tfinal=now.tfinal, deltaT=now.deltaT, total_step=total_step)

    def __getstate__(self) -> dict:
        """A copy of the model gets a copy of the allocator, without the ties to the original's optimizer."""
        return {**self.__dict__, "_attachment": None}

    def reset(self) -> None:
        """Forget everything that was learnt: the run starts again at t = 0 with every triplet kept."""
        self._task_gradient.forget()
        self._statistics.reset(self.parameters())
        self._mask = torch.ones(self.total_rank(), dtype=torch.bool, device=self._statistics.device)
        self._scores: Tensor | None = None  # those that the mask was made of
        self._said_nan = False
        self._untrained = UntrainedLayers(self.schedule.final_step)
        self._go_to(Position())

    def _go_to(self, position: Position) -> None:
        self._position = position
        if position.is_final:
            self._statistics.drop()

    def _here(self) -> Position:
        return self._position

    def _note_end(self) -> None:
        at_end = self._position.t >= self.schedule.total_step and not self.keep_whole
        self._position.is_over = self._position.is_over or at_end

    @property
    def t(self) -> int:
        """Steps taken."""
        return self._here().t

    @property
    def is_final(self) -> bool:
        """The mask of the final step has been made."""
        return self._here().is_final

    @property
    def is_over(self) -> bool:
        """The run has ended: checkpoints may drop the pruned triplets."""
        return self._here().is_over

    @is_over.setter
    def is_over(self, value: bool) -> None:
        self._here().is_over = value

    def total_rank(self) -> int:
        """The triplets that exist, pruned ones included."""
        return sum(factors.lora_E.shape[0] for factors in self.factors())

    def factors(self) -> list[Factors]:
        """Those of every layer, in the order of ties."""
        return [find() for find in self._layers.values()]

    def parameters(self) -> list[Tensor]:
        """A_0, E_0, B_0, A_1, ... (looked up anew each time: a parameter object may be replaced)."""
        return [parameter for factors in self.factors() for parameter in factors]

    def lambdas(self) -> list[Tensor]:
        """E_0, E_1, ..."""
        return [factors.lora_E for factors in self.factors()]

    @property
    def budget(self) -> int:
        """b(t) of the last step that was taken (b(0) before the first)."""
        here = self._here()
        return self.schedule.target if here.is_final else self.schedule.budget(max(here.t - 1, 0))

    @torch.no_grad()
    def step(self, t: int | None = None) -> None:
        """Take in the gradients of the optimizer step just done and, where the schedule says so, prune.

        Args:
            t: the step's index, counted from 0; None continues from the last one.

        Raises:
            ValueError: no adapter parameter has a gradient.
            RuntimeError: the attached optimizer has not stepped since the last call (called before
                ``optimizer.step()``, or twice for one).
        """
        position = self._position
        t = position.t if t is None else t
        if not isinstance(t, int) or t < 0:
            raise ValueError(f"the step must be an integer of at least 0, got {t!r}")
        self._check_order()
        if position.is_final:
            apply_mask_(self._mask, self.lambdas())
        elif t < self.schedule.final_step:
            self._update_statistics()
            if self.schedule.masks_at(t):
                self._prune(self.schedule.budget(t))
        else:
            if t > self.schedule.final_step:
                _warn(
                    f"step {self.schedule.final_step}, the final allocation, was missed; "
                    f"it is made now, at step {t}"
                )
            self._make_final()
        self._position.t = t + 1  # the final allocation made another one
        self._note_end()
        self._task_gradient.forget()

    @torch.no_grad()
    def finalize(self) -> None:
        """End the run: where the final budget was not reached, prune to it now, with a warning."""
        here = self._here()
        if not here.is_final:
            _warn(
                f"the run ended after {here.t} of {self.schedule.total_step} steps, before the final "
                f"allocation (step {self.schedule.final_step}); it is pruned from {self.budget} to "
                f"{self.schedule.target} triplets now"
            )
            self._make_final()
        else:
            apply_mask_(self._mask, self.lambdas())  # whatever the last optimizer step brought back
        self._position.is_over = True

    def _make_final(self) -> None:
        self._warn_of_few_updates(self._position.updates)
        self._prune(self.schedule.target, final=True)
        self._go_to(replace(self._position, is_final=True))

    def _warn_of_few_updates(self, updates: int) -> None:
        if updates < self.score.min_updates:
            _warn(f"the final allocation rests on {updates} updates of the statistics; train longer")

    def _prune(self, budget: int, final: bool = False) -> None:
        scores = self._statistics.scores(self.parameters())
        kept = torch.full((), budget, dtype=torch.int64, device=scores.device)
        if not final:
            kept = self._unless_too_early(kept)
        self._keep(allocate_(scores, kept, self.lambdas(), self.processes), scores)

    def _unless_too_early(self, budget: Tensor) -> Tensor:
        """Too few updates keep everything; only the device knows which counted."""
        return torch.where(self._statistics.enough(), budget, self._mask.numel())

    def _keep(self, mask: Tensor, scores: Tensor) -> None:
        self._mask, self._scores = mask, scores

    def _gradients(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """The parameters and their gradients."""
        parameters = self.parameters()
        grads = [parameter.grad for parameter in parameters]
        if all(grad is None for grad in grads):
            raise ValueError(
                "no adapter parameter has a gradient; call allocator.step() after loss.backward() "
                "and before zero_grad()"
            )
        return parameters, grads

    def _update_statistics(self) -> None:
        parameters, grads = self._gradients()
        self._untrained.look(self._layers, parameters, grads)
        if not self._statistics.fit(parameters):  # the model was moved or cast
            self._statistics.move_to(parameters)
            self._mask = self._mask.to(self._statistics.device)
        if self.score_gradient == "task":
            grads = self._task_gradient.of(parameters, grads, self._statistics.dtype)
        self._statistics.update_(parameters, grads)
        self._position.updates += 1

    def note_orthogonality(self, upstream: Tensor, stacks: list[Tensor]) -> None:
        """Called by the orthogonality loss in its backward, where ``score_gradient`` is ``"task"``."""
        self._task_gradient.note(upstream, stacks, self.parameters())

    def attach(self, optimizer: torch.optim.Optimizer, *, automatic: bool = True) -> None:
        """Tie the allocator to ``optimizer``, so that an allocation cannot silently not run.

        Args:
            optimizer: the one that trains the adapter (wrapped ones, as Accelerate's, are unwrapped).
            automatic: step the allocator after every ``optimizer.step()``; no call is needed then. Otherwise
                :meth:`step` is yours to call, and raises where the optimizer has not stepped. An optimizer
                step that a ``GradScaler`` skips does not count; a fused optimizer skips it inside its own
                step, which counts.

        Raises:
            ValueError: the optimizer holds none of the adapter's parameters.
            RuntimeError: another optimizer is attached already.
        """
        if self._attachment is not None:
            raise RuntimeError("an optimizer is attached already; call detach() first")
        self._attachment = Attachment(optimizer, self.parameters, self.step if automatic else None)

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    def _check_order(self) -> None:
        if self._attachment is not None:
            self._attachment.check_order()

    def ranks(self) -> dict[str, int]:
        """Name of every layer and the number of its triplets that are kept. Waits for the device."""
        return {name: sum(kept) for name, kept in self.rank_pattern().items()}

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Name of every layer and, per triplet, whether it is kept. Waits for the device."""
        kept = self._mask.tolist()
        pattern, start = {}, 0
        for name, factors in zip(self._layers, self.factors(), strict=True):
            stop = start + factors.lora_E.shape[0]
            pattern[name] = kept[start:stop]
            start = stop
        self._report_nan(pattern)
        return pattern

    def scores(self) -> Tensor | None:
        """S of every triplet [T] at the last mask (semantics: s(λ) + mean s(P) + mean s(Q)), layer after
        layer; None before the first.
        """
        return None if self._scores is None else self._scores.detach().clone()

    def _report_nan(self, pattern: dict[str, list[bool]]) -> None:
        """Say once that scores were no numbers, where the device is waited for anyway."""
        if self._said_nan or self._scores is None or len(self._scores) != len(self._mask):
            return
        if (said := about_nan(self._scores, pattern, self.score.name)) is not None:
            self._said_nan = True
            _warn(said)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The adapted layers, in the order of ties."""
        return tuple(self._layers)

    def rebind(self, *, finished: bool = False) -> None:
        """Start anew with the layers as they are, after their ranks changed; an attached optimizer stays.

        Args:
            finished: the layers were cut down to their final ranks; nothing is left to prune.
        """
        self._initial = self.total_rank()
        self._target = self._initial if finished else self._wanted
        self.set_total_step(self.schedule.total_step)  # as before, for the new budgets
        self.reset()
        self._go_to(Position(is_final=finished, is_over=finished))

    def state_dict(self) -> AllocatorState:
        """Everything a resumed run needs: step, flags, mask, statistics; tensors are copies on the CPU. Of
        sharded factors (``fully_shard``) they are gathered: all processes must ask for it then.
        """
        return save_state(self)

    def load_state_dict(self, state: AllocatorState) -> None:
        """Continue from ``state``; nothing is changed unless all of it fits.

        Raises:
            ValueError: it belongs to other layers, another score or smoothing, or is damaged.
        """
        load_state(self, state)

    def _restore(
        self,
        position: Position,
        mask: Tensor,
        values: Tensor,
        updates: Tensor,
        user_state: dict[str, Tensor],
    ) -> None:
        """Go on from there; everything fits."""
        self._mask = mask
        self._statistics.restore(values, updates, user_state)
        self._go_to(position)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
