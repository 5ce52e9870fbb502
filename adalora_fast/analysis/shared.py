"""One base model, in which any weighted mixture of runs can be put in place and taken out again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_fast.experiments.encoders import load_model
from adalora_fast.experiments.runs import RunSettings
from adalora_fast.experiments.tasks import get_task

from .changes import Factors, RunChange, concatenated, mixture, read_change, used
from .saved import SavedRun, open_run


class SharedModel:
    """The base model of some runs, in float32, without dropout, and its tokenizer.

    Low-rank changes are added to the outputs of their layers, y + (x Aᵀ) Bᵀ with the concatenated factors:
    the base's matrices are not written and not copied. Tensors that a run replaced are put in the place of
    the base's, which return afterwards.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(cls, settings: RunSettings, *, device: str | torch.device | None = None) -> "SharedModel":
        """The base of runs with these settings, with a head at random.

        What a run computed with half-precision base weights is computed with the same values in float32.
        `device` of None is the accelerator if there is one.
        """
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
        return cls(model.float().to(device), tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(self, runs: Sequence[SavedRun]) -> list[RunChange]:
        """What these runs changed, on this model's device; ValueError where it is not their base."""
        return [read_change(run, self.model).to(self.device) for run in runs]

    @contextmanager
    def mixed(self, changes: Sequence[RunChange], weights: Sequence[float]) -> Iterator[nn.Module]:
        """Within this context the model computes Σ_i w_i θ_i; the weights sum to 1."""
        changes, weights = used(changes, weights)
        replaced = {name for change in changes for name in change.tensors}
        # Where a run replaced a matrix that another adapted, the one is put in place, the other added.
        bare = [replace(change, factors={}) for change in changes]
        hooks = []
        with self._replaced({name: (bare, weights) for name in replaced}):
            try:
                for name in dict.fromkeys(name for change in changes for name in change.factors):
                    module = self.model.get_submodule(name)
                    dtype = module.weight.dtype
                    factors = concatenated(name, changes, weights)
                    hook = partial(_add_low_rank, Factors(A=factors.A.to(dtype), B=factors.B.to(dtype)))
                    hooks.append(module.register_forward_hook(hook))
                yield self.model
            finally:
                for hook in hooks:
                    hook.remove()

    @contextmanager
    def merged(self, changes: Sequence[RunChange], weights: Sequence[float]) -> Iterator[nn.Module]:
        """Within this context the model's own tensors are Σ_i w_i θ_i, as they are saved as a full model.

        It takes a copy of the changed matrices, and nothing else.
        """
        changes, weights = used(changes, weights)
        names = {name for change in changes for name in change.tensors}
        names |= {f"{name}.weight" for change in changes for name in change.factors}
        with self._replaced({name: (changes, weights) for name in names}):
            yield self.model

    @contextmanager
    def _replaced(self, mixtures: dict[str, tuple[Sequence[RunChange], Sequence[float]]]) -> Iterator[None]:
        parameters = dict(self.model.named_parameters())
        before: dict[str, Tensor] = {}
        try:
            for name, (changes, weights) in mixtures.items():
                before[name] = parameters[name].data
                parameters[name].data = mixture(name, before[name], changes, weights)
            yield
        finally:
            for name, tensor in before.items():
                parameters[name].data = tensor


def _add_low_rank(factors: Factors, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output + F.linear(F.linear(inputs[0], factors.A), factors.B)


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
    with shared.merged(change, [1.0]):
        merged = {name: parameter.data for name, parameter in parameters.items()}
    for name, tensor in merged.items():
        parameters[name].data = tensor
    return shared.model, shared.tokenizer, run
