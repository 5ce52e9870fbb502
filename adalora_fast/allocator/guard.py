"""Names what goes wrong in a run without an error: layers without gradients, scores that are not numbers."""

import warnings
from collections.abc import Iterable

from torch import Tensor

FIRST_STEPS = 10  # enough for layerdrop and mixtures of experts to have reached every layer
SHOWN = 5


class UntrainedLayers:
    """Watches the first steps in which any layer's lora_E has a gradient.

    lora_E tells whether a layer ran and its output reached the loss: the orthogonality term gives lora_A and
    lora_B a gradient either way. Only ``grad is None`` is asked, which waits for no device; when the first
    steps are over, a step costs one comparison.

    Args:
        steps: how many steps of the run take gradients in.
    """

    def __init__(self, steps: int) -> None:
        self._steps = self._left = min(FIRST_STEPS, steps)
        self._trained: set[int] = set()

    def look(
        self,
        names: Iterable[str],
        parameters: list[Tensor],
        grads: list[Tensor | None],
        at_once: bool = False,
    ) -> None:
        """One step's ``parameters`` A_0, E_0, B_0, A_1, ... and their gradients, of the layers ``names``;
        warns at the last of the first steps, and now if ``at_once``.
        """
        if self._left == 0:
            return
        has_gradient = {layer for layer, grad in enumerate(grads[1::3]) if grad is not None}
        if not has_gradient:  # nothing was trained in this step
            return
        self._trained |= has_gradient
        self._left -= 1
        if self._left == 0 or at_once:
            taken, self._left = self._steps - self._left, 0
            self._warn(list(names), parameters[1::3], taken)

    def _warn(self, names: list[str], lambdas: list[Tensor], steps: int) -> None:
        missing = [
            f"{name} (frozen)" if not lambdas[layer].requires_grad else name
            for layer, name in enumerate(names)
            if layer not in self._trained and len(lambdas[layer])  # a layer of rank 0 has nothing to train
        ]
        if not missing:
            return
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if missing[SHOWN:] else "")
        warnings.warn(
            f"{len(missing)} of {len(names)} adapted layers had no gradient in the first {steps} training "
            f"steps and lose their rank to the others: {shown}; if their weight is read instead of calling "
            "them, or the loss does not depend on them, leave them out of the adapted layers",
            UserWarning,
            stacklevel=4,
        )
