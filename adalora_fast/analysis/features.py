"""Representations: the mean of every layer's hidden states over a text's own tokens, kept on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers import DataCollatorWithPadding

from adalora_fast.environment import writing_to
from adalora_fast.experiments.data.rows import vocabulary_of
from adalora_fast.experiments.data.squad import QuestionSplit
from adalora_fast.experiments.data.tasks import Task
from adalora_fast.experiments.data.translation import PairSplit
from adalora_fast.experiments.models.families import family_of, is_of_head

from .changes import RunChange
from .rows import AnyRows, batches_of, tokens_for
from .saved import SavedRun
from .shared import SharedModel
from .translations import mean_decoder_states


class FeatureReader:
    """Representations of the same texts in any run of one base model.

    `task` is needed for translations, whose representations are the decoder's. `cache`: a folder in which
    they are kept, all layers of a run in one file, under a hash of everything that they are made from: base
    weights, the run's trained files, texts, vocabulary, token limit and precision. None keeps nothing.
    """

    def __init__(
        self,
        shared: SharedModel,
        rows: AnyRows,
        *,
        task: Task | None = None,
        max_length: int,
        cache: Path | None = None,
    ) -> None:
        self.shared, self.cache = shared, cache
        self._rows, self._task = rows, task
        self._texts = texts_of(rows)
        self._max_length = max_length
        content = [hash_of_base(shared.model), self._texts, vocabulary_of(shared.tokenizer), max_length]
        content.append(shared.precision)
        self._fixed = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())

    @property
    def layers(self) -> int:
        """How many there are besides the embeddings, which are layer 0; of translations the decoder's."""
        config = self.shared.model.config
        return config.decoder_layers if isinstance(self._rows, PairSplit) else config.num_hidden_layers

    def place(self, layer: int) -> int:
        """`layer` counted from the embeddings; −1 is the last one. ValueError where there is none."""
        if not -self.layers - 1 <= layer <= self.layers:
            raise ValueError(f"there is no layer {layer}; choose 0 (the embeddings) to {self.layers}, or -1")
        return layer % (self.layers + 1)

    def read(self, run: SavedRun, change: RunChange, layers: Sequence[int]) -> list[np.ndarray]:
        """Features [N, D] float32 of these layers of a run, from the cache if they are in it."""
        places = [self.place(layer) for layer in layers]
        path = None if self.cache is None else self.cache / f"features-{self._key(run)}.safetensors"
        kept = None if path is None else _read(path, places, len(self._texts[0]))
        if kept is not None:
            return kept
        with self.shared.mixed([change], [1.0]) as model:
            values = self._states(model)
        if path is not None:
            _write(path, values)
        return [values[place] for place in places]

    def _states(self, model: nn.Module) -> np.ndarray:
        tokenizer, length = self.shared.tokenizer, self._max_length
        if isinstance(self._rows, PairSplit):
            return mean_decoder_states(model, tokenizer, self._task, self._rows, max_length=length)
        return mean_states(model, tokenizer, self._texts, max_length=length)

    def _key(self, run: SavedRun) -> str:
        digest = self._fixed.copy()
        digest.update(run.fingerprint().encode())
        return digest.hexdigest()[:32]


def texts_of(rows: AnyRows) -> tuple[list[str], ...]:
    """One list of texts, or two of pairs."""
    if isinstance(rows, PairSplit):
        return rows.sources, rows.targets
    return (rows.questions, rows.contexts) if isinstance(rows, QuestionSplit) else rows.texts


def mean_states(
    model: nn.Module,
    tokenizer: Any,
    texts: tuple[list[str], ...],
    *,
    max_length: int,
    tokens: int | None = None,
) -> np.ndarray:
    """[layers + 1, N, D] float32: hidden states (embeddings first) as means over a text's tokens, without
    padding and without the special tokens that the tokenizer put around it. Longer texts are cut. `tokens`:
    of a batch.

    Raises:
        ValueError: a text without any token of its own.
    """
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_special_tokens_mask=True)
    # The collator pads only what models read, so this mask stays aside.
    special = encoded.pop("special_tokens_mask")
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    empty = next((row for row, mask in enumerate(special) if all(mask)), None)
    if empty is not None:
        raise ValueError(f"row {empty} of the data has no token of its own; remove it")
    collate = DataCollatorWithPadding(tokenizer)
    result: np.ndarray | None = None
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in batches_of([len(mask) for mask in special], tokens or tokens_for(device)):
            inputs = collate([rows[row] for row in batch]).to(device)
            length = inputs["input_ids"].shape[1]
            own = torch.zeros(len(batch), length, dtype=torch.float64, device=device)
            for place, row in enumerate(batch):
                count = len(special[row])
                start_of_text = length - count if tokenizer.padding_side == "left" else 0
                own[place, start_of_text : start_of_text + count] = 1.0 - torch.tensor(special[row])
            states = model(**inputs, output_hidden_states=True).hidden_states
            means = torch.stack(
                [
                    torch.einsum("bt,btd->bd", own, state.double()) / own.sum(1, keepdim=True)
                    for state in states
                ]
            )
            if result is None:
                result = np.empty((len(states), len(rows), means.shape[-1]), dtype=np.float32)
            result[:, batch] = means.float().cpu().numpy()
    return result


def hash_of_base(model: nn.Module) -> str:
    """sha256 of the configuration's type and every parameter outside of the head, which each run brings."""
    family = family_of(model)
    heads = {*family.head, *family.question_answering_head}
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        if not is_of_head(name, heads):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, places: Sequence[int], rows: int) -> list[np.ndarray] | None:
    """None where there is no such file, or it is damaged: then it is written again."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            values = [file.get_tensor(f"layer.{place}") for place in places]
    except (SafetensorError, OSError):
        return None
    return values if all(each.ndim == 2 and len(each) == rows for each in values) else None


def _write(path: Path, values: np.ndarray) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing_to(path.parent, "choose another --cache", "keep features in"):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({f"layer.{place}": layer for place, layer in enumerate(values)}, draft)
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
