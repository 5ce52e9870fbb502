"""The gradients of an allocator's step, and what it means if there are none.

A batch of text for a model whose adapters are in its vision tower, a layer that is dropped, a frozen phase:
then no adapter has a gradient of the task. The optimizer leaves all of them alone, or takes the orthogonality
term's step. Such a step teaches nothing and counts. A call after ``zero_grad()`` looks alike and is an error,
because nothing would ever be learnt.
"""

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from .attachment import Attachment

LONG = 100  # steps in a row without a gradient


class Gradients:
    """Tells a step without gradients from a call after ``zero_grad()``."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The run starts again, or goes on somewhere else."""
        self._version: int | None = None
        self._missing = 0

    def remember(self, lambdas: list[Tensor]) -> None:
        """A step ends: a change of Λ from here on is the next one's."""
        self._version = versions(lambdas)

    def of_step(
        self, parameters: list[Tensor], model: nn.Module, attachment: Attachment | None
    ) -> list[Tensor | None]:
        """The gradients that the optimizer's step was made with.

        Args:
            parameters: A_0, E_0, B_0, A_1, ...
            model: all that is trained beside them.
            attachment: knows the optimizer, if one is attached.

        Raises:
            ValueError: there are none, and it cannot be said that the step had none.
        """
        if attachment is None:
            grads = [parameter.grad for parameter in parameters]
        else:
            grads = attachment.gradients()
        if _reached(parameters, grads):
            self._missing = 0
            return grads
        term_alone = any(grad is not None for grad in grads)
        had_none = self._others_only(parameters, model) if attachment is None else attachment.had_none
        if not (term_alone or had_none):
            raise ValueError(
                "no adapter parameter has a gradient; call allocator.step() after loss.backward() "
                "and before zero_grad()"
                + ("" if attachment else ", or attach(optimizer) if some steps do not reach the adapters")
            )
        self._missing += 1
        if self._missing == LONG:
            warnings.warn(
                f"{LONG} optimizer steps in a row without a gradient for any adapter parameter: the budget "
                "goes on with the statistics from before. The adapted layers did not run, are frozen, or "
                "zero_grad() comes before optimizer.step()",
                UserWarning,
                stacklevel=4,
            )
        return [None] * len(grads)

    def _others_only(self, parameters: list[Tensor], model: nn.Module) -> bool:
        """Whether other parameters still have their gradients, and no optimizer has changed Λ."""
        own = {id(parameter) for parameter in parameters}
        others = any(p.grad is not None for p in model.parameters() if id(p) not in own)
        return others and self._version in (None, versions(parameters[1::3]))


def _reached(parameters: list[Tensor], grads: list[Tensor | None]) -> bool:
    """Whether the loss of the task reached an adapter. The orthogonality term gives lora_A and lora_B a
    gradient without it, but not lora_E, which therefore tells (unless all of them are frozen).
    """
    tells = [grad for parameter, grad in zip(parameters[1::3], grads[1::3]) if parameter.requires_grad]
    return any(grad is not None for grad in (tells or grads))


def versions(tensors: Iterable[Tensor]) -> int:
    """A number that every change in place moves up (bitsandbytes' kernels and optimizers of sharded
    parameters do not show).
    """
    return sum(tensor._version for tensor in tensors)
