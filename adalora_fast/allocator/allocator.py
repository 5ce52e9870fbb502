"""RankAllocator: moves the rank budget to the triplets that matter most, once per optimizer step.

Order in a training step: ``loss.backward()`` → clip → ``optimizer.step()`` → ``allocator.step()`` →
``zero_grad()``.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from adalora_fast.distributed.processes import Processes, add_, allocate_, apply_mask_, whole
from adalora_fast.nn import Factors, adapted_layers, nothing_adapted
from adalora_fast.nn.calls import call_every_layer

from .attachment import Attachment
from .copies import add_to_optimizers_, mask_optimizers_
from .gradients import Gradients, versions
from .guard import UntrainedLayers
from .layers import AllocatedLayers, Snapshot
from .regulariser import Regulariser
from .schedule import BudgetSchedule, Position
from .scores import Score, get_score, resolve_smoothing
from .stability import check_stability, defended, exchange
from .state import AllocatorState, load_state, save_state
from .statistics import Statistics
from .task_gradient import TaskGradient

SCORE_GRADIENTS = ("total", "task")
WEIGHTS = ("after", "before")


class RankAllocator(AllocatedLayers):
    """Scores the triplets (P column, λ, Q row) of all adapted layers and keeps the best b(t) of them.

    Statistics follow AdaLoRA (arXiv 2303.10512, eq. 7-11) with w after the optimizer's step, as in the public
    code; the budget is :class:`BudgetSchedule`'s; exactly b(t) triplets are kept, ties go to the lower layer,
    then the lower triplet. Nothing but :meth:`ranks`, :meth:`rank_pattern` and saving waits for the device.

    Args:
        model: a model with ``AdaLoraLinear`` layers (or any modules with a method ``factors()``). The
            allocator becomes its attribute ``rankallocator``.
        target_r: mean rank of a layer at the end.
        tinit, tfinal, deltaT, total_step: the schedule, in optimizer steps.
        score: ``sensitivity``, ``movement``, ``fisher``, ``gsnr``, ``magnitude``, a registered name or a
            :class:`adalora_fast.allocator.scores.Score`.
        smoothing: ``ema_uncertainty``, ``ema``, ``sum``, ``none``; None takes the score's default.
        beta1, beta2: decay of Ī (and gsnr's moments) and of Ū, in (0, 1).
        target_total_rank: the final budget in triplets, instead of ``target_r`` times the number of layers.
        score_gradient: ``"total"`` scores the full gradient, ``"task"`` without the orthogonality term's
            part.
        weights: the w of the scores, ``"after"`` the optimizer's step as in the public code, or ``"before"``
            it as in the paper's Algorithm 1, at which the gradient was taken. That needs :meth:`attach`, and
            one more copy of the factors.
        triplet: ``"full"`` is eq. 7; ``"lambda"`` scores λ's own entry alone, S = s(λ), which needs one entry
            in 1 + d1 + d2 (of P and Q nothing is read but whether they have gradients, so that a gradient
            of theirs which is not finite no longer stops the update).
        hysteresis: a pruned triplet returns only if it beats a kept one by so many interquartile ranges of
            the scores (:mod:`adalora_fast.allocator.stability`); 0 is AdaLoRA's and PEFT's.
        remember: a triplet that returns goes on from the λ that it was pruned with
            (:mod:`adalora_fast.allocator.stability`); False is AdaLoRA's and PEFT's.
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

    _when_capturable: "type[RankAllocator]"  # `capture` puts its class here

    def __new__(cls, *args, capturable: bool = False, **options) -> "RankAllocator":
        return super().__new__(cls._when_capturable if capturable and cls is RankAllocator else cls)

    def __init__(
        self,
        model: nn.Module,
        *,
        total_step: int,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        score: str | Score = "sensitivity",
        smoothing: str | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
        target_total_rank: int | None = None,
        score_gradient: str = "total",
        weights: str = "after",
        triplet: str = "full",
        hysteresis: float = 0.0,
        remember: bool = False,
        layers: Mapping[str, Callable[[], Factors | None]] | None = None,
        finished: bool = False,
        capturable: bool = False,  # for __new__
    ) -> None:
        self._layers = dict(adapted_layers(model) if layers is None else layers)
        if layers is None:
            call_every_layer(model)
        if not self._layers:
            raise ValueError(nothing_adapted(model))
        if score_gradient not in SCORE_GRADIENTS:
            raise ValueError(f"score_gradient {score_gradient!r} is not one of {SCORE_GRADIENTS}")
        self.score = get_score(score)
        self.smoothing = resolve_smoothing(self.score, smoothing)
        check_weights(weights)
        check_stability(hysteresis, remember)
        self.beta1, self.beta2, self.score_gradient = beta1, beta2, score_gradient
        self.weights, self.triplet = weights, triplet
        self.hysteresis, self.remember = hysteresis, remember
        self.keep_terms = False  # whether masks keep what S is made of, see score_terms()
        self._statistics = Statistics(self.score, self.smoothing, beta1, beta2, triplet)
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
        self._model, self._gradients, self._is_copy = model, Gradients(), False
        self._task_gradient = TaskGradient()
        self.regulariser: Regulariser | None = None  # the orthogonality term, where its weight is known
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
        return {**self.__dict__, "_attachment": None, "_weights_before": None, "_is_copy": True}

    def is_stale_copy(self) -> bool:
        """Whether this is a copy from before the final mask, and its weights changed without its steps."""
        return self._is_copy and not self.is_final and versions(self.lambdas()) > 0

    def reset(self) -> None:
        """Forget everything that was learnt: the run starts again at t = 0 with every triplet kept."""
        self._task_gradient.forget()
        self._gradients.forget()
        self._weights_before: list[Tensor] | None = None
        self._statistics.reset(self.parameters())
        self._mask = torch.ones(self.total_rank(), dtype=torch.bool, device=self._statistics.device)
        self._mask_before: Tensor | None = None
        self.mask_number = 0  # masks made since the start, or since a state was loaded
        self._scores: Tensor | None = None  # those that the mask was made of
        self._terms: dict[str, Tensor] | None = None  # and what they are made of
        self._remembered = self._statistics.values.new_zeros(self._mask.shape if self.remember else 0)
        self._said_nan = False
        self._untrained = UntrainedLayers(self.schedule.final_step)
        self._go_to(Position())

    def _go_to(self, position: Position) -> None:
        self._position = position
        if position.is_final:
            self._statistics.drop()
            self._remembered = self._remembered[:0]

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

    @property
    def budget(self) -> int:
        """b(t) of the last step that was taken (b(0) before the first)."""
        here = self._here()
        return self.schedule.target if here.is_final else self.schedule.budget(max(here.t - 1, 0))

    @torch.no_grad()
    def step(self, t: int | None = None) -> None:
        """Take in the gradients of the optimizer step just done and, where the schedule says so, prune.

        A step in which no adapter parameter had a gradient changes no statistic, and counts.

        Args:
            t: the step's index, counted from 0; None continues from the last one.

        Raises:
            ValueError: no adapter parameter has a gradient, and it is not known that the step had none: no
                optimizer is attached and no other parameter has one (called after ``zero_grad()``).
            RuntimeError: the attached optimizer has not stepped since the last call (called before
                ``optimizer.step()``, or twice for one).
        """
        position = self._position
        t = position.t if t is None else t
        if not isinstance(t, int) or t < 0:
            raise ValueError(f"the step must be an integer of at least 0, got {t!r}")
        self._check_order()
        if position.is_final:
            self.apply_mask()
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
        self._gradients.remember(self.lambdas())
        self._is_copy = False
        if self.regulariser is not None:
            self.regulariser.note_step()

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
            self.apply_mask()  # whatever the last optimizer step brought back
        self._position.is_over = True

    @torch.no_grad()
    def apply_mask(self, copy: nn.Module | None = None) -> None:
        """Zero λ of the pruned triplets, and its copies in an attached optimizer.

        Args:
            copy: a deep copy of the model with weights of its own, such as an average over the run
                (``AveragedModel``, EMA). Its allocator goes where this one is; its Λ is masked once the mask
                is final.

        Raises:
            ValueError: ``copy`` has no allocator of the same layers.
        """
        if copy is None:
            apply_mask_(self._mask, self.lambdas())
            self._mask_optimizers(self._mask)
        else:
            found = (module.__dict__.get("rankallocator") for module in copy.modules())
            follower = next((f for f in found if f is not None and f.layer_names == self.layer_names), None)
            if follower is None or follower is self:
                raise ValueError(
                    f"{type(copy).__name__} has no allocator of its own for the same layers; give a deep "
                    "copy of the model"
                )
            follower.load_state_dict(self.state_dict())
            if follower.is_final:
                follower.apply_mask()

    def _mask_optimizers(self, mask: Tensor) -> None:
        if self._attachment is not None:
            mask_optimizers_(self._attachment.optimizers, mask, self.lambdas())

    def _make_final(self) -> None:
        self._warn_of_few_updates(self._position.updates)
        self._prune(self.schedule.target, final=True)
        self._go_to(replace(self._position, is_final=True))

    def _warn_of_few_updates(self, updates: int) -> None:
        if updates < self.score.min_updates:
            _warn(
                f"the final allocation rests on {updates} updates of the statistics, too few for the "
                f"{self.score.name} score: the triplets of the largest |λ| are kept; train longer"
            )

    def _prune(self, budget: int, final: bool = False) -> None:
        parameters = self.parameters()
        scores = self._statistics.scores(parameters)
        if self.keep_terms:
            self._terms = self._statistics.terms(parameters)
        kept = torch.full((), budget, dtype=torch.int64, device=scores.device)
        if final:
            scores = self._unless_unlearnt(scores)
        else:
            kept = self._unless_too_early(kept)
        current = self._current_lambdas() if self.remember else None
        mask = allocate_(self._in_order(scores), kept, self.lambdas(), self.processes)
        if current is not None:
            self._exchange(mask, current)
        self._keep(mask, scores)
        self._mask_optimizers(self._mask)

    def _in_order(self, scores: Tensor) -> Tensor:
        """What the selection goes by."""
        return defended(scores, self._mask, self.hysteresis) if self.hysteresis else scores

    def _current_lambdas(self) -> Tensor:
        """λ of every triplet [T], in the statistics' type."""
        values = [values.detach().flatten() for values in whole(self.lambdas())]
        return torch.cat(values).to(self._statistics.dtype)

    def _exchange(self, mask: Tensor, current: Tensor) -> None:
        """Give λ that return what is remembered of them, and remember those that go."""
        added, remembered = exchange(self._remembered, self._mask, mask, current)
        self._remembered.copy_(remembered)
        add_(added, self.lambdas())
        if self._attachment is not None:
            add_to_optimizers_(self._attachment.optimizers, added, self.lambdas())

    def _unless_unlearnt(self, scores: Tensor) -> Tensor:
        """Too few updates leave |λ| to decide, all that is known of triplets that were trained elsewhere."""
        sizes = self._current_lambdas().abs().nan_to_num(nan=-1.0)  # pruned before all others
        return torch.where(self._statistics.enough(), scores, sizes)

    def _unless_too_early(self, budget: Tensor) -> Tensor:
        """Too few updates keep everything; only the device knows which counted."""
        return torch.where(self._statistics.enough(), budget, self._mask.numel())

    def _keep(self, mask: Tensor, scores: Tensor) -> None:
        self._mask_before, self._mask, self._scores = self._mask, mask, scores
        self.mask_number += 1

    def _update_statistics(self) -> None:
        parameters = self.parameters()
        grads = self._gradients.of_step(parameters, self._model, self._attachment)
        self._untrained.look(self._layers, parameters, grads)
        if not self._statistics.fit(parameters):  # the model was moved or cast
            self._statistics.move_to(parameters)
            self._mask, self._remembered = (
                tensor.to(self._statistics.device) for tensor in (self._mask, self._remembered)
            )
        if self.score_gradient == "task":
            grads = self._task_gradient.of(parameters, grads, self._statistics.dtype)
        self._statistics.update_(self._scored_weights(parameters), grads)
        self._position.updates += any(grad is not None for grad in grads)

    def _scored_weights(self, parameters: list[Tensor]) -> list[Tensor]:
        """w of the scores."""
        if self.weights == "after":
            return parameters
        weights, self._weights_before = self._weights_before, None
        if weights is None:
            raise ValueError(
                "weights='before' needs the factors from before the optimizer's step; call attach(optimizer) "
                "before it (AdaLoraCallback does)"
            )
        return weights

    @property
    def orthogonality_note(self) -> Callable[[Tensor, list[Tensor]], None] | None:
        """What the orthogonality loss calls in its backward; None unless ``score_gradient`` is ``"task"``."""
        return self._note_orthogonality if self.score_gradient == "task" else None

    def _note_orthogonality(self, upstream: Tensor, stacks: list[Tensor]) -> None:
        self._task_gradient.note(upstream, stacks, self.parameters())

    def note_added(self, added: dict[int, Tensor], is_scaled: bool) -> None:
        """Called where the orthogonality term is added to the gradients (see :class:`TaskGradient`)."""
        if self.score_gradient == "task":
            self._task_gradient.note_added(added, self.parameters(), is_scaled)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.regulariser is not None:
            self.regulariser.before_step(optimizer, args, kwargs)
        if self.weights == "before" and not self._position.is_final:
            self._weights_before = [parameter.detach().clone() for parameter in self.parameters()]

    def follow_regulariser(self) -> None:
        """Others take an optimizer step for which this process has no data."""
        if self.regulariser is not None and self._attachment is not None:
            self.regulariser.follow()

    def attach(self, optimizer: torch.optim.Optimizer, *, automatic: bool = True) -> None:
        """Tie the allocator to ``optimizer``, so that an allocation cannot silently not run.

        Args:
            optimizer: the one that trains the adapter. Of wrappers (Accelerate's, SAM, Lookahead, ...) the
                one inside is followed, see :func:`adalora_fast.allocator.attachment.innermost`.
            automatic: step the allocator after every ``optimizer.step()``; no call is needed then. Otherwise
                :meth:`step` is yours to call, and raises where the optimizer has not stepped. An optimizer
                step that a ``GradScaler`` skips does not count; a fused optimizer skips it inside its own
                step, which counts.

        Copies of Λ that the optimizer keeps (schedule-free, slow weights) are pruned with the model's. A
        warning comes where the weights change a hundred times and the optimizer's ``step()`` is not called.

        Raises:
            ValueError: the optimizer holds none of the adapter's parameters, or calls no hooks.
            RuntimeError: another optimizer is attached already.
        """
        if self._attachment is not None:
            raise RuntimeError("an optimizer is attached already; call detach() first")
        step = self.step if automatic else None
        self._attachment = Attachment(optimizer, self.parameters, step, self._before_step)

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    @property
    def is_attached(self) -> bool:
        """Whether it follows an optimizer."""
        return self._attachment is not None

    def _check_order(self) -> None:
        if self._attachment is not None:
            self._attachment.check_order()

    def rebind(self, *, finished: bool = False, at: Position | None = None) -> None:
        """Start anew with the layers as they are, after their ranks changed; an attached optimizer stays.

        Args:
            finished: the layers were cut down to their final ranks; nothing is left to prune.
            at: where the run is; None is its start, or its end if it is finished.
        """
        self._initial = self.total_rank()
        self._target = self._initial if finished else self._wanted
        self.set_total_step(self.schedule.total_step)  # as before, for the new budgets
        self.reset()
        self._go_to(at or Position(is_final=finished, is_over=finished))
        if self._attachment is not None:
            self._attachment.follow_parameters()

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

    def snapshot(self) -> Snapshot:
        """What was learnt and decided so far, in memory: the tensors themselves."""
        return Snapshot(
            position=self._here(),
            mask=self._mask,
            values=self._statistics.values,
            updates=self._statistics.updates,
            user_state=self._statistics.user_state,
            remembered=self._remembered,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there; all of it fits."""
        self._mask, self._mask_before, self.mask_number = snapshot.mask, None, 0
        self._remembered = snapshot.remembered
        self._is_copy = False
        self._gradients.forget()
        self._statistics.restore(snapshot.values, snapshot.updates, snapshot.user_state)
        self._go_to(snapshot.position)


def check_weights(weights: str) -> None:
    """ValueError where these are no weights that can be scored."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is not one of {WEIGHTS}")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
