"""Finished run folders, and whether runs can be compared: the same task, base model and token limits."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalora_fast.experiments.data.tasks import TASKS, Task, get_task
from adalora_fast.experiments.methods.fusion import TRAINED
from adalora_fast.experiments.run.finished import open_finished
from adalora_fast.experiments.settings.files import read_object
from adalora_fast.experiments.settings.settings import RunSettings
from adalora_fast.integrations.files import CONFIG, WEIGHTS, file_within

FULL = "model.safetensors"
# The methods whose runs are changes of the base model's own weights, and the files that say which.
FILES = {
    "lora": (CONFIG, WEIGHTS),
    "adalora": (CONFIG, WEIGHTS),
    "peft": (CONFIG, WEIGHTS),
    "full": (FULL, "config.json"),
    "bitfit": (TRAINED,),
    "head": (TRAINED,),
}
# Runs that differ in one of these are not points of one loss landscape.
COMMON = ("task", "model", "dtype", "held_out")
COMMON_RECIPE = ("max_length", "stride")


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A complete run: its folder, the settings it was trained with, and its result.json."""

    path: Path
    settings: RunSettings
    result: dict[str, Any]

    @property
    def name(self) -> str:
        """The method's label and the seed."""
        return f"{self.settings.label}-seed{self.settings.seed}"

    @property
    def task(self) -> Task:
        return get_task(self.settings.task)

    @property
    def adapter(self) -> Path:
        """The folder of what was trained."""
        return self.path / "adapter"

    def fingerprint(self) -> str:
        """A hash of what was trained: of the names and contents of the adapter's tensors and settings."""
        digest = hashlib.sha256()
        for file in sorted(self.adapter.iterdir()):
            if file.suffix == ".safetensors" or file.name.endswith("config.json"):
                digest.update(file.name.encode())
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:32]


def open_run(folder: Path | str) -> SavedRun:
    """The complete run in `folder`; no tensor is read yet.

    Raises:
        FileNotFoundError: no such folder, a run that is not finished, or one without its adapter's files.
        ValueError: files that are not a run's, a task whose rows cannot be read again, a
            method that changes no weights of the base, or a full model with other labels.
    """
    finished = open_finished(folder)
    run = SavedRun(path=finished.path, settings=finished.settings, result=finished.result)
    _check_kind(run)
    task = run.task
    for name in FILES[run.settings.method]:
        if not file_within(run.adapter, name).is_file():
            raise FileNotFoundError(
                f"{run.adapter} has no {name}, so the run cannot be compared; train it again"
            )
    if run.settings.method == "full" and task.labels:
        names = read_object(run.adapter / "config.json").get("id2label")
        if names != {str(code): label for code, label in enumerate(task.labels)}:
            raise ValueError(
                f"the model in {run.adapter} has the labels {names}, and {task.name} has "
                f"{', '.join(task.labels)}; train it again"
            )
    return run


def open_runs(folders: Sequence[Path | str]) -> list[SavedRun]:
    """Several complete runs that can be compared with each other.

    Raises:
        ValueError: fewer than two, or two that differ in what `check_comparable` wants equal.
        FileNotFoundError: see `open_run`.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} runs are too few; give the folders of 2 or more")
    runs = [open_run(folder) for folder in folders]
    check_comparable(runs)
    return runs


def check_comparable(runs: Sequence[SavedRun]) -> None:
    """ValueError naming the first setting in which a run differs from the first one, where they must agree:
    task (and with it the labels), base model and its dtype, held-out part, and length of the input.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in (*COMMON, *COMMON_RECIPE):
            there, here = (
                getattr(each.settings if name in COMMON else each.settings.recipe, name)
                for each in (first, run)
            )
            if there != here:
                raise ValueError(
                    f"{first.path} has {name} {there!r}, and {run.path} has {here!r}; "
                    "give runs that agree in it"
                )


def names_of(runs: Sequence[SavedRun]) -> list[str]:
    """A name for each run, all different: label and seed; the end of its path where others have those too;
    with a number where the same folder comes again.
    """
    names = {run.path: run.name for run in runs}
    for depth in range(1, max(len(path.parts) for path in names)):
        counts = Counter(names.values())
        names = {
            path: name if counts[name] == 1 else "/".join(path.parts[-depth:]) for path, name in names.items()
        }
    numbered, seen = [], Counter()
    for run in runs:
        seen[run.path] += 1
        name = names[run.path]
        numbered.append(name if seen[run.path] == 1 else f"{name} ({seen[run.path]})")
    return numbered


def _check_kind(run: SavedRun) -> None:
    """ValueError for runs that are no change of an encoder's weights on rows that can be read again."""
    task, method = run.settings.task, run.settings.method
    if task not in TASKS:
        raise ValueError(
            f"{run.path} is a run on {task!r}, whose rows are in no file, as those of the demo; give runs "
            "that train or sweep has written"
        )
    if method not in FILES:
        raise ValueError(
            f"{run.path} was trained with {method}, which leaves the base model's weights as they are, so it "
            f"cannot be mixed; give runs of {', '.join(FILES)}"
        )
