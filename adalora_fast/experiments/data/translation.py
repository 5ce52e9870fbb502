"""Translation in the form that training works with: pairs of sentences in, generated sentences out.

A row is `{"translation": {"en": ..., "ro": ...}}`, as `wmt/wmt16` has it. Empty texts are kept: the training
data have some, and BLEU and chrF count an empty translation or reference as one without words.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import GenerationConfig

from adalora_fast.experiments.metrics.translation import bleu, bleu_statistics, check_installed, chrf
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings

from .rows import Judged, cached, load_splits
from .tasks import Rows, Task, get_task, read_table

LANGUAGE_CODES = {"en": "en_XX", "ro": "ro_RO"}  # mBART's names of the columns


@dataclass(frozen=True, kw_only=True)
class PairSplit(Rows):
    """Sentences and their translations; `source` and `sample` as in `tasks.Split`."""

    sources: list[str]
    targets: list[str]
    source: str
    sample: bool

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, rows: Sequence[int]) -> "PairSplit":
        """These rows, in this order."""
        sources, targets = ([column[row] for row in rows] for column in (self.sources, self.targets))
        return replace(self, sources=sources, targets=targets)

    @property
    def keys(self) -> list[Hashable]:
        """The source sentence."""
        return [text.strip() for text in self.sources]


def load_pairs(task: Task, split: str | Path, data_dir: Path | None) -> PairSplit:
    """Read `DIR/<task>/<split>.parquet` (or a sample, as `tasks.find_split_file` does), or the hub for None;
    a Path as `split` is that file.

    ValueError names the row that does not have a text in both languages; FileNotFoundError a file or hub that
    is not there.
    """
    table, source, sample = read_table(task, split, data_dir, ("translation",))
    rows = table.column("translation").to_pylist()
    for number, row in enumerate(rows):
        for language in task.text_columns:
            text = row.get(language) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"{source} row {number}: translation has {text!r} for {language!r}, not a text; remove "
                    "or fix that row"
                )
    sources, targets = ([row[language] for row in rows] for language in task.text_columns)
    return PairSplit(sources=sources, targets=targets, source=source, sample=sample)


@dataclass(kw_only=True)
class Translation:
    """Translation of sentences; `splits` has "train" and those to evaluate."""

    task: Task
    splits: dict[str, PairSplit]
    label_names: list[str] = field(default_factory=lambda: ["labels"])

    def __post_init__(self) -> None:
        self._tokenizer: Any = None

    @classmethod
    def load(cls, settings: RunSettings) -> "Translation":
        """Read and check the data of these settings."""
        check_installed()
        return cls(task=get_task(settings.task), splits=load_splits(settings, load_pairs))

    @property
    def evaluation(self) -> tuple[str, ...]:
        return tuple(name for name in self.splits if name != "train")

    def prepare(self, tokenizer: Any, recipe: Recipe) -> dict[str, Dataset]:
        self._tokenizer = tokenizer
        set_languages(tokenizer, self.task)
        return {
            name: tokenize_pairs(split, tokenizer, recipe.max_length) for name, split in self.splits.items()
        }

    def describe(self) -> dict[str, dict[str, Any]]:
        return {name: split.described for name, split in self.splits.items()}

    def judge(self, split: str, outputs: Any) -> Judged:
        """BLEU and chrF of generated token ids [N, T], padded with anything below 0 or the padding token.

        The array `bleu_statistics` [N, 10] is what each sentence adds to BLEU (`metrics.translation`), and
        `pair_hashes` [N] says of which pair it is.
        """
        ids = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
        ids = np.where(ids < 0, self._tokenizer.pad_token_id, ids)
        texts = self._tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        texts = [text.strip() for text in texts]
        pairs = self.splits[split]
        references = pairs.targets
        return Judged(
            metrics={"bleu": bleu(texts, references), "chrf": chrf(texts, references)},
            arrays={
                "bleu_statistics": bleu_statistics(texts, references),
                "pair_hashes": pair_hashes(pairs.sources, references),
            },
            answers={str(row): text for row, text in enumerate(texts)},
        )


def pair_hashes(sources: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[N] int64: the first 8 bytes, little-endian, of BLAKE2b of "source NUL reference" in UTF-8.

    Two runs are paired row by row only where these agree; counts of words would be the same with and without
    diacritics.
    """
    digests = [
        hashlib.blake2b(f"{source}\0{reference}".encode(), digest_size=8).digest()
        for source, reference in zip(sources, references, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def set_languages(tokenizer: Any, task: Task) -> None:
    """Tell the tokenizer what is translated into what; ValueError where it does not know these languages."""
    source, target = (LANGUAGE_CODES[column] for column in task.text_columns)
    known = tokenizer.get_vocab()
    if not hasattr(tokenizer, "src_lang") or not {source, target} <= known.keys():
        raise ValueError(
            f"the tokenizer has no language codes {source} and {target}; give a model with mBART's own "
            "tokenizer"
        )
    tokenizer.src_lang, tokenizer.tgt_lang = source, target


def tokenize_pairs(split: PairSplit, tokenizer: Any, max_length: int) -> Dataset:
    """Token ids of the sources and, as labels, of the targets, each with at most `max_length` tokens, with
    those of the languages; padding is left to the batch.
    """

    def encode() -> dict[str, Sequence]:
        return dict(
            tokenizer(split.sources, text_target=split.targets, truncation=True, max_length=max_length)
        )

    content = [split.sources, split.targets, tokenizer.src_lang, tokenizer.tgt_lang]
    return cached(encode, len(split), content, tokenizer, max_length)


def generation_config(tokenizer: Any, recipe: Recipe) -> GenerationConfig:
    """Beam search with `recipe.beams`, up to `recipe.max_length` tokens, started as in training.

    In training the model is given the labels turned by one place, so that it starts from their last token:
    the target language, or, where that stands in front of the text (mBART-50), the end of a sentence, after
    which the language is forced.
    """
    around = tokenizer(text_target="")["input_ids"]
    return GenerationConfig(
        num_beams=recipe.beams,
        max_length=recipe.max_length,
        decoder_start_token_id=around[-1],
        forced_bos_token_id=None if around[0] == tokenizer.eos_token_id else around[0],
        forced_eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
