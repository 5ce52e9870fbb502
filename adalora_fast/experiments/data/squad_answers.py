"""From the scores of start and end tokens to answers, as the evaluation of SQuAD asks for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .squad import EvaluationFeatures, QuestionSplit

WINDOWS_AT_ONCE = 1024  # 400 spans each: 3 MB per array


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answers to one question.

    `text` is the answer: the best span, or "" where "no answer" is allowed and scores higher (threshold 0).
    `span` is the text of the best span in any case, `score` its start logit plus end logit. `no_answer` is
    the score of "no answer" minus `score`. `nbest` has texts and their probabilities among themselves, best
    first, each text once; with "no answer" as "" where that is allowed.

    A context without any span gives `span` "", the score of "no answer" as `score`, and `no_answer` 0.
    """

    id: str
    text: str
    span: str
    score: float
    no_answer: float
    nbest: tuple[tuple[str, float], ...]

    def at(self, threshold: float) -> str:
        """The answer where "no answer" must be more than `threshold` above the best span."""
        return "" if self.no_answer > threshold else self.span


def decode(
    split: QuestionSplit,
    features: EvaluationFeatures,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    unanswerable: bool,
) -> list[Answer]:
    """The best spans of every question, from logits [W, L] of W windows; L is at least their longest length.

    As in Hugging Face's `run_qa`: a span goes from one of the `n_best` highest starts of a window to one of
    its `n_best` highest ends, has at most `max_answer_length` tokens, and scores start logit + end logit; the
    best of all windows counts. "No answer" scores the sum at [CLS], the lowest of all windows, and is the
    answer where that is higher and `unanswerable` is true.

    Only tokens of the context compete, so that neither padding nor the question takes one of the `n_best`
    places. Of equal logits the earlier token is taken; of equal spans that of the earlier window, then the
    earlier start, then the earlier end; a span wins against an equally high "no answer". Texts are without
    outer white space, and white space alone is not a span.

    ValueError: shapes that do not fit the windows, logits that are not finite, or a limit below 1. Sums are
    in float64.
    """
    shape = features.offsets.shape[:2]
    start_logits, end_logits = np.asarray(start_logits), np.asarray(end_logits)
    for name, logits in (("start_logits", start_logits), ("end_logits", end_logits)):
        if logits.ndim != 2 or logits.shape[0] != shape[0] or logits.shape[1] < shape[1]:
            raise ValueError(
                f"{name} is {list(logits.shape)}, but there are {shape[0]} windows of up to {shape[1]} "
                "tokens; give the logits of exactly these features"
            )
    for name, limit in (("n_best", n_best), ("max_answer_length", max_answer_length)):
        if limit < 1:
            raise ValueError(f"{name} is {limit}; choose at least 1")
    null = np.full(len(split), np.inf)
    spans: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(len(split))]
    for window, null_score, *found in _spans(features, start_logits, end_logits, n_best, max_answer_length):
        row = features.example[window]
        null[row] = min(null[row], null_score)
        spans[row].append(tuple(found))
    return [
        _answer(split.ids[row], split.contexts[row], spans[row], float(null[row]), n_best, unanswerable)
        for row in range(len(split))
    ]


def _spans(
    features: EvaluationFeatures, start_logits: np.ndarray, end_logits: np.ndarray, n_best: int, longest: int
) -> Iterator[tuple[Any, ...]]:
    """Of each window its number, the score of "no answer", and of its spans, best first, the scores and the
    characters where they begin and end.
    """
    length = features.offsets.shape[1]
    for begin in range(0, len(features), WINDOWS_AT_ONCE):
        block = slice(begin, begin + WINDOWS_AT_ONCE)
        offsets = features.offsets[block]  # [W, T, 2]
        outside = offsets[..., 0] < 0
        window = np.arange(len(offsets))
        null = np.zeros(len(offsets))
        masked = []
        for logits in (start_logits, end_logits):
            logits = logits[block, :length].astype(np.float64)
            null += logits[window, features.null[block]]
            logits[outside] = 0.0  # padding may hold anything
            if not np.isfinite(logits.sum(axis=1) + null).all():
                raise ValueError(
                    "the logits are not finite: the model diverged; train it with a lower learning rate"
                )
            logits[outside] = -np.inf
            masked.append(logits)
        starts, ends = (_highest(logits, n_best) for logits in masked)  # [W, n]
        scores = (  # [W, n, n]
            np.take_along_axis(masked[0], starts, axis=1)[:, :, None]
            + np.take_along_axis(masked[1], ends, axis=1)[:, None, :]
        )
        tokens = ends[:, None, :] - starts[:, :, None] + 1
        scores[(tokens < 1) | (tokens > longest)] = -np.inf
        scores = scores.reshape(len(offsets), -1)
        order = np.argsort(-scores, axis=1, kind="stable")
        scores = np.take_along_axis(scores, order, axis=1)
        counts = np.isfinite(scores).sum(axis=1)
        width = starts.shape[1]
        characters_from = offsets[window[:, None], np.take_along_axis(starts, order // width, axis=1), 0]
        characters_to = offsets[window[:, None], np.take_along_axis(ends, order % width, axis=1), 1]
        for i, count in enumerate(counts):
            yield (
                begin + i,
                null[i],
                scores[i, :count],
                characters_from[i, :count],
                characters_to[i, :count],
            )


def _highest(logits: np.ndarray, count: int) -> np.ndarray:
    """Positions [W, n] of the `count` highest of each row, in the order of the tokens, so that a stable sort
    of their pairs takes the earlier of equal ones.
    """
    return np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :count], axis=1)


def _answer(
    identifier: str,
    context: str,
    windows: list[tuple[np.ndarray, ...]],
    null: float,
    n_best: int,
    unanswerable: bool,
) -> Answer:
    if not windows:
        raise ValueError(f"question {identifier!r} has no window; give the features of this split")
    scores, begins, ends = windows[0]
    if len(windows) > 1:
        scores, begins, ends = (np.concatenate(parts) for parts in zip(*windows, strict=True))
        order = np.argsort(-scores, kind="stable")
        scores, begins, ends = scores[order], begins[order], ends[order]
    best: dict[str, float] = {}
    for score, begin, end in zip(scores.tolist(), begins.tolist(), ends.tolist(), strict=True):
        text = context[begin:end].strip()
        if text:
            best.setdefault(text, score)
            if len(best) == n_best:
                break
    span, score = next(iter(best.items()), ("", null))
    if unanswerable:
        best[""] = null  # after the spans: the sort is stable
    ranked = sorted(best.items(), key=lambda item: -item[1])
    values = np.array([value for _, value in ranked])
    weights = np.exp(values - values.max()) if len(values) else values
    probabilities = (weights / weights.sum()).tolist()
    return Answer(
        id=identifier,
        text="" if unanswerable and null > score else span,
        span=span,
        score=score,
        no_answer=null - score,
        nbest=tuple((text, p) for (text, _), p in zip(ranked, probabilities, strict=True)),
    )
