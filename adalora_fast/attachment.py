"""The tie between an allocator and the optimizer whose steps it follows."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adalora_fast.distributed import all_finite


class Attachment:
    """Knows whether ``optimizer`` has stepped since the allocator last did.

    Args:
        optimizer: the one that trains the adapter (wrapped ones, as Accelerate's, are unwrapped).
        parameters: returns the adapter's parameters.
        step: called after every step of the optimizer; None leaves that to the user.
        before: hook of the optimizer (itself, args, kwargs), called before every step.

    Raises:
        ValueError: it is no torch optimizer, or holds none of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], Iterable[Tensor]],
        step: Callable[[], None] | None,
        before: Callable[[torch.optim.Optimizer, tuple, dict], None] | None = None,
    ) -> None:
        while not hasattr(optimizer, "register_step_post_hook") or hasattr(optimizer, "optimizer"):
            if not hasattr(optimizer, "optimizer"):
                raise ValueError(
                    f"{type(optimizer).__name__} is no torch optimizer; call allocator.step() by hand"
                )
            optimizer = optimizer.optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in parameters()):
            raise ValueError(
                "this optimizer holds none of the adapter's parameters; attach the one that trains them"
            )
        self._parameters, self._step = parameters, step
        self._has_stepped = False
        self._hooks = [optimizer.register_step_post_hook(self._after_step)]
        if before is not None:
            self._hooks.append(optimizer.register_step_pre_hook(before))

    def detach(self) -> None:
        """Follow the optimizer no longer."""
        for hook in self._hooks:
            hook.remove()

    def _after_step(self, optimizer, args, kwargs) -> None:
        self._has_stepped = True
        if self._step is not None:
            self._step()

    def check_order(self) -> None:
        """The allocator's step begins: the optimizer must have stepped since the last one.

        Raises:
            RuntimeError: it has not, although all gradients are finite.
        """
        if not self._has_stepped:
            present = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
            if all_finite(present):
                raise RuntimeError(
                    "allocator.step() was called without an optimizer.step() since the last one; call it "
                    "once, after optimizer.step() and before zero_grad()"
                    + (" (attach() already does: remove the call)" if self._step is not None else "")
                )
        self._has_stepped = False
