"""The tie between an allocator and the optimizer whose steps it follows."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from adalora_fast.distributed import all_finite

INNER = ("optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "base")  # where wrappers keep theirs


def chain_of(optimizer: object) -> list[object]:
    """``optimizer`` and the ones inside it, from the outermost to the one that changes the weights.

    A wrapper keeps its optimizer under one of the names in ``INNER`` (Accelerate's and Lookahead's
    ``optimizer``, SAM's ``base_optimizer``, schedule-free's ``base``). Torch's own distributed wrappers keep
    it as ``optim``; that is followed only where the wrapper's own step calls no hooks, because
    ``ZeroRedundancyOptimizer`` has only a part of the parameters inside.
    """
    chain = [optimizer]
    while True:
        names = INNER if calls_hooks(chain[-1]) else (*INNER, "optim")
        inner = next((found for name in names if _has_step(found := getattr(chain[-1], name, None))), None)
        if inner is None or any(inner is known for known in chain):
            return chain
        chain.append(inner)


def innermost(optimizer: object) -> torch.optim.Optimizer:
    """The torch optimizer inside any number of wrappers whose ``step()`` changes the weights; hooks
    registered on it run at every step, whoever calls it.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or a wrapper around one (see :func:`chain_of`).

    Raises:
        ValueError: it is not a torch optimizer, or its ``step()`` calls no hooks.
    """
    found = chain_of(optimizer)[-1]
    if not hasattr(found, "register_step_post_hook"):
        raise ValueError(f"{type(found).__name__} is no torch optimizer; call allocator.step() by hand")
    if not calls_hooks(found):
        raise ValueError(
            f"{type(found).__name__} calls no step hooks (torch.optim.Optimizer.__init__ never ran); attach "
            "the optimizer inside it, or call allocator.step() by hand"
        )
    return found


def calls_hooks(optimizer: object) -> bool:
    """Whether hooks registered on it run: a class that leaves out ``Optimizer.__init__`` has a plain step."""
    return hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer).step, "hooked", False)


def _has_step(thing: object) -> bool:
    return callable(getattr(thing, "step", None))


class Attachment:
    """Knows whether ``optimizer`` has stepped since the allocator last did.

    Args:
        optimizer: the one that trains the adapter; see :func:`innermost` for wrapped ones.
        parameters: returns the adapter's parameters.
        step: called after every step of the optimizer; None leaves that to the user.

    Raises:
        ValueError: it is no torch optimizer, or holds none of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], Iterable[Tensor]],
        step: Callable[[], None] | None,
    ) -> None:
        optimizer = innermost(optimizer)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in parameters()):
            raise ValueError(
                "this optimizer holds none of the adapter's parameters; attach the one that trains them"
            )
        self._parameters, self._step = parameters, step
        self._has_stepped = False
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Follow the optimizer no longer."""
        self._hook.remove()

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
