"""RankAllocator: moves the rank budget to the triplets that matter most, once per optimizer step.

Order in a training step: ``loss.backward()`` → clip → ``optimizer.step()`` → ``allocator.step()`` →
``zero_grad()``.
"""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from adalora_fast.allocator_state import AllocatorState, load_state, save_state
from adalora_fast.nn import Factors, adapted_layers
from adalora_fast.ops import allocate_, apply_mask_, importance_scores, importance_update_
from adalora_fast.ops.importance import layout_of, reference
from adalora_fast.schedule import BudgetSchedule
from adalora_fast.scores import get_score, resolve_smoothing, statistic_names, user_signals
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
        capturable: make :meth:`step` part of a CUDA graph; not yet possible.

    Raises:
        ValueError, TypeError: any argument out of range, or a model without adapted layers.
        NotImplementedError: ``capturable=True``.
    """

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
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise NotImplementedError(
                "capturable=True needs a measured run on a GPU that shows a replayed step equal to an eager "
                "one, and there is none yet; use capturable=False, which does not wait for the device either"
            )
        self._layers = dict(adapted_layers(model) if layers is None else layers)
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no adapted layer; make some with AdaLoraLinear.from_linear"
            )
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 < beta < 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {beta}")
        if score_gradient not in SCORE_GRADIENTS:
            raise ValueError(f"score_gradient {score_gradient!r} is not one of {SCORE_GRADIENTS}")
        self.score = get_score(score)
        self.smoothing = resolve_smoothing(self.score, smoothing)
        self.beta1, self.beta2, self.score_gradient = beta1, beta2, score_gradient
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
        self._optimizer: torch.optim.Optimizer | None = None
        self._automatic = self._optimizer_has_stepped = False
        self._task_gradient = TaskGradient()
        self.keep_whole = False  # whoever ends the run says so with finalize(); the last step alone does not
        self.reset()
        self.is_final = self.is_over = finished
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
        state = {name: value for name, value in self.__dict__.items() if name != "_hook"}
        return {**state, "_optimizer": None}

    def reset(self) -> None:
        """Forget everything that was learnt: the run starts again at t = 0 with every triplet kept."""
        self.t = 0
        self.is_final = False  # the mask of the final step has been made
        self.is_over = False  # the run has ended: checkpoints may drop the pruned triplets
        self._user_state: dict[str, Tensor] = {}
        self._task_gradient.forget()
        self._allocate_statistics()

    def _allocate_statistics(self) -> None:
        parameters = self._parameters()
        self._device, self._dtype = _placement(parameters)
        self._shapes = [parameter.shape for parameter in parameters]
        rows = len(self._statistic_names())
        size = layout_of(parameters, self.score.name).size
        self._statistics = torch.zeros(rows, size, dtype=self._dtype, device=self._device)
        self._updates = torch.zeros(len(parameters), dtype=torch.int64, device=self._device)
        self._update_count = 0
        self._mask = torch.ones(self.total_rank(), dtype=torch.bool, device=self._device)
        self._scores: Tensor | None = None  # those that the mask was made of
        self._said_nan = False

    def total_rank(self) -> int:
        """The triplets that exist, pruned ones included."""
        return sum(factors.lora_E.shape[0] for factors in self._factors())

    def _statistic_names(self) -> tuple[str, ...]:
        return statistic_names(self.score.name, self.smoothing)

    def _factors(self) -> list[Factors]:
        return [find() for find in self._layers.values()]

    def _parameters(self) -> list[Tensor]:
        """A_0, E_0, B_0, A_1, ... (looked up anew each time: a parameter object may be replaced)."""
        return [parameter for factors in self._factors() for parameter in factors]

    @property
    def budget(self) -> int:
        """b(t) of the last step that was taken (b(0) before the first)."""
        return self.schedule.budget(max(self.t - 1, 0)) if not self.is_final else self.schedule.target

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
        t = self.t if t is None else t
        if not isinstance(t, int) or t < 0:
            raise ValueError(f"the step must be an integer of at least 0, got {t!r}")
        self._check_order()
        if self.is_final:
            apply_mask_(self._mask, self._lambdas())
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
        self.t = t + 1
        self.is_over = self.is_over or (self.t >= self.schedule.total_step and not self.keep_whole)
        self._task_gradient.forget()

    @torch.no_grad()
    def finalize(self) -> None:
        """End the run: where the final budget was not reached, prune to it now, with a warning."""
        if not self.is_final:
            _warn(
                f"the run ended after {self.t} of {self.schedule.total_step} steps, before the final "
                f"allocation (step {self.schedule.final_step}); it is pruned from {self.budget} to "
                f"{self.schedule.target} triplets now"
            )
            self._make_final()
        else:
            apply_mask_(self._mask, self._lambdas())  # whatever the last optimizer step brought back
        self.is_over = True

    def _make_final(self) -> None:
        if self._update_count < self.score.min_updates:
            _warn(
                f"the final allocation rests on {self._update_count} updates of the statistics; train longer"
            )
        self._prune(self.schedule.target, final=True)
        self.is_final = True
        self._statistics = self._statistics[:, :0]  # never read again
        self._user_state = {}

    def _lambdas(self) -> list[Tensor]:
        return [factors.lora_E for factors in self._factors()]

    def _prune(self, budget: int, final: bool = False) -> None:
        parameters = self._parameters()
        if self.score.function is None:
            scores = importance_scores(parameters, self._statistics, self.score.name, self.smoothing)
        else:
            scores = reference.triplet_scores(parameters, self._statistics, self.score.name, self.smoothing)
        kept = torch.full((), budget, dtype=torch.int64, device=scores.device)
        if not final:  # too few updates keep everything; only the device knows which counted
            kept = torch.where(self._updates.max() < self.score.min_updates, scores.numel(), kept)
        self._mask, self._scores = allocate_(scores, kept, self._lambdas()), scores

    def _update_statistics(self) -> None:
        parameters = self._parameters()
        grads = [parameter.grad for parameter in parameters]
        if all(grad is None for grad in grads):
            raise ValueError(
                "no adapter parameter has a gradient; call allocator.step() after loss.backward() "
                "and before zero_grad()"
            )
        self._check_placement(parameters)
        if self.score_gradient == "task":
            grads = self._task_gradient.of(parameters, grads, self._dtype)
        if self.score.function is None:
            importance_update_(
                parameters,
                grads,
                self._statistics,
                self._updates,
                self.score.name,
                self.smoothing,
                self.beta1,
                self.beta2,
            )
        else:
            self._update_user_statistics(parameters, grads)
        self._update_count += 1

    def _check_placement(self, parameters: list[Tensor]) -> None:
        """Follow a model that was moved or cast; refuse one whose layers changed shape."""
        if [parameter.shape for parameter in parameters] != self._shapes:
            raise ValueError("adapter shapes changed since the allocator was made; call rebind() on it")
        device, dtype = _placement(parameters)
        if (device, dtype) != (self._device, self._dtype):
            self._device, self._dtype = device, dtype
            self._statistics = self._statistics.to(device, dtype)
            self._updates, self._mask = self._updates.to(device), self._mask.to(device)
            self._user_state = {key: value.to(device) for key, value in self._user_state.items()}

    def _update_user_statistics(self, parameters: list[Tensor], grads: list[Tensor | None]) -> None:
        """A registered score's path: plain PyTorch, one call per shape, and a look at the finite flag."""
        layout = layout_of(parameters, self.score.name)
        taken = user_signals(self.score, layout, parameters, grads, self._user_state, self._dtype)
        if taken is None:
            return
        values, self._user_state = taken
        alive = torch.tensor([grad is not None for grad in grads], device=self._device)
        names = self._statistic_names()
        for group, value in zip(layout.groups, values, strict=True):
            rows = {name: group.view(self._statistics[row]) for row, name in enumerate(names)}
            moving = alive[list(group.members)].to(self._dtype).view(-1, 1, 1)
            reference.smooth_(rows, value, self.smoothing, moving, self.beta1, self.beta2)
        self._updates.add_(alive)

    def note_orthogonality(self, upstream: Tensor, stacks: list[Tensor]) -> None:
        """Called by the orthogonality loss in its backward, where ``score_gradient`` is ``"task"``."""
        self._task_gradient.note(upstream, stacks, self._parameters())

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
        while not hasattr(optimizer, "register_step_post_hook") or hasattr(optimizer, "optimizer"):
            if not hasattr(optimizer, "optimizer"):
                raise ValueError(
                    f"{type(optimizer).__name__} is no torch optimizer; call allocator.step() by hand"
                )
            optimizer = optimizer.optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in self._parameters()):
            raise ValueError(
                "this optimizer holds none of the adapter's parameters; attach the one that trains them"
            )
        if self._optimizer is not None:
            raise RuntimeError("an optimizer is attached already; call detach() first")
        self._optimizer, self._automatic, self._optimizer_has_stepped = optimizer, automatic, False
        self._hook = optimizer.register_step_post_hook(self._after_optimizer_step)

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        if self._optimizer is not None:
            self._hook.remove()
            self._optimizer = None

    def _after_optimizer_step(self, optimizer, args, kwargs) -> None:
        self._optimizer_has_stepped = True
        if self._automatic:
            self.step()

    def _check_order(self) -> None:
        if self._optimizer is None:
            return
        if not self._optimizer_has_stepped:
            present = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            if all(grad.isfinite().all() for grad in present):
                raise RuntimeError(
                    "allocator.step() was called without an optimizer.step() since the last one; call it "
                    "once, after optimizer.step() and before zero_grad()"
                    + (" (attach() already does: remove the call)" if self._automatic else "")
                )
        self._optimizer_has_stepped = False

    def ranks(self) -> dict[str, int]:
        """Name of every layer and the number of its triplets that are kept. Waits for the device."""
        return {name: sum(kept) for name, kept in self.rank_pattern().items()}

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Name of every layer and, per triplet, whether it is kept. Waits for the device."""
        kept = self._mask.tolist()
        pattern, start = {}, 0
        for name, factors in zip(self._layers, self._factors(), strict=True):
            stop = start + factors.lora_E.shape[0]
            pattern[name] = kept[start:stop]
            start = stop
        self._report_nan(pattern)
        return pattern

    def _report_nan(self, pattern: dict[str, list[bool]]) -> None:
        """Say once that scores were no numbers, where the device is waited for anyway."""
        if self._said_nan or self._scores is None or len(self._scores) != len(self._mask):
            return
        wrong = self._scores.isnan().tolist()
        if any(wrong):
            owners = [name for name, kept in pattern.items() for _ in kept]
            first = owners[wrong.index(True)]
            self._said_nan = True
            _warn(
                f"{sum(wrong)} of {len(wrong)} triplets have no number as their {self.score.name} score, the "
                f"first in {first}; they are pruned before all others"
            )

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
        schedule = self.schedule
        self.set_schedule(
            tinit=schedule.tinit,
            tfinal=schedule.tfinal,
            deltaT=schedule.deltaT,
            total_step=schedule.total_step,
        )
        self.reset()
        self.is_final = self.is_over = finished

    def state_dict(self) -> AllocatorState:
        """Everything a resumed run needs: step, flags, mask, statistics; tensors are copies on the CPU."""
        return save_state(self)

    def load_state_dict(self, state: AllocatorState) -> None:
        """Continue from ``state``; nothing is changed unless all of it fits.

        Raises:
            ValueError: it belongs to other layers, another score or smoothing, or is damaged.
        """
        load_state(self, state)


def _placement(parameters: list[Tensor]) -> tuple[torch.device, torch.dtype]:
    """Where statistics live and in which type: float64 if any parameter is, else float32."""
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"adapter parameters lie on several devices ({sorted(map(str, devices))}); use one")
    wide = any(parameter.dtype == torch.float64 for parameter in parameters)
    return devices.pop(), torch.float64 if wide else torch.float32


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
