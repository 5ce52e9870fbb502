"""The importance update of all adapters of a model, every score with its default smoothing.

Ours, plain PyTorch (``reference``), PEFT's loop where it has the score, and a copy that moves as many bytes
as the floor. The floor reads what the signal needs, and reads and writes every statistic. (The C++ kernel
reads weights and gradients twice, since a step that overflowed may change nothing.)
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adalora_fast.allocator.scores import get_score
from adalora_fast.ops import importance_update_
from adalora_fast.ops.dispatch import backend
from adalora_fast.ops.dispatch.timing import input_sets
from adalora_fast.ops.importance import SIGNALS, ScoreRule, layout_of, reference, statistic_names
from benchmarks.adapters import Model, make_parameters, model_for, parameter_name, peft_allocator
from benchmarks.suites import Case, Contestant, Work

BETA = 0.85
PEFTS = "sensitivity"  # the one score that PEFT has
GATE = 1e-5
WITHOUT_WEIGHTS = ("fisher", "gsnr")  # scores of the gradient alone
CONTESTANTS = ("peft", "reference", "adalora_fast", "copy")


def cases(scale: str, device: torch.device) -> list[Case]:
    """A case per score; PEFT's own score and the one with most statistics where time is short."""
    model = model_for(scale)
    scores = ("sensitivity", "gsnr") if scale == "quick" else tuple(SIGNALS)
    return [_case(model, score, device) for score in scores]


def _bytes_per_entry(score: str, smoothing: str) -> int:
    read = 4 if score in WITHOUT_WEIGHTS else 8
    if smoothing == "none" and score != "gsnr":  # the last signal is written, nothing is read
        return read + 4
    return read + 8 * len(statistic_names(score, smoothing))


def _case(model: Model, score: str, device: torch.device) -> Case:
    smoothing = get_score(score).smoothing
    entries = model.triplets if score == "magnitude" else model.entries + model.triplets
    return Case(
        suite="importance",
        name=f"{score} {smoothing} {model.name} r{model.rank}",
        what={
            "score": score, "smoothing": smoothing, "model": model.name, "rank": model.rank,
            "matrices": len(model.shapes), "entries": entries,
            "backend": backend.choose("importance", device.type).backend,
        },
        baseline="peft" if score == PEFTS else "reference",
        build=partial(build, model, score, smoothing, device),
        contestants=CONTESTANTS,
        moved=entries * _bytes_per_entry(score, smoothing),
    )  # fmt: skip


class _Updater:
    """Statistics that ``update`` changes."""

    def __init__(
        self, update: Callable, parameters: list[Tensor], score: str, smoothing: str, dtype=torch.float32
    ):
        device = parameters[0].device
        size = layout_of(parameters, score).size
        self.update, self.parameters, self.rule = update, parameters, ScoreRule(score, smoothing, BETA, BETA)
        self.statistics = torch.zeros(
            len(statistic_names(score, smoothing)), size, device=device, dtype=dtype
        )
        self.updates = torch.zeros(len(parameters), dtype=torch.int64, device=device)

    @torch.no_grad()
    def __call__(self, grads: list[Tensor]) -> None:
        self.update(self.parameters, grads, self.statistics, self.updates, self.rule)

    def rows(self) -> Tensor:
        return self.statistics


class _Peft:
    """PEFT's loop over its named parameters."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.allocator, self.model = peft_allocator(parameters, BETA)

    def __call__(self, grads: list[Tensor]) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        self.allocator.update_ipt(self.model)

    def rows(self) -> Tensor:
        """In the order of our statistics."""
        order = [i for group in layout_of(self.parameters, PEFTS).groups for i in group.members]
        both = self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc
        return torch.stack([torch.cat([kept[parameter_name(i)].flatten() for i in order]) for kept in both])


def _updater(name: str, parameters: list[Tensor], score: str, smoothing: str) -> _Updater | _Peft:
    if name == "peft":
        if score != PEFTS:
            raise ValueError(f"PEFT has no score but {PEFTS}")
        return _Peft(parameters)
    update = importance_update_ if name == "adalora_fast" else reference.update_
    return _Updater(update, parameters, score, smoothing)


def build(model: Model, score: str, smoothing: str, device: torch.device) -> Work:
    moved = (model.entries + model.triplets) * _bytes_per_entry(score, smoothing)
    sets = input_sets(moved) if device.type == "cuda" else 1
    models = [make_parameters(model, device, seed) for seed in range(sets)]
    grads = [[parameter.grad for parameter in parameters] for parameters in models]
    second = [0.5 * grad.roll(1) for grad in grads[0]]

    def gate(name: str) -> None:
        """Two updates with different gradients against plain PyTorch in float64."""
        if name == "copy":
            return
        wide = [parameter.detach().double() for parameter in models[0]]
        exact = _Updater(reference.update_, wide, score, smoothing, torch.float64)
        found = _updater(name, models[0], score, smoothing)
        for gradients in (grads[0], second):
            exact([grad.double() for grad in gradients])
            found(gradients)
        names = statistic_names(score, smoothing)
        for what, actual, truth in zip(names, found.rows(), exact.rows(), strict=True):
            error = ((actual.double() - truth).norm() / truth.norm()).item()
            assert error <= GATE, f"the relative error of {what} is {error:.2g}, allowed is {GATE:g}"

    def make(name: str) -> Contestant:
        if name == "copy":
            pairs = [torch.ones(2, max(moved // 8, 1), device=device) for _ in range(sets)]
            return Contestant([partial(target.copy_, source) for source, target in pairs])
        updaters = [_updater(name, parameters, score, smoothing) for parameters in models]
        return Contestant([partial(one, gradients) for one, gradients in zip(updaters, grads, strict=True)])

    return Work({name: partial(make, name) for name in CONTESTANTS}, gate)
