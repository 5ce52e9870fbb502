"""AdapterFusion: attention over the bottlenecks of several finished runs (Pfeiffer et al. 2021, section 3.2).

h  output of a projection, [..., D]       N  runs fused        z_n  W_up f(W_down h + b_down) + b_up of run n

    s = softmax_n(hᵀQ · z_nᵀK)            o = Σ_n s_n z_nᵀV            the layer goes on with h + o

Q, K and V [D, D] are trained at every place of every layer, with the head of the new task; the base with its
layer norms and the bottlenecks stay as they are. z_n is a bottleneck without its skip connection, which goes
around the fusion as in the authors' implementation: with it, the attention would be the same (hᵀQ · hᵀK is
common to all n), and V would stand in the way of h.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora_fast.experiments.settings.files import read_json, working_of
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.integrations.files import file_within, read_tensors

from .bottleneck import Bottleneck, places_of, put_after

TRAINED = "trained.safetensors"


class Fusion(nn.Module):
    """h + Σ_n s_n z_nᵀV with s = softmax_n(hᵀQ · z_nᵀK), over N frozen bottlenecks.

    Q and K start from N(0, 0.02²), as BERT's own projections. V is I + `value`, where `value` starts from
    zero (published: the identity with noise of 1e-6), so that the recipe's weight decay draws V to the
    identity: the published ℓ2 penalty on V, in AdamW's form. Parameters are float32; the result has the dtype
    of h.
    """

    def __init__(self, sources: Iterable[Bottleneck]) -> None:
        super().__init__()
        self.sources = nn.ModuleList(sources).requires_grad_(False)
        features = self.sources[0].up.out_features
        self.query = nn.Parameter(torch.empty(features, features).normal_(std=0.02))
        self.key = nn.Parameter(torch.empty(features, features).normal_(std=0.02))
        self.value = nn.Parameter(torch.zeros(features, features))
        self.softmax = nn.Softmax(dim=-1)  # a module, so that `mean_weights` can look at what it returns

    def forward(self, h: Tensor) -> Tensor:
        own = h.to(self.query.dtype)  # [..., D]
        z = torch.stack([source.change(own) for source in self.sources], dim=-2)  # [..., N, D]
        asked = own @ self.query @ self.key.T  # [..., D]: K once per position instead of once per z_n
        s = self.softmax((z * asked.unsqueeze(-2)).sum(-1))  # [..., N]
        mixed = (z * s.unsqueeze(-1)).sum(-2)
        return (own + mixed + mixed @ self.value).to(h.dtype)


def add_fusion(model: nn.Module, settings: RunSettings) -> None:
    """In place: a fusion of the bottlenecks of the runs `settings.adapters` at every place of the frozen
    `model`.

    Raises:
        FileNotFoundError, ValueError: see `open_sources`; or a run's tensors are not those of this base.
    """
    files = open_sources(settings)
    tensors = {file: read_tensors(file) for file in files}
    for name, fusion in put_fusions(model, len(files), settings.recipe.bottleneck).items():
        for source, file in zip(fusion.sources, files, strict=True):
            _load(source, f"{name}.adapter.", tensors[file], file)


def put_fusions(model: nn.Module, count: int, width: int) -> dict[str, Fusion]:
    """In place: a fusion of `count` new bottlenecks of `width` at every place of `model`. By the names of the
    places.
    """
    fusions = {}
    for name, place in places_of(model).items():
        fusions[name] = Fusion([Bottleneck(place.out_features, width) for _ in range(count)])
        put_after(place, fusions[name])
    return fusions


def _load(source: Bottleneck, prefix: str, tensors: dict[str, Tensor], file: Path) -> None:
    for name, parameter in source.named_parameters():
        saved = tensors.get(prefix + name)
        if saved is None or saved.shape != parameter.shape:
            there = "no such tensor" if saved is None else f"shape {list(saved.shape)}"
            raise ValueError(
                f"{file} has {there} for {prefix}{name} {list(parameter.shape)}, so it is not of this base "
                "model; train it again"
            )
        with torch.no_grad():
            parameter.copy_(saved)


def open_sources(settings: RunSettings) -> list[Path]:
    """The files with the bottlenecks of the runs `settings.adapters`; no tensor is read yet. Their tasks,
    seeds and rates may be any.

    Raises:
        FileNotFoundError: no such folder, a run that is not finished, or one without this file.
        ValueError: no run, a run of another method, base model, dtype or bottleneck width, or one that has
            trained biases of the base, without which its bottlenecks are not what they were.
    """
    return [_open_source(Path(path), settings) for path in settings.adapters]


def _open_source(path: Path, settings: RunSettings) -> Path:
    if not path.is_dir():
        begun = working_of(path).is_dir()
        wrong = f"the run {path} is not finished" if begun else f"there is no run folder {path}"
        raise FileNotFoundError(f"{wrong}; train it with --method houlsby first")
    if not (path / "result.json").is_file():
        raise FileNotFoundError(
            f"{path} has no result.json, so it is no finished run; give another --adapters"
        )
    try:
        there = read_json(path / "config.json")["settings"]
        recipe = there["recipe"]
        found = {name: there[name] for name in ("method", "model", "dtype")}
        found["bottleneck"] = recipe["bottleneck"]
        trains_biases = recipe["train_biases"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path / 'config.json'} is not that of a houlsby run; give another --adapters"
        ) from None
    asked = {"method": "houlsby", "model": settings.model, "dtype": settings.dtype}
    asked["bottleneck"] = settings.recipe.bottleneck
    remedies = {
        "method": "give runs of --method houlsby",
        "model": f"give --model {found['model']}, or another run",
        "dtype": f"give --dtype {found['dtype']}, or another run",
        "bottleneck": f"--set bottleneck={found['bottleneck']}, or give another run",
    }
    for name, value in asked.items():
        if found[name] != value:
            raise ValueError(
                f"the run {path} has {name} {found[name]!r}, and {value!r} is needed; {remedies[name]}"
            )
    if trains_biases:
        raise ValueError(f"the run {path} has train_biases, which a fusion leaves out; give another run")
    file = file_within(path / "adapter", TRAINED)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; train {path.name} again")
    return file


def mean_weights(model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """s of every fusion in the encoder, by the name of its place: the mean over all tokens of `batches` but
    the padding, [N], as Pfeiffer et al. show it. The model is run on them without dropout.

    `batches` have what the model's forward takes, `attention_mask` [batch, length] among it, and maybe more.
    """
    fusions = {
        name.removesuffix(".adapter"): module
        for name, module in model.named_modules()
        if isinstance(module, Fusion) and "decoder" not in name.split(".")  # the mask is that of the input
    }
    sums = {name: torch.zeros(len(fusion.sources), dtype=torch.float64) for name, fusion in fusions.items()}
    seen: dict[str, Tensor] = {}
    hooks = [
        fusion.softmax.register_forward_hook(lambda softmax, inputs, s, name=name: seen.update({name: s}))
        for name, fusion in fusions.items()
    ]
    taken, device = inspect.signature(model.forward).parameters, next(model.parameters()).device
    count, training = 0, model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items() if name in taken}
                model(**inputs)
                tokens = inputs["attention_mask"].bool()
                count += int(tokens.sum())
                for name, s in seen.items():
                    sums[name] += s[tokens].double().sum(0).cpu()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: (total / count).tolist() for name, total in sums.items()}
