"""The task's part of a gradient: what is left when the orthogonality term's part is taken out again."""

from functools import partial

import torch
from torch import Tensor

from adalora_fast.distributed.processes import Processes
from adalora_fast.ops.orthogonality import gradients


class TaskGradient:
    """Remembers, over one optimizer step, what the orthogonality term adds to the raw gradients.

    Clipping and unscaling multiply every gradient by one factor c between backward and the optimizer's step.
    c = <g, g_raw> / <g_raw, g_raw> is read off the factors that the term reaches, and the term's raw part is
    taken out with the same factor: g_task = g - c · γ · dR/dw. Works in one process: gradients averaged over
    processes are no multiple of the raw ones.
    """

    def __init__(self) -> None:
        self.forget()

    def __getstate__(self) -> dict:
        empty = {"_raw": {}, "_grads": {}, "_hooks": {}, "_added": {}}
        return {"_stacks": None, "_reference": None, **empty}  # a copy starts its own step

    def forget(self) -> None:
        """Start the next optimizer step."""
        for hook in getattr(self, "_hooks", {}).values():
            hook.remove()
        self._stacks: list[Tensor] | None = None
        self._raw: dict[int, Tensor] = {}
        self._grads: dict[int, Tensor] = {}
        self._hooks: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self._added: dict[int, Tensor] = {}
        self._reference: tuple[Tensor, Tensor] | None = None

    def note_added(self, added: dict[int, Tensor], parameters: list[Tensor], is_scaled: bool) -> None:
        """The term's gradient was added to ``.grad`` right before the optimizer's step.

        Args:
            added: what was added, by ``id`` of the parameter.
            parameters: A_0, E_0, B_0, A_1, ...
            is_scaled: the gradients are a multiple of the true ones, which the optimizer's own step undoes.

        Raises:
            RuntimeError: several processes train together.
        """
        _refuse_several()
        self._added = added
        if is_scaled:
            first = next(parameter for parameter in parameters if id(parameter) in added)
            self._reference = first, first.grad.clone()

    def note(self, upstream: Tensor, stacks: list[Tensor], parameters: list[Tensor]) -> None:
        """Called in a backward, before any gradient is stored: the term's gradient is ``upstream`` times
        ``stacks``.

        Raises:
            RuntimeError: several processes train together.
        """
        _refuse_several()
        reached = {
            i: parameter for i, parameter in enumerate(parameters) if i % 3 != 1 and parameter.requires_grad
        }
        if all(p.grad is None or not p.grad.any() for p in reached.values()):
            self.forget()  # zeroed since: what was noted belongs to a skipped step
        parts = [upstream * stack for stack in stacks]
        if self._stacks is not None:
            parts = [old + new for old, new in zip(self._stacks, parts, strict=True)]
        self._stacks = parts
        for i, parameter in reached.items():
            if i not in self._hooks:
                self._hooks[i] = parameter.register_post_accumulate_grad_hook(partial(self._keep_raw, i))

    def _keep_raw(self, i: int, parameter: Tensor) -> None:
        """The gradient so far; a new gradient tensor means that the last step was skipped and its own
        zeroed.
        """
        if self._grads.get(i, parameter.grad) is not parameter.grad:
            self.forget()
            return
        self._grads[i] = parameter.grad
        self._raw[i] = parameter.grad.clone()

    def of(
        self, parameters: list[Tensor], grads: list[Tensor | None], dtype: torch.dtype
    ) -> list[Tensor | None]:
        """``grads`` (of A_0, E_0, B_0, A_1, ...) without the term's part; None for the layers that the task
        did not reach, where λ, which the term leaves alone, has no gradient.
        """
        grads = self._without_added(parameters, grads)
        pairs = [
            (grads[i].to(dtype).flatten(), raw.to(dtype).flatten())
            for i, raw in self._raw.items()
            if grads[i] is not None
        ]
        if self._stacks is None or not pairs:
            return grads
        square = torch.stack([raw.dot(raw) for _, raw in pairs]).sum()
        factor = torch.stack([now.dot(raw) for now, raw in pairs]).sum() / square
        factor = torch.where(square == 0, 1.0, factor)
        result = list(grads)
        both = gradients(self._stacks, parameters[0::3], parameters[2::3])
        for kind, parts in zip((0, 2), both, strict=True):
            for layer, part in enumerate(parts):
                position = 3 * layer + kind
                if grads[3 * layer + 1] is None and parameters[3 * layer + 1].requires_grad:
                    result[position] = None
                elif position in self._raw and result[position] is not None:
                    result[position] = result[position] - (factor * part).to(part.dtype)
        return result

    def _without_added(self, parameters: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        if not self._added:
            return grads
        factor: Tensor | float = 1.0
        if self._reference is not None:
            first, before = self._reference
            square = before.flatten().dot(before.flatten())
            factor = torch.where(square == 0, 1.0, first.grad.flatten().dot(before.flatten()) / square)
        parts = [self._added.get(id(parameter)) for parameter in parameters]
        return [
            grad if grad is None or part is None else grad - factor * part
            for grad, part in zip(grads, parts, strict=True)
        ]


def _refuse_several() -> None:
    if Processes().are_several():
        raise RuntimeError(
            "score_gradient='task' works in one process only; use 'total' for distributed runs"
        )
