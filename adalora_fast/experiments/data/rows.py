"""The rows of a run: which splits it reads, their token tables (kept on disk where they are long), and what
one of them came to.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset

from adalora_fast.environment import writing_to
from adalora_fast.experiments.settings.quiet import without_table_bars
from adalora_fast.experiments.settings.settings import RunSettings

from .tasks import FROM_TRAIN, Rows, Split, Task, get_task

HELD_OUT = "held_out"
CACHED_ROWS = 20_000  # tokenising fewer takes a few seconds
RowsOfKind = TypeVar("RowsOfKind", bound=Rows)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one split came to: `metrics` as fractions, `arrays` for predictions.safetensors (per row of the
    split), `answers` for predictions-<split>.json (question answering and translation).
    """

    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]
    answers: dict[str, Any] | None = None


def load_splits(
    settings: RunSettings, load: Callable[[Task, str, Path | None], RowsOfKind]
) -> dict[str, RowsOfKind]:
    """`train` and what is evaluated: the part of it that is held out, or the task's own splits; each with as
    many rows as the recipe wants.
    """
    task, recipe = get_task(settings.task), settings.recipe
    data_dir = None if settings.data_dir is None else Path(settings.data_dir)
    splits = {"train": load(task, "train", data_dir)}
    if settings.held_out:
        splits["train"], splits[HELD_OUT] = splits["train"].hold_out(settings.held_out)
    else:
        splits |= {name: load(task, name, data_dir) for name in task.evaluation}
        for name in task.evaluation:
            if Path(splits[name].source).stem.endswith(FROM_TRAIN):  # and the whole of it may be there, too
                splits["train"] = splits["train"].without(splits[name])
    return {
        name: split.take(recipe.train_rows if name == "train" else recipe.evaluation_rows)
        for name, split in splits.items()
    }


def tokenize(split: Split, tokenizer: Any, max_length: int) -> Dataset:
    """Token ids of one text or a pair of texts; padding is left to the batch."""

    def encode() -> dict[str, Sequence]:
        return {**tokenizer(*split.texts, truncation=True, max_length=max_length), "labels": split.labels}

    return cached(encode, len(split), [split.texts, split.labels], tokenizer, max_length)


def cached(
    encode: Callable[[], dict[str, Sequence]], rows: int, content: Any, tokenizer: Any, *settings: Any
) -> Dataset:
    """The table that `encode` makes; a long one is kept on disk by what it was made from, and found again.

    In ADALORA_FAST_CACHE, by default ~/.cache/adalora_fast.
    """
    if rows < CACHED_ROWS:
        return Dataset.from_dict(encode())
    made_by = [vocabulary_of(tokenizer), tokenizer.model_input_names, tokenizer.padding_side]
    parts = json.dumps([content, made_by, settings], sort_keys=True, default=str)
    folder = cache_folder()
    path = folder / f"tokens-{hashlib.sha256(parts.encode()).hexdigest()[:32]}"
    if not path.is_dir():
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        _remove_old_drafts(folder)
        with keeping_tokens(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with without_table_bars():
                    Dataset.from_dict(encode()).save_to_disk(draft)
                with suppress(OSError):  # another process was first
                    draft.rename(path)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return Dataset.load_from_disk(path)


def cache_folder() -> Path:
    """Where long token tables are kept."""
    return Path(os.environ.get("ADALORA_FAST_CACHE", "~/.cache/adalora_fast")).expanduser()


def keeping_tokens(folder: Path) -> AbstractContextManager[None]:
    """An error of the file system in here says how to keep the tables elsewhere."""
    return writing_to(folder, "set ADALORA_FAST_CACHE to another folder", "keep tokens in")


def _remove_old_drafts(folder: Path) -> None:
    """Those of processes that were killed: none is written for longer than a day."""
    for draft in folder.glob(".tokens-*"):
        with suppress(OSError):
            if draft.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(draft, ignore_errors=True)


def vocabulary_of(tokenizer: Any) -> Any:
    """Everything that decides which tokens a text becomes; not the length to which the last ones were cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {
        key: value
        for key, value in json.loads(backend.to_str()).items()
        if key not in ("truncation", "padding")
    }
