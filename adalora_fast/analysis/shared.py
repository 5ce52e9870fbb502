"""One base model, in which any weighted mixture of runs can be put in place and taken out again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adalora_fast.experiments.data.tasks import get_task
from adalora_fast.experiments.models.encoders import dequantised, load_model
from adalora_fast.experiments.settings.settings import RunSettings

from .changes import RunChange, mixture, read_change, used
from .saved import SavedRun, open_run

PRECISIONS = ("fp32", "bf16")


class SharedModel:
    """The base model of some runs, with float32 weights, without dropout, and its tokenizer.

    `precision`: fp32, or bf16 for matrix products of bfloat16 numbers (autocast); weights are mixed in
    float32 in any case.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, precision: str = "fp32") -> None:
        check_precision(precision)
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.precision = precision

    @classmethod
    def load(
        cls,
        settings: RunSettings,
        *,
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> "SharedModel":
        """The base of runs with these settings, with a head at random.

        What a run computed with base weights of 16 or 4 bits is computed with the same values in float32.
        `device` of None is the accelerator if there is one.
        """
        check_precision(precision)
        task = get_task(settings.task)
        model, tokenizer = load_model(
            settings.model,
            kind=task.kind,
            labels=task.labels,
            dtype=settings.dtype,
            attention=settings.attention,
        )
        if device is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        return cls(dequantised(model).float().to(device), tokenizer, precision=precision)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(self, runs: Sequence[SavedRun]) -> list[RunChange]:
        """What these runs changed, on this model's device; ValueError where it is not their base."""
        return [read_change(run, self.model).to(self.device) for run in runs]

    @contextmanager
    def mixed(self, changes: Sequence[RunChange], weights: Sequence[float]) -> Iterator[nn.Module]:
        """Within this context the model's own tensors are Σ_i w_i θ_i, and it computes in `precision`; the
        weights sum to 1.

        The base's tensors are kept meanwhile and return as they were, bit by bit; those that no run changed
        are not touched.
        """
        changes, weights = used(changes, weights)
        names = {name for change in changes for name in change.tensors}
        names |= {f"{name}.weight" for change in changes for name in change.factors}
        parameters = {name: tensor for name, tensor in self.model.named_parameters() if name in names}
        before = {name: parameter.data for name, parameter in parameters.items()}
        half = self.precision == "bf16"
        try:
            for name, parameter in parameters.items():
                parameter.data = mixture(name, before[name], changes, weights)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                yield self.model
        finally:
            for name, tensor in before.items():
                parameters[name].data = tensor


def check_precision(precision: str) -> None:
    """ValueError for one that there is not."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose {' or '.join(PRECISIONS)}")


def open_model(
    folder: Any, *, model: str | None = None, device: str | torch.device | None = None
) -> tuple[nn.Module, Any, SavedRun]:
    """(model, tokenizer, run) of a finished run, for inference: a plain transformers model in float32 with
    the run's changes merged into its weights.

    Args:
        folder: of the run.
        model: base model in place of the one that the run names, where that lies elsewhere now.
        device: None is the accelerator if there is one.

    Raises:
        ValueError, FileNotFoundError: see `saved.open_run`, `changes.read_change` and `encoders.load_model`.
    """
    run = open_run(folder)
    settings = run.settings if model is None else replace(run.settings, model=model)
    shared = SharedModel.load(settings, device=device)
    change = shared.read([run])
    parameters = dict(shared.model.named_parameters())
    with shared.mixed(change, [1.0]):
        merged = {name: parameter.data for name, parameter in parameters.items()}
    for name, tensor in merged.items():
        parameters[name].data = tensor
    return shared.model, shared.tokenizer, run
