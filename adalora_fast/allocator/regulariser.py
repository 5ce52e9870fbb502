"""γ · R of a run: its gradient reaches the factors once per optimizer step, whoever builds the loss.

R is the orthogonality term (:func:`adalora_fast.orthogonality_loss`), γ its weight. A fused model adds γ · R
to ``outputs.loss``, as PEFT does. Many training loops differentiate another loss: label smoothing, TRL's
trainers and every ``compute_loss`` that starts from the logits. Others call the model several times in one
step. So the term notes in its backward that it acted, and the attached optimizer asks before each step:

====================  ==========================================================================
since the last step   what happens
====================  ==========================================================================
R acted               nothing more (under ``AdaLoraCallback`` its first backward gave γ ∇R, the
                      following ones zero; under ``attach()`` alone each gave its upstream weight
                      times γ ∇R)
R did not act         γ ∇R is added to the gradients, after clipping and after the all-reduce
no gradient at all    nothing: the adapters took no part in this step
====================  ==========================================================================
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from adalora_fast.distributed.shards import is_running, shards_of
from adalora_fast.nn import orthogonality_of
from adalora_fast.ops.dispatch.tables import is_capturing
from adalora_fast.ops.orthogonality import enlist, noted

from .attachment import closure_of
from .layers import AllocatedLayers

MISSING_FOR = 10  # optimizer steps without R before a warning


class Regulariser:
    """The orthogonality term of one allocator's factors.

    Args:
        allocator: whose factors; it becomes the allocator's attribute ``regulariser``.
        penalty: ``"fro"`` or ``"squared"``.
        weight: returns γ, which may change during a run.

    Attributes:
        once: R ignores the weight that the loss gives to it and acts once per step (:meth:`act_once`).
        scaler: the ``GradScaler`` of the loss, or None.
        acted: whether R has acted since the last optimizer step.
        value: R of the last forward or step, a scalar; None before the first.
    """

    def __init__(self, allocator: AllocatedLayers, penalty: str, weight: Callable[[], float]) -> None:
        self.allocator, self.penalty, self.weight = allocator, penalty, weight
        self.once = False
        self.scaler: torch.amp.GradScaler | None = None
        self.value: Tensor | None = None
        self._enlist()
        allocator.regulariser = self

    def _enlist(self) -> None:
        self._hook: torch.utils.hooks.RemovableHandle | None = None  # during a backward pass
        self._is_captured = False  # R is part of a CUDA graph, whose replays run no Python
        self._reached, self._steps_without = False, 0
        self._gathered: list[bool] | None = None  # which factors were sharded when R was last computed
        self.forget()
        self._number = enlist(self)

    def __getstate__(self) -> dict:
        """A copy of the model gets a regulariser of its own, between two steps."""
        return {**self.__dict__, "scaler": None, "value": None, "_hook": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._enlist()

    def act_once(self, scaler: torch.amp.GradScaler | None) -> None:
        """From here on R acts once per optimizer step, whatever weight a loss gives to it.

        Args:
            scaler: the ``GradScaler`` that multiplies the loss, or None.
        """
        self.once, self.scaler = True, scaler
        self.forget()

    def act_on_request(self) -> None:
        """From here on R's weight is what the loss gives to it."""
        self.once, self.scaler = False, None
        self.forget()

    def forget(self) -> None:
        """The next optimizer step begins: R has not acted in it."""
        self.acted = self._accumulated = False
        self._end_pass()

    def loss(self) -> Tensor:
        """R, differentiable; :meth:`term` is what a loss gets."""
        if is_running():
            self._gathered = [shards_of([factor]) is not None for factor in self._sides()]
        return orthogonality_of(self.allocator.factors(), self.penalty, self.allocator.orthogonality_note)

    def _sides(self) -> list[Tensor]:
        """A_0, B_0, A_1, ..."""
        return [factor for layer in self.allocator.factors() for factor in (layer.lora_A, layer.lora_B)]

    def needs_everybody(self) -> bool:
        """Whether R takes a collective: sharded factors are gathered, also by processes without a loss."""
        return shards_of(self.allocator.lambdas()) is not None

    def begin_forward(self) -> None:
        """A training forward: if the gradients were set to None since R acted, it has not acted for this step
        (a GradScaler skipped the last step, or a backward pass was thrown away).
        """
        if self.acted and all(parameter.grad is None for parameter in self.allocator.parameters()):
            self.forget()

    def term(self) -> Tensor:
        """γ · R, for the loss that the model itself returns."""
        value = self.loss()
        self.value = value.detach()
        return self.noted(self.weight() * value, own=True)

    def noted(self, value: Tensor, own: bool = False) -> Tensor:
        """``value``, whose backward counts as R's. ``own``: it is the model's own term, not the user's."""
        return noted(value, self._number, own)

    def acts(self, grad: Tensor, own: bool) -> Tensor:
        """R's backward runs, with ``grad`` from the loss; returns what goes on to the factors."""
        self._reached = self.acted = True
        if is_capturing(grad.device):
            self._is_captured = True
            return grad.clone()
        if not self.once:
            return grad.clone()
        repeated, self._in_pass = self._accumulated or self._in_pass, True
        self._watch()
        torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
        if not own:
            return grad.clone()
        if repeated:
            return torch.zeros_like(grad)
        one = torch.ones_like(grad)
        return one if self.scaler is None else self.scaler.scale(one)

    def _watch(self) -> None:
        """Learn whether a backward pass ends in ``.grad`` (``torch.autograd.grad`` leaves no trace there)."""
        lead = next((side for side in self._sides() if side.requires_grad), None)
        if lead is not None and self._hook is None:
            self._hook = lead.register_post_accumulate_grad_hook(self._note_accumulation)

    def _note_accumulation(self, _) -> None:
        self._accumulated = True

    def _end_pass(self) -> None:
        self._in_pass = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Hook of the optimizer that trains the factors: add γ ∇R if it has not acted since the last step.

        If the gradients are still scaled (``optimizer.grad_scale``), so is what is added. An optimizer with
        a closure builds its loss later: only what the loss brings counts then.
        """
        if self.weight() > 0 and closure_of(args, kwargs) is None:
            shares = self._missing()
            if shares is not None:
                self._add(shares, getattr(optimizer, "grad_scale", None))
        self.forget()

    def _missing(self) -> list[float] | None:
        """The share of γ ∇R that the gradient of each factor lacks; None if nobody has anything to add."""
        processes = self.allocator.processes
        is_alone = not processes.are_several()
        if is_alone and self.acted:
            return None
        has_gradient = any(parameter.grad is not None for parameter in self.allocator.parameters())
        count = 2 * len(self.allocator.factors())
        if is_alone:
            return [1.0] * count if has_gradient else None
        # Averaged gradients hold R's in part if it acted in some of the processes, so they have to agree.
        acted, having = processes.count((self.acted, has_gradient), self._device)
        if not having or acted == processes.size():
            return None
        # What a process gathered for R was not averaged: it has R's gradient in its own rows, or has not.
        gathered = self._gathered or [False] * count
        own, averaged = float(not self.acted), 1 - acted / processes.size()
        return [own if each else averaged for each in gathered]

    def follow(self) -> None:
        """Another process asks whether R acted, while this one has no data."""
        if self.weight() > 0:
            self.allocator.processes.count((False, False), self._device)

    @property
    def _device(self) -> torch.device:
        return self.allocator.lambdas()[0].device

    @torch.no_grad()
    def _add(self, shares: list[float], scale: Tensor | None) -> None:
        trained = [(f, share) for f, share in zip(self._sides(), shares, strict=True) if f.requires_grad]
        with torch.enable_grad():
            value = orthogonality_of(self.allocator.factors(), self.penalty, None)
            parts = torch.autograd.grad(self.weight() * value, [factor for factor, _ in trained])
        self.value, self._reached = value.detach(), True
        added = {}
        for (factor, share), part in zip(trained, parts, strict=True):
            part = part * share if scale is None else part * share * scale
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            factor.grad.add_(part)
            added[id(factor)] = part
        self.allocator.note_added(added, is_scaled=scale is not None)

    def note_step(self) -> None:
        """The allocator follows an optimizer step: say once that R took no part in the first ones."""
        reached, self._reached = self._reached, False
        if reached or self._is_captured or self._steps_without >= MISSING_FOR or self.weight() == 0:
            return
        self._steps_without += any(parameter.grad is not None for parameter in self.allocator.parameters())
        if self._steps_without == MISSING_FOR:
            warnings.warn(
                f"the orthogonality term reached no gradient in {MISSING_FOR} optimizer steps: the loss that "
                "is differentiated is not the model's outputs.loss. Use AdaLoraCallback or "
                "rankallocator.attach(optimizer), which add it, or add orth_reg_weight * "
                "orthogonality_loss(model) to the loss; orth_reg_weight=0 switches it off",
                UserWarning,
                stacklevel=4,
            )
