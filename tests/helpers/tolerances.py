"""How accurate is accurate enough: one table, and the relative rule that every numerical test applies.

The rule: an implementation's error against the float64 truth may not exceed the error of plain PyTorch in
the same type by more than the tolerance of that type. Errors are relative to the truth's size and pooled over
several draws: the error of a single number, which cancellation may enlarge by chance, says little.
"""

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-14,  # plain PyTorch is the truth here and has no error
    torch.float32: 5e-7,  # sums of a thousand terms in another order
    torch.float16: 1.5e-4,  # a sixth of the type's epsilon
    torch.bfloat16: 1.2e-3,
}


class RelativeRule:
    """Collects results of several draws and then applies the rule to each named result."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tolerance = TOLERANCES[dtype]
        self._errors: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(self, name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
        """One draw of ``name``: our result, plain PyTorch's in the same type, and the truth."""
        assert actual.dtype == plain.dtype, f"{name} is {actual.dtype}, expected {plain.dtype}"
        assert actual.shape == plain.shape == truth.shape, f"{name} is {tuple(actual.shape)}"
        assert actual.isfinite().all(), f"{name} is not finite"
        differences = ((value.detach().double() - truth).flatten() for value in (actual, plain))
        self._errors.setdefault(name, []).append((*differences, truth.flatten()))

    def check(self) -> None:
        """Root mean square error by the rule; the largest single error within a multiple of it."""
        for name, draws in self._errors.items():
            ours, plain, truth = (torch.cat(parts) for parts in zip(*draws, strict=True))
            if truth.numel() == 0:
                continue
            size = truth.norm() / truth.numel() ** 0.5
            size = torch.where(size == 0, 1.0, size)
            mean = [error.norm() / truth.numel() ** 0.5 / size for error in (ours, plain)]
            peak = [error.abs().max() / size for error in (ours, plain)]
            said = (
                f"{name}: error {mean[0]:.3g}, peak {peak[0]:.3g}; plain PyTorch {mean[1]:.3g}, {peak[1]:.3g}"
            )
            assert mean[0] <= mean[1] + self.tolerance, said
            assert peak[0] <= 2 * peak[1] + 20 * self.tolerance, said


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||, infinite where ``actual`` is not finite (absolute if truth = 0)."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if not actual.isfinite().all():
        return float("inf")
    difference = (actual.detach().double() - truth.double()).norm().item()
    return difference / size if (size := truth.double().norm().item()) else difference


def assert_accurate(
    actual: Tensor, truth: Tensor, dtype: torch.dtype, *, factor: float = 1.0, what: str = ""
) -> None:
    """Against the truth alone, within ``factor`` times the type's tolerance."""
    error, allowed = relative_error(actual, truth), factor * TOLERANCES[dtype]
    assert error <= allowed, f"{what}: relative error {error:.3g} > {allowed:.3g}"
