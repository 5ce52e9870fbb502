"""The task's part of a gradient: what is left when the orthogonality term's part is taken out again."""

import torch
from torch import Tensor

from adalora_fast.ops.orthogonality import gradients


class TaskGradient:
    """Remembers, over one optimizer step, what the orthogonality term adds to the raw gradients.

    Clipping and unscaling multiply every gradient by one factor c between backward and the optimizer's step.
    c is read off one parameter whose raw gradient is kept, and the term's raw part is taken out with the same
    factor: g_task = g - c · γ · dR/dw. Works in one process: gradients averaged over processes are no
    multiple of the raw ones.
    """

    def __init__(self) -> None:
        self._probe_hook = None
        self.forget()

    def __getstate__(self) -> dict:
        return {"_probe_hook": None, "_stacks": None, "_raw": None}  # a copy starts its own step

    def forget(self) -> None:
        """Start the next optimizer step."""
        self._stacks: list[Tensor] | None = None
        self._raw: Tensor | None = None

    def note(self, upstream: Tensor, stacks: list[Tensor], probe: Tensor) -> None:
        """Called in a backward: the term's gradient is ``upstream`` times ``stacks``.

        Raises:
            RuntimeError: several processes train together.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(
                "score_gradient='task' works in one process only; use 'total' for distributed training"
            )
        parts = [upstream * stack for stack in stacks]
        if self._stacks is not None:
            parts = [old + new for old, new in zip(self._stacks, parts, strict=True)]
        self._stacks = parts
        if self._probe_hook is None:
            self._probe_hook = probe.register_post_accumulate_grad_hook(self._keep_raw)

    def _keep_raw(self, parameter: Tensor) -> None:
        self._raw = parameter.grad.clone()

    def of(
        self, parameters: list[Tensor], grads: list[Tensor | None], dtype: torch.dtype
    ) -> list[Tensor | None]:
        """``grads`` (of A_0, E_0, B_0, A_1, ...) without the term's part; the first is the probe's."""
        if self._stacks is None or self._raw is None or grads[0] is None:
            return grads
        now, raw = grads[0].to(dtype).flatten(), self._raw.to(dtype).flatten()
        square = raw.dot(raw)
        factor = torch.where(square == 0, 1.0, now.dot(raw) / square)
        result = list(grads)
        for kind, parts in zip(
            (0, 2), gradients(self._stacks, parameters[0::3], parameters[2::3]), strict=True
        ):
            for layer, part in enumerate(parts):
                position = 3 * layer + kind
                if result[position] is not None:
                    result[position] = result[position] - (factor * part).to(part.dtype)
        return result
