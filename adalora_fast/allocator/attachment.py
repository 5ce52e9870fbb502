"""The tie between an allocator and the optimizer whose steps it follows."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from adalora_fast.distributed.processes import all_finite

UNSEEN_CHANGES = 100  # changes of the weights without a step of the attached optimizer
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


def closure_of(args: tuple, kwargs: dict) -> Callable | None:
    """The closure that a step was given, from its hooks' arguments (``args`` begins with the optimizer)."""
    return args[1] if len(args) > 1 else kwargs.get("closure")


def _has_step(thing: object) -> bool:
    return callable(getattr(thing, "step", None))


class Attachment:
    """Knows whether ``optimizer`` has stepped since the allocator last did, and with which gradients.

    Args:
        optimizer: the one that trains the adapter; see :func:`innermost` for wrapped ones.
        parameters: returns the adapter's parameters A_0, E_0, B_0, A_1, ...
        step: called after every step of the optimizer; None leaves that to the user.
        before: hook of the optimizer (itself, args, kwargs), called before every step.

    Attributes:
        optimizers: the optimizer, and the wrappers around it.
        had_none: no adapter parameter had a gradient in the optimizer's last step.

    Raises:
        ValueError: it is no torch optimizer, or holds none of the parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], list[Tensor]],
        step: Callable[[], None] | None,
        before: Callable[[torch.optim.Optimizer, tuple, dict], None] | None = None,
    ) -> None:
        inner = innermost(optimizer)
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in parameters()):
            raise ValueError(
                f"this optimizer ({type(inner).__name__}) holds none of the adapter's parameters; attach the "
                "one that trains them, and not copies of them"
            )
        self.optimizers = chain_of(optimizer)
        self._parameters, self._step = parameters, step
        self._has_stepped = self.had_none = False
        self._taken = TakenGradients()
        self._watch = Watch(type(optimizer).__name__, parameters)
        self._hooks = [inner.register_step_pre_hook(hook) for hook in (before, self._before_step) if hook]
        self._hooks.append(inner.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Follow the optimizer no longer."""
        self._watch.end()
        for hook in self._hooks:
            hook.remove()

    def follow_parameters(self) -> None:
        """The adapter's parameters are others than before."""
        self._watch.end()
        self._watch.begin()

    def gradients(self) -> list[Tensor | None]:
        """Those that the optimizer's last step was made with, in the order of the parameters."""
        return self._taken.of(self._parameters())

    def _before_step(self, optimizer, args, kwargs) -> None:
        makes_gradients = closure_of(args, kwargs) is not None
        unscales = getattr(optimizer, "grad_scale", None) is not None  # a fused one, as it should
        self._taken.before([] if makes_gradients or unscales else self._parameters())

    def _after_step(self, optimizer, args, kwargs) -> None:
        parameters = self._parameters()
        self._taken.after(parameters)
        self._watch.saw_step()
        self.had_none = all(grad is None for grad in self._taken.of(parameters))
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


class TakenGradients:
    """The gradients as the optimizer found them.

    Some optimizers work in their memory (schedule-free ones normalise them, others add the weight decay or
    centre them), and scores of what is left there would be scores of something else. So the first step is
    made with copies at hand. If the gradients were changed, copies are taken in every step; if not, never
    again.
    """

    def __init__(self) -> None:
        self._needed: bool | None = None  # not known yet
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}  # gradient, its version, its copy

    def before(self, parameters: list[Tensor]) -> None:
        """An optimizer's step begins."""
        self._copies = {}
        if self._needed is not False:
            self._copies = {
                i: (parameter.grad, parameter.grad._version, parameter.grad.detach().clone())
                for i, parameter in enumerate(parameters)
                if parameter.grad is not None
            }

    def after(self, parameters: list[Tensor]) -> None:
        """It has ended."""
        if self._needed is None and self._copies:
            self._needed = any(
                parameters[i].grad is not grad or grad._version != version
                for i, (grad, version, _) in self._copies.items()
            )
        if not self._needed:
            self._copies = {}

    def of(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """The parameters' gradients, as they were."""
        return [self._copies[i][2] if i in self._copies else p.grad for i, p in enumerate(parameters)]


class Watch:
    """Warns if the weights change again and again and the attached optimizer's ``step()`` is never called:
    somebody else trains, and no allocation would ever run.

    Args:
        optimizer: its name.
        parameters: returns the adapter's parameters; a hook on the first λ sees every backward pass.
    """

    def __init__(self, optimizer: str, parameters: Callable[[], list[Tensor]]) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._hook, self._version, self._changes = None, -1, 0
        self.begin()

    def begin(self) -> None:
        """Watch the parameters of now."""
        first = next((values for values in self._parameters()[1::3] if values.requires_grad), None)
        if first is not None:
            self._version = first._version
            self._hook = first.register_post_accumulate_grad_hook(self._after_backward)

    def end(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def saw_step(self) -> None:
        """The attached optimizer stepped."""
        self._changes = 0

    def _after_backward(self, parameter: Tensor) -> None:
        self._changes += parameter._version != self._version
        self._version = parameter._version
        if self._changes == UNSEEN_CHANGES:
            self._changes += 1
            warnings.warn(
                f"the adapter's weights changed {UNSEEN_CHANGES} times and step() of the attached "
                f"{self._optimizer} was not called, so that the allocator does not run; attach the optimizer "
                "whose step() is called, or detach() and call allocator.step() by hand",
                UserWarning,
                stacklevel=2,
            )


def is_watch(hook: object) -> bool:
    """Whether a parameter's hook is an attachment's own."""
    return isinstance(getattr(hook, "__self__", None), Watch)
