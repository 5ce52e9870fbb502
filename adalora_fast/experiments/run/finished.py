"""Finished runs: their folders are opened and checked, and their models put together again."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora_fast.experiments.data.tasks import Task
from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.methods.fusion import TRAINED, put_fusions
from adalora_fast.experiments.models.families import family_of
from adalora_fast.experiments.models.loading import freeze, load_encoder
from adalora_fast.experiments.settings.files import read_object, working_of
from adalora_fast.experiments.settings.quiet import without_model_bars
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import LOW_RANK, VIRTUAL, RunSettings
from adalora_fast.integrations.files import CONFIG, WEIGHTS, file_within, read_tensors

FULL = "config.json"  # of a whole model; its weights may be in several files


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A complete run, or a saved soup of runs: its folder, a name for tables, settings, what it wrote of
    itself, and the folder of what was trained.
    """

    path: Path
    name: str
    settings: RunSettings
    result: dict[str, Any]
    adapter: Path


def open_finished(folder: Path | str) -> FinishedRun:
    """The complete run in `folder`; no tensor is read yet.

    Raises:
        FileNotFoundError: no such folder, or a run that is not finished.
        ValueError: files that are not a run's.
    """
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        if working_of(path).is_dir():
            raise FileNotFoundError(f"the run {path} is not finished; let the command that began it go on")
        raise FileNotFoundError(f"there is no run folder {path}; give one that train or sweep has written")
    for name in ("config.json", "result.json"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}, so it is no finished run; give another folder")
    config = read_object(path / "config.json")
    settings = settings_of(config.get("settings"), path / "config.json")
    return FinishedRun(
        path=path,
        name=f"{settings.label} (seed {settings.seed})",
        settings=settings,
        result=read_object(path / "result.json"),
        adapter=path / "adapter",
    )


def open_soup(folder: Path | str) -> FinishedRun:
    """The soup that `adalora-fast soup` has saved in `folder`, as a run of LoRA or of full fine-tuning.

    Raises:
        ValueError: it is not finished, nothing was saved of it, or an earlier version made it.
    """
    path = Path(folder).expanduser().absolute()
    soup = read_object(path / "soup.json")
    if soup.get("finished") is not True:
        raise ValueError(f"the soup in {path} is not finished; make it again")
    saved = soup.get("saved")
    if not isinstance(saved, dict):
        raise ValueError(f"of the soup in {path} no model was saved; make it again with --save lora or full")
    if "settings" not in soup:
        raise ValueError(
            f"{path / 'soup.json'} is of an earlier version and does not say how its runs read their texts; "
            "make the soup again"
        )
    settings = settings_of(soup["settings"], path / "soup.json")
    form = {"method": "lora"} if saved.get("form") == "lora" else {"method": "full", "dtype": "float32"}
    return FinishedRun(
        path=path,
        name="soup",
        settings=replace(settings, **form, variant=""),
        result=soup,
        adapter=path / "model",
    )


def settings_of(content: Any, file: Path) -> RunSettings:
    """The settings that `file` holds; ValueError where they are not those of a run of this version."""
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise ValueError(f"{file} holds no settings of a run; give another folder")
    try:
        return RunSettings(**content | {"recipe": Recipe(**content["recipe"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not of this version ({error}); use the version that wrote it") from error


def check_files(run: FinishedRun) -> None:
    """FileNotFoundError where the folder of what was trained lacks a file."""
    method = run.settings.method
    needed = (CONFIG, WEIGHTS) if method in (*LOW_RANK, *VIRTUAL) else (TRAINED,)
    for name in (FULL,) if method == "full" else needed:
        if not file_within(run.adapter, name).is_file():
            raise FileNotFoundError(
                f"{run.adapter} has no {name}, so the run was kept without what it trained; train it again"
            )


def restore(run: FinishedRun, task: Task) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a finished run, with what it trained in place; the run's base model is that of
    `run.settings`.

    Raises:
        FileNotFoundError: see `check_files`, or the base model is not there.
        ValueError: what was trained does not fit this base model.
    """
    check_files(run)
    settings = run.settings
    model, tokenizer = load_encoder(settings, task)
    return _restored(model, run, task).eval(), tokenizer


def _restored(model: nn.Module, run: FinishedRun, task: Task) -> nn.Module:
    settings = run.settings
    if settings.method == "full":
        return _whole_model(model, run)
    if settings.method in LOW_RANK:
        from peft import PeftModel

        from adalora_fast.integrations.peft import fuse

        with _fitting(run):
            adapted = PeftModel.from_pretrained(model, str(run.adapter))
        # PEFT's own AdaLoRA gives no loss where it is loaded for inference; the fused one gives the task's
        return adapted if settings.method == "lora" else fuse(adapted)
    if settings.method == "fusion":  # the runs that it started from are in its own file
        freeze(model, family_of(model).head_for(task.kind))
        put_fusions(model, len(settings.adapters), settings.recipe.bottleneck)
    else:
        model = adapt(model, settings, task)
    if settings.method in VIRTUAL:
        with _fitting(run):
            model.load_adapter(str(run.adapter), "default")
    else:
        _load_trained(model, run)
    return model


def _whole_model(model: nn.Module, run: FinishedRun) -> nn.Module:
    """The saved model, of the same class and attention as the base."""
    with _fitting(run), without_model_bars():
        saved, report = type(model).from_pretrained(
            run.adapter,
            dtype=torch.float32,
            attn_implementation=model.config._attn_implementation,
            local_files_only=True,
            output_loading_info=True,
        )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])]
    if wrong or saved.config.model_type != model.config.model_type:
        raise _misfit(run, wrong[0] if wrong else f"it is of type {saved.config.model_type}")
    return saved


def _load_trained(model: nn.Module, run: FinishedRun) -> None:
    """In place: what trained.safetensors holds, which is all that this method trains."""
    tensors = read_tensors(file_within(run.adapter, TRAINED))
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or "adapter" in name.split(".")
    }
    for name in sorted(tensors.keys() ^ wanted.keys()):
        raise _misfit(run, f"{name} is in one of them only")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape:
                raise _misfit(run, f"{name} is {list(tensors[name].shape)}, not {list(parameter.shape)}")
            parameter.copy_(tensors[name])


@contextmanager
def _fitting(run: FinishedRun) -> Iterator[None]:
    """Errors and warnings of libraries about tensors that do not fit become one line."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, KeyError, ValueError) as error:
            raise _misfit(run, " ".join(str(error).split())[:160]) from error
    for each in map(str, (each.message for each in said)):
        if "missing adapter keys" in each:
            raise _misfit(run, each[:160])


def _misfit(run: FinishedRun, what: str) -> ValueError:
    return ValueError(
        f"what {run.path} has trained does not fit the base model {run.settings.model} ({what}); give the "
        "one that it was trained on with --model"
    )
