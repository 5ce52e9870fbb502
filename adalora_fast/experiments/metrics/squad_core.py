"""Exact match and F1 of SQuAD v1.1 and v2.0, by the rules of the data sets' evaluation scripts.

Sources: P. Rajpurkar et al., arXiv:1606.05250 (evaluate-v1.1.py) and arXiv:1806.03822 (evaluate-v2.0.py).
The two differ where a text is empty after normalisation: v1.1 gives F1 = 0 against an empty gold answer, v2.0
gives 1 for empty against empty and 0 for empty against anything else (`empty_is_one` below). Unlike the
scripts, which print a message and count on, a question without a prediction is an error here.

Scores of single questions are fractions; `evaluate_v1` and `evaluate_v2` give the scripts' percentages.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# ASCII punctuation alone, as in the scripts: curly quotes and dashes remain.
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """`text` in lower case without ASCII punctuation and articles, runs of whitespace as one space.

    Punctuation goes before articles, and joins what it stood between: "the-end" becomes "theend". Other
    punctuation stays, and bounds a word: "the—end" with a dash becomes "—end". Whitespace is what str.split
    takes for it, non-breaking spaces included.
    """
    if not isinstance(text, str):
        raise TypeError(f"an answer is {text!r}, a {type(text).__name__}; answers are texts")
    words = _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()
    return " ".join(words)


def exact_match(prediction: str, golds: Iterable[str], empty_is_one: bool = False) -> float:
    """1.0 if the normalised prediction equals a normalised gold answer, else 0.0.

    Without gold answers the question is unanswerable, and "" is the right prediction. `empty_is_one` chooses
    the rule of v2.0 that gold answers which are empty after normalisation do not count beside others.
    """
    return _scores(prediction, golds, empty_is_one)[0]


def f1(prediction: str, golds: Iterable[str], empty_is_one: bool) -> float:
    """F1 = 2 · common / (predicted + gold) over the words of normalised texts, the best of the gold answers.

    Words count as often as they are repeated. Empty against empty is 1 by the rules of v2.0 (`empty_is_one`),
    and 0 by those of v1.1, the one case where F1 is below the exact match; empty against anything else is 0.
    """
    return _scores(prediction, golds, empty_is_one)[1]


def per_question(
    predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]], *, empty_is_one: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each question, both float64 [N] in [0, 1], in the order of `golds`.

    `predictions` and `golds` are by question id. ValueError for no questions, questions without a prediction,
    predictions for unknown questions, and, by the rules of v1.1, questions without gold answers.
    """
    _check_questions(predictions, golds)
    if not empty_is_one:
        unanswerable = [key for key, texts in golds.items() if not len(texts)]
        if unanswerable:
            raise ValueError(
                f"question {unanswerable[0]!r} has no gold answer ({len(unanswerable)} of {len(golds)}); "
                "SQuAD v1.1 has an answer to every question: use the rules of v2.0"
            )
    scores = np.array([_scores(predictions[key], texts, empty_is_one) for key, texts in golds.items()])
    return scores[:, 0], scores[:, 1]


def evaluate_v1(predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The output of evaluate-v1.1.py: "exact_match" and "f1", in percent. Errors as `per_question`."""
    exact, overlap = per_question(predictions, golds, empty_is_one=False)
    return {"exact_match": _percent(exact), "f1": _percent(overlap)}


def evaluate_v2(
    predictions: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    no_answer: Mapping[str, float],
    threshold: float = 1.0,
) -> dict[str, float | int]:
    """The output of evaluate-v2.0.py, in percent.

    `no_answer` are scores of being unanswerable, probabilities or not; a question above `threshold` counts as
    answered with "". An unanswerable question has an empty list in `golds`.

    Keys: "exact", "f1", "total"; the same with the prefixes "HasAns_" and "NoAns_" where there are such
    questions; "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh" (see `best_threshold`: these
    thresholds are chosen on the very questions they are evaluated on).

    ValueError as in `per_question`, and for scores that are missing, unknown or not a number.
    """
    raw = dict(zip(("exact", "f1"), per_question(predictions, golds, empty_is_one=True)))
    _check_questions(no_answer, golds, "no-answer score")
    absent = np.array([no_answer[key] for key in golds], dtype=np.float64)
    if np.isnan(absent).any():
        key = list(golds)[int(np.isnan(absent).argmax())]
        raise ValueError(
            f"the no-answer score of question {key!r} is nan; a diverged model cannot be evaluated"
        )
    if np.isnan(threshold):
        raise ValueError("the no-answer threshold is nan; give a number, 1.0 to keep every answer")
    has_answer = np.array([len(texts) > 0 for texts in golds.values()])
    answered = np.array([bool(predictions[key]) for key in golds])
    scores = {name: np.where(absent > threshold, ~has_answer, values) for name, values in raw.items()}

    result: dict[str, float | int] = {}
    for prefix, part in (("", has_answer | True), ("HasAns_", has_answer), ("NoAns_", ~has_answer)):
        if part.any():
            result |= {f"{prefix}{name}": _percent(values[part]) for name, values in scores.items()}
            result[f"{prefix}total"] = int(part.sum())
    for name, values in raw.items():
        best, at = best_threshold(values, absent, answered, has_answer)
        result |= {f"best_{name}": 100.0 * best, f"best_{name}_thresh": at}
    return result


def best_threshold(
    scores: np.ndarray, no_answer: np.ndarray, answered: np.ndarray, has_answer: np.ndarray
) -> tuple[float, float]:
    """The best mean score over thresholds on `no_answer`, a fraction, and the threshold, as evaluate-v2.0.py.

    scores [N]: exact match or F1 of the predictions before any threshold; no_answer [N]: score of being
    unanswerable; answered [N]: whether the prediction is not ""; has_answer [N]: whether there is a gold one.

    Questions are accepted in ascending order of `no_answer` (ties in the given order). With none accepted the
    sum is the number of unanswerable questions; accepting an answerable one adds its score, and accepting an
    unanswerable one takes 1 away if it was answered. The first maximum is taken, 0.0 being the threshold
    where accepting none is best. Two rules of the script are kept though one may wonder at them: the maximum
    may lie between questions of equal `no_answer`, which no threshold parts, and an answer that is only empty
    after normalisation ("the") loses the point of an unanswerable question.
    """
    order = np.argsort(no_answer, kind="stable")
    gain = np.where(has_answer, scores, -np.asarray(answered, dtype=np.float64))
    sums = np.cumsum(np.concatenate([[float((~np.asarray(has_answer)).sum())], gain[order]]))
    best = int(sums.argmax())
    threshold = float(np.asarray(no_answer)[order[best - 1]]) if best else 0.0
    return float(sums[best] / len(sums[1:])), threshold


def _scores(prediction: str, golds: Iterable[str], empty_is_one: bool) -> tuple[float, float]:
    """Exact match and F1 of one question."""
    if isinstance(golds, str):
        raise TypeError(f"gold answers are the text {golds!r}; give a list of texts")
    texts = [normalise(gold) for gold in golds]
    if empty_is_one:
        texts = [text for text in texts if text]
    texts = texts or [""]
    predicted = normalise(prediction)
    overlap = max(_overlap(predicted.split(), text.split(), empty_is_one) for text in texts)
    return float(predicted in texts), overlap


def _overlap(predicted: list[str], gold: list[str], empty_is_one: bool) -> float:
    if not predicted and not gold:
        return float(empty_is_one)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def _percent(scores: np.ndarray) -> float:
    return 100.0 * float(scores.sum()) / len(scores)


def _check_questions(
    given: Mapping[str, object], golds: Mapping[str, object], name: str = "prediction"
) -> None:
    if not golds:
        raise ValueError("there are no questions; evaluate at least one")
    missing = [key for key in golds if key not in given]
    if missing:
        raise ValueError(
            f"question {missing[0]!r} has no {name} ({len(missing)} such of {len(golds)}); "
            "give one for every question"
        )
    unknown = [key for key in given if key not in golds]
    if unknown:
        raise ValueError(
            f"the {name} for {unknown[0]!r} is for none of the {len(golds)} questions ({len(unknown)} such); "
            "leave them out, or give the questions they answer"
        )
