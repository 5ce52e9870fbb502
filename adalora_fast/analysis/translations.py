"""Pairs of sentences on which translation runs are compared: loss and representations under the given target,
and BLEU of what is generated where that is asked for.

With labels y_1 … y_T of a row (its target's tokens and those of the language) the decoder reads them turned
by one place, as in training, and

    loss = − Σ_rows Σ_t log p(y_t | y_<t, source) / Σ_rows T        token accuracy: how often y_t is likeliest

so that no batch and no padding has a part in it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq

from adalora_fast.experiments.data.tasks import Task, get_task
from adalora_fast.experiments.data.translation import (
    PairSplit,
    Translation,
    generation_config,
    set_languages,
    tokenize_pairs,
)
from adalora_fast.experiments.settings.settings import RunSettings

from .rows import Evaluation, batches_of

# Tokens of a batch, of both languages and with padding: every one of them has the vocabulary's logits.
TOKENS = {"cpu": 1024, "other": 8192}
ACCURACY = "token_accuracy"


class PairSet:
    """Named parts of the data, tokenised and put into batches of `tokens` once, for one device.

    `generates` adds BLEU and chrF of beam search with the recipe's beams, which takes many times as long.
    """

    def __init__(
        self,
        settings: RunSettings,
        parts: Mapping[str, PairSplit],
        tokenizer: Any,
        device: torch.device,
        *,
        tokens: int | None = None,
        generates: bool = False,
    ) -> None:
        self.task: Task = get_task(settings.task)
        self.parts, self.generates = dict(parts), generates
        self._workload = Translation(task=self.task, splits=dict(parts))
        data = self._workload.prepare(tokenizer, settings.recipe)
        self._generation = generation_config(tokenizer, settings.recipe)
        self._batches = {
            part: batches_of_pairs(data[part].to_list(), tokenizer, device, tokens) for part in parts
        }

    @property
    def primary_metric(self) -> str:
        """By which errors are counted."""
        return self.task.metrics[0] if self.generates else ACCURACY

    def evaluate(self, model: nn.Module, part: str, what: str = "this mixture") -> Evaluation:
        """Loss and metrics of a model on one part; ValueError naming `what` where they are not finite."""
        loss = right = count = 0.0
        generated: dict[int, np.ndarray] = {}
        with torch.inference_mode():
            for rows, inputs in self._batches[part]:
                logits, labels = model(**inputs).logits, inputs["labels"]
                own = labels >= 0
                loss += float(nn.functional.cross_entropy(logits[own].float(), labels[own], reduction="sum"))
                right += int((logits.argmax(-1) == labels)[own].sum())
                count += int(own.sum())
                if self.generates:
                    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                    ids = model.generate(**texts, generation_config=self._generation).cpu().numpy()
                    generated |= dict(zip(rows, ids, strict=True))
        if not np.isfinite(loss):
            raise ValueError(f"the loss of {what} is not finite; leave out runs that diverged")
        metrics = {ACCURACY: right / count}
        if self.generates:
            width = max(map(len, generated.values()))
            ids = np.full((len(generated), width), -1)
            for row, own_ids in generated.items():
                ids[row, : len(own_ids)] = own_ids
            judged = self._workload.judge(part, ids).metrics
            metrics |= {name: float(judged[name]) for name in self.task.metrics}
        return Evaluation(loss=loss / count, metrics=metrics)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Rows and source of every part, for result files."""
        return {name: part.described for name, part in self.parts.items()}


def batches_of_pairs(
    rows: list[dict], tokenizer: Any, device: torch.device, tokens: int | None = None
) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """(numbers of the rows, padded inputs and labels; padding of labels is −100) of every batch."""
    collate = DataCollatorForSeq2Seq(tokenizer)
    lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
    return [
        (batch, dict(collate([rows[row] for row in batch]).to(device)))
        for batch in batches_of(lengths, tokens or TOKENS.get(device.type, TOKENS["other"]))
    ]


def mean_decoder_states(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    pairs: PairSplit,
    *,
    max_length: int,
    tokens: int | None = None,
) -> np.ndarray:
    """[layers + 1, N, D] float32: the decoder's hidden states (embeddings first) as means over the target's
    own tokens, which it is given; without padding, the end of the sentence and the language.

    Raises:
        ValueError: a target without any token of its own.
    """
    set_languages(tokenizer, task)
    rows = tokenize_pairs(pairs, tokenizer, max_length).to_list()
    around = torch.tensor([*tokenizer(text_target="")["input_ids"], -100])
    empty = next((n for n, row in enumerate(rows) if set(row["labels"]) <= set(around.tolist())), None)
    if empty is not None:
        raise ValueError(f"row {empty} of the data has a translation without a token of its own; remove it")
    result: np.ndarray | None = None
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch, inputs in batches_of_pairs(rows, tokenizer, device, tokens):
            # The decoder reads a label at the place after it.
            labels = inputs["labels"]
            own = torch.zeros(labels.shape, dtype=torch.float64, device=device)
            own[:, 1:] = ~torch.isin(labels[:, :-1], around.to(device))
            states = model(**inputs, output_hidden_states=True).decoder_hidden_states
            means = torch.stack(
                [torch.einsum("bt,btd->bd", own, s.double()) / own.sum(1, keepdim=True) for s in states]
            )
            if result is None:
                result = np.empty((len(states), len(rows), means.shape[-1]), dtype=np.float32)
            result[:, batch] = means.float().cpu().numpy()
    return result
