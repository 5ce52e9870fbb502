"""Questions answered by a span of a passage (SQuAD 1.1 and 2.0): their files, and the windows a model reads.

A passage (`context`) that does not fit beside its question is read in windows of `max_length` tokens, of
which neighbours share `stride` tokens of the passage. `squad_answers` makes answers of what the model says
about the windows.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .tasks import Rows, Task, read_table

COLUMNS = ("id", "context", "question", "answers")
MAX_QUESTION_LENGTH = 64  # tokens, the limit of BERT's own script for SQuAD
ROWS_AT_ONCE = 1000  # offsets as Python objects need a hundred times the space of the text


@dataclass(frozen=True, kw_only=True)
class QuestionSplit(Rows):
    """Questions of one split, in the order of the file.

    Each entry of `answers` has the accepted answers as `text`, and as `answer_start` the character of the
    context at which each begins; both are empty where the context has no answer. `source` is the file or hub
    address; `sample` is true where this is only part of the official split.
    """

    ids: list[str]
    contexts: list[str]
    questions: list[str]
    answers: list[dict[str, list]]
    source: str
    sample: bool

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> "QuestionSplit":
        """These rows, in this order."""
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            contexts=[self.contexts[i] for i in indices],
            questions=[self.questions[i] for i in indices],
            answers=[self.answers[i] for i in indices],
        )

    @property
    def keys(self) -> list[Hashable]:
        """The context: a question about a passage that was trained on is no test."""
        return [context.strip() for context in self.contexts]


@dataclass(frozen=True, kw_only=True)
class EvaluationFeatures:
    """Windows over the passages of a split: W windows of at most T tokens.

    `columns` is what the model reads. The rest is kept aside: `example` [W] int64, the row of the split;
    `offsets` [W, T, 2] int32, the characters of the context that each token stands for, -1 for tokens that
    are not of the context; `null` [W] int64, the position of the [CLS] token, which stands for "no answer";
    `start_positions` and `end_positions` [W] int64, the first accepted answer, for a loss.
    """

    columns: dict[str, list[list[int]]]
    example: np.ndarray
    offsets: np.ndarray
    null: np.ndarray
    start_positions: np.ndarray
    end_positions: np.ndarray

    def __len__(self) -> int:
        return len(self.example)


def load_questions(task: Task, split: str | Path, data_dir: Path | None) -> QuestionSplit:
    """Read `DIR/<task>/<split>.parquet` (or a sample, as `tasks.find_split_file` does), or the hub for None;
    a Path as `split` is that file.

    An answer that is not where its row says is moved to the nearest place where it is. ValueError names the
    row that has none, or whose columns are not texts; FileNotFoundError a file or hub that is not there.
    """
    table, source, sample = read_table(task, split, data_dir, COLUMNS)
    ids, contexts, questions, answers = (table.column(column).to_pylist() for column in COLUMNS)
    seen = set()
    for row in range(len(ids)):
        for column, value in (("id", ids[row]), ("context", contexts[row]), ("question", questions[row])):
            if not isinstance(value, str):
                raise ValueError(
                    f"{source} row {row}: {column} is {value!r}, not a text; remove or fix that row"
                )
        if ids[row] in seen:
            raise ValueError(f"{source} row {row}: id {ids[row]!r} occurs twice; give every question its own")
        seen.add(ids[row])
        try:
            answers[row] = _checked_answers(answers[row], contexts[row])
        except ValueError as error:
            raise ValueError(f"{source} row {row}: {error}; remove or fix that row") from error
        if not answers[row]["text"] and task.name == "squad":
            raise ValueError(f"{source} row {row} has no answer; remove it, or use squad_v2")
    return QuestionSplit(
        ids=ids, contexts=contexts, questions=questions, answers=answers, source=source, sample=sample
    )


def training_features(
    split: QuestionSplit, tokenizer: Any, *, max_length: int, stride: int
) -> dict[str, list]:
    """Columns for a question-answering model, one entry per window.

    What the tokenizer gives its model (`input_ids`, `attention_mask`, `token_type_ids` where it has them),
    and `start_positions` and `end_positions`: the first and last token that the first accepted answer
    touches. A window that does not hold the whole answer is labelled with its [CLS] token twice.

    Padding is left to the batch, except with a tokenizer that pads on the left: there it would move the
    labels, and every window has `max_length` tokens. Such a tokenizer also gets the context first.

    ValueError: no questions, a tokenizer without offsets or without [CLS], or a `max_length` that leaves no
    room beside `stride`.
    """
    columns: dict[str, list] = {}
    for row, windows in _encode(split, tokenizer, max_length, stride):
        for window, (start, end) in zip(windows, _positions(windows, split.answers[row]), strict=True):
            for name, values in (window.columns | {"start_positions": start, "end_positions": end}).items():
                columns.setdefault(name, []).append(values)
    return columns


def evaluation_features(
    split: QuestionSplit, tokenizer: Any, *, max_length: int, stride: int
) -> EvaluationFeatures:
    """The same windows as `training_features`, with what `squad_answers.decode` needs; the same errors."""
    columns: dict[str, list[list[int]]] = {}
    example, offsets, null, positions = [], [], [], []
    for row, windows in _encode(split, tokenizer, max_length, stride):
        positions += _positions(windows, split.answers[row])
        for window in windows:
            for name, values in window.columns.items():
                columns.setdefault(name, []).append(values)
            example.append(row)
            offsets.append(window.offsets)
            null.append(window.null)
    padded = np.full((len(offsets), max(map(len, offsets)), 2), -1, dtype=np.int32)  # [W, T, 2]
    for window, values in zip(padded, offsets, strict=True):
        window[: len(values)] = values
    starts, ends = np.array(positions, dtype=np.int64).T
    return EvaluationFeatures(
        columns=columns,
        example=np.array(example, dtype=np.int64),
        offsets=padded,
        null=np.array(null, dtype=np.int64),
        start_positions=starts,
        end_positions=ends,
    )


@dataclass(frozen=True, kw_only=True)
class _Window:
    columns: dict[str, list[int]]
    offsets: np.ndarray  # [tokens, 2] characters of the context, -1 elsewhere
    null: int  # position of [CLS]


def _checked_answers(answers: Any, context: str) -> dict[str, list]:
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
        raise ValueError(f"answers is {answers!r:.60}, not a struct of the lists text and answer_start")
    texts, starts = answers["text"] or [], answers["answer_start"] or []
    if not isinstance(texts, list) or not isinstance(starts, list):
        raise ValueError(f"answers is {answers!r:.60}, not a struct of the lists text and answer_start")
    if len(texts) != len(starts):
        raise ValueError(f"{len(texts)} answers have {len(starts)} places")
    found = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"an answer is {text!r}, not a text")
        if not isinstance(start, int):
            raise ValueError(f"an answer begins at {start!r}, not at a character")
        found.append(_locate(text, start, context))
    return {"text": [text for text, _ in found], "answer_start": [start for _, start in found]}


def _locate(text: str, start: int, context: str) -> tuple[str, int]:
    """The answer and its place, the nearest one where it is not at `start`."""
    if start >= 0 and context.startswith(text, start):
        return text, start
    for form in (text, text.strip()):  # some files have white space around an answer that the context lacks
        places = []
        place = context.find(form)
        while place >= 0:
            places.append(place)
            place = context.find(form, place + 1)
        if places:
            return form, min(places, key=lambda place: abs(place - start))
    raise ValueError(f"answer {text!r:.60} is not in the context")


def _longest_question(tokenizer: Any, max_length: int, stride: int) -> int:
    """Tokens that a question may have; checks the tokenizer and the two lengths.

    At most half of what the special tokens and the stride leave, so that windows advance by at least as much.
    """
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name} does not say which characters a token stands for; use a fast tokenizer, "
            "as AutoTokenizer.from_pretrained(...) gives where the model has a tokenizer.json"
        )
    if tokenizer.cls_token_id is None:
        raise ValueError(
            f"{name} has no [CLS] token to stand for 'no answer'; use an encoder with one, such as BERT, "
            "RoBERTa or DeBERTa"
        )
    if stride < 0:
        raise ValueError(f"stride is {stride}; windows share 0 tokens or more")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = min(MAX_QUESTION_LENGTH, (max_length - special - stride) // 2)
    if longest < 1:
        raise ValueError(
            f"max_length {max_length} leaves no room for question and context beside {special} special "
            f"tokens and stride {stride}; choose at least {special + stride + 2} or a smaller stride"
        )
    return longest


def _shorten(questions: list[str], tokenizer: Any, longest: int) -> list[str]:
    """Questions without outer white space, cut at the end of a token where they have more than `longest`."""
    shortened = [question.strip() for question in questions]
    lengths = map(len, tokenizer(shortened, add_special_tokens=False, verbose=False)["input_ids"])
    for i, length in enumerate(lengths):
        keep = longest
        while length > longest:  # what is left of a cut word may be split into more tokens than before
            encoded = tokenizer(
                shortened[i], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            shortened[i] = shortened[i][: encoded["offset_mapping"][keep - 1][1] if keep else 0]
            length = len(tokenizer(shortened[i], add_special_tokens=False, verbose=False)["input_ids"])
            keep -= 1
    return shortened


def _encode(
    split: QuestionSplit, tokenizer: Any, max_length: int, stride: int
) -> Iterator[tuple[int, list[_Window]]]:
    """Every row of the split with its windows."""
    longest = _longest_question(tokenizer, max_length, stride)
    if not len(split):
        raise ValueError(f"no questions of {split.source} are left; select at least one")
    question_first = tokenizer.padding_side == "right"
    context_sequence = 1 if question_first else 0
    for begin in range(0, len(split), ROWS_AT_ONCE):
        questions = _shorten(split.questions[begin : begin + ROWS_AT_ONCE], tokenizer, longest)
        contexts = split.contexts[begin : begin + ROWS_AT_ONCE]
        encoded = tokenizer(
            *((questions, contexts) if question_first else (contexts, questions)),
            truncation="only_second" if question_first else "only_first",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False if question_first else "max_length",
        )
        names = [name for name in tokenizer.model_input_names if name in encoded]
        windows: list[list[_Window]] = [[] for _ in questions]
        for i, row in enumerate(encoded["overflow_to_sample_mapping"]):
            sequence = encoded.sequence_ids(i)
            offsets = np.array(encoded["offset_mapping"][i], dtype=np.int32)
            offsets[[part != context_sequence for part in sequence]] = -1
            columns = {name: encoded[name][i] for name in names}
            # A text may spell [CLS] itself: only the one that the tokenizer added counts.
            added = (
                position
                for position, (token, part) in enumerate(zip(columns["input_ids"], sequence, strict=True))
                if part is None and token == tokenizer.cls_token_id
            )
            null = next(added, None)
            if null is None:
                raise ValueError(
                    f"{type(tokenizer).__name__} adds no {tokenizer.cls_token} token, which stands for "
                    "'no answer'; use the tokenizer of an encoder such as BERT, RoBERTa or DeBERTa"
                )
            windows[row].append(_Window(columns=columns, offsets=offsets, null=null))
        yield from enumerate(windows, start=begin)


def _positions(windows: list[_Window], answers: dict[str, list]) -> list[tuple[int, int]]:
    """First and last token of the first answer in every window that holds all of it, else [CLS] twice."""
    nowhere = [(window.null, window.null) for window in windows]
    if not answers["text"]:
        return nowhere
    text = answers["text"][0]
    start = answers["answer_start"][0] + len(text) - len(text.lstrip())
    end = start + len(text.strip())
    # Compared with what the tokens of all windows cover of the answer: tokenizers drop some characters, and
    # some count the white space before a token only where the token begins a window.
    covered: list[tuple[int, int] | None] = []
    labels = []
    for window in windows:
        tokens = np.flatnonzero((window.offsets[:, 1] > start) & (window.offsets[:, 0] < end))
        if len(tokens):
            first, last = int(tokens[0]), int(tokens[-1])
            labels.append((first, last))
            covered.append((max(start, window.offsets[first, 0]), min(end, window.offsets[last, 1])))
        else:
            labels.append((window.null, window.null))
            covered.append(None)
    parts = [part for part in covered if part is not None]
    if not parts:
        return nowhere
    whole = (min(part[0] for part in parts), max(part[1] for part in parts))
    return [
        label if part == whole else null for label, part, null in zip(labels, covered, nowhere, strict=True)
    ]
