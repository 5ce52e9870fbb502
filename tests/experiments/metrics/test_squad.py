"""SQuAD's exact match and F1 against literal statements of the official rules, question by question."""

import math
import os
import string
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.experiments.metrics import squad_core as squad

DATA = Path(os.environ.get("ADALORA_FAST_DATA", Path(__file__).parents[4] / "shared" / "data"))

# Words, articles alone and inside words, other scripts, punctuation of ASCII and beyond, kinds of whitespace.
PIECES = [
    "a",
    "an",
    "the",
    "The",
    "THE",
    "cat",
    "dog",
    "theatre",
    "Ana",
    "é",
    "à",
    "a\u0301",
    "İ",
    "ß",
    "答案",
    "٣",
]
PIECES += [
    " ",
    "  ",
    "\t",
    "\n",
    "\u00a0",
    "\u2003",
    "\u200b",
    "-",
    "—",
    "'",
    "’",
    "“",
    ".",
    ",",
    "$",
    "%",
    "_",
]
texts = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


def literal_normalise(text):
    """Lower case; no character of string.punctuation; runs of word characters that are an article become a
    space; what whitespace parts is joined by single spaces.
    """
    kept, run, output = [c for c in text.lower() if c not in string.punctuation], "", ""
    for character in [*kept, None]:
        if character is not None and (character.isalnum() or character == "_"):
            run += character
            continue
        output += " " if run in ("a", "an", "the") else run
        output, run = output + (character or ""), ""
    return " ".join(output.split())


def literal_scores(prediction, golds, version2):
    """(exact match, F1), the best over the gold answers."""
    if version2:
        golds = [gold for gold in golds if literal_normalise(gold)] or [""]
    exact, overlap = [], []
    for gold in golds:
        predicted, truth = literal_normalise(prediction).split(), literal_normalise(gold).split()
        exact.append(float(predicted == truth))
        rest, same = list(truth), 0
        for word in predicted:
            if word in rest:
                rest.remove(word)
                same += 1
        if version2 and not (predicted and truth):
            overlap.append(float(predicted == truth))
        elif same == 0:
            overlap.append(0.0)
        else:
            precision, recall = same / len(predicted), same / len(truth)
            overlap.append(2 * precision * recall / (precision + recall))
    return max(exact), max(overlap)


def literal_best(ids, scores, no_answer, texts, golds):
    """The best sum over the questions in ascending order of their no-answer score, and its threshold."""
    total = best = sum(1 for key in ids if not golds[key])
    threshold = 0.0
    for key in sorted(ids, key=lambda key: no_answer[key]):
        if golds[key]:
            total += scores[key]
        elif texts[key]:
            total -= 1
        if total > best:
            best, threshold = total, no_answer[key]
    return 100.0 * best / len(ids), threshold


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's  tail.", "cats tail"),
        ("an anaconda, a theatre & the end", "anaconda theatre end"),  # articles inside words stay
        ("the-end", "theend"),  # punctuation goes before articles are looked for
        ("the—end", "—end"),  # a dash that is no ASCII is not removed, and ends a word
        ("“the” answer", "“ ” answer"),
        ("a\u00a0b\u2003c\td\n", "b c d"),
        ("the\u200bend", "\u200bend"),  # a zero-width space is no whitespace to str.split, but ends a word
        ("a an the", ""),
        ("?!...", ""),
        ("", ""),
        ("$1,000,000.50", "100000050"),
        ("U.S.A.", "usa"),
        ("a.", ""),
        ("à la", "à la"),
        ("a\u0301", "\u0301"),  # a decomposed accent does not belong to the word
        ("ÉCOLE", "école"),
    ],
)
def test_normalise(text, expected):
    assert squad.normalise(text) == expected == literal_normalise(text)


@settings(max_examples=300, deadline=None)
@given(text=texts | st.text(max_size=20))
def test_normalise_is_the_literal_rule(text):
    assert squad.normalise(text) == literal_normalise(text)


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "version1", "version2"),
    [
        ("the cat", ["Cat!"], 1, 1, 1),
        ("black cat", ["cat"], 0, 2 / 3, 2 / 3),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3, 2 / 3),  # a word counts as often as it is repeated
        ("cat", ["dog", "a black cat", "cat"], 1, 1, 1),
        ("cat dog", ["dog", "cat bird fish"], 0, 2 / 3, 2 / 3),
        ("", ["cat"], 0, 0, 0),
        ("the", ["a"], 1, 0, 1),  # empty after normalisation: where the versions differ
        ("", ["."], 1, 0, 1),
        ("cat", ["the"], 0, 0, 0),
        ("cat", [], 0, 0, 0),
        ("", [], 1, 0, 1),
        ("dog cat", ["cat dog"], 0, 1, 1),
    ],
)
def test_scores_of_one_question(prediction, golds, exact, version1, version2):
    assert squad.exact_match(prediction, golds) == exact
    assert squad.f1(prediction, golds, empty_is_one=False) == pytest.approx(version1)
    assert squad.f1(prediction, golds, empty_is_one=True) == pytest.approx(version2)


def test_gold_answers_that_are_empty_do_not_count_beside_others_in_version_2():
    assert squad.exact_match("", ["the", "cat"]) == 1
    assert squad.exact_match("", ["the", "cat"], empty_is_one=True) == 0
    assert squad.f1("", ["the", "cat"], empty_is_one=True) == 0


@settings(max_examples=300, deadline=None)
@given(prediction=texts, golds=st.lists(texts, min_size=1, max_size=4), version2=st.booleans())
def test_scores_are_the_literal_rules(prediction, golds, version2):
    exact, overlap = literal_scores(prediction, golds, version2)
    assert squad.exact_match(prediction, golds, version2) == exact
    assert squad.f1(prediction, golds, version2) == pytest.approx(overlap, abs=1e-15)
    if version2 or squad.normalise(prediction):
        assert 0 <= exact <= overlap + 1e-15 <= 1 + 1e-12
    assert squad.f1(prediction, golds[::-1], version2) == squad.f1(prediction, golds, version2)


# Probabilities of which many are equal, golds of which many are empty, and predictions that do not answer.
question = st.tuples(
    texts | st.just("cat"),
    st.lists(st.sampled_from(["cat", "the cat", "dog", "the", "cat dog"]), max_size=3),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-5, 5),
)
questions = st.lists(question, min_size=1, max_size=8)


def by_id(rows):
    ids = [f"q{number}" for number in range(len(rows))]
    return tuple(dict(zip(ids, column)) for column in zip(*rows))


@settings(max_examples=200, deadline=None)
@given(rows=questions, threshold=st.sampled_from([-1.0, 0.0, 0.25, 1.0]))
def test_version_2_is_the_literal_rules(rows, threshold):
    predictions, golds, no_answer = by_id(rows)
    raw = {key: literal_scores(predictions[key], golds[key], True) for key in golds}
    expected = {}
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        ids = [key for key in golds if bool(golds[key]) in wanted]
        for number, name in enumerate(("exact", "f1")):
            kept = [float(not golds[k]) if no_answer[k] > threshold else raw[k][number] for k in ids]
            if ids:
                expected[f"{prefix}{name}"] = 100.0 * sum(kept) / len(ids)
        if ids:
            expected[f"{prefix}total"] = len(ids)
    for number, name in enumerate(("exact", "f1")):
        scores = {key: value[number] for key, value in raw.items()}
        best, at = literal_best(list(golds), scores, no_answer, predictions, golds)
        expected |= {f"best_{name}": best, f"best_{name}_thresh": at}
    found = squad.evaluate_v2(predictions, golds, no_answer, threshold)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-10)
    assert all(type(value) is (int if key.endswith("total") else float) for key, value in found.items())


@settings(max_examples=100, deadline=None)
@given(rows=questions, order=st.randoms(use_true_random=False))
def test_version_2_breakdown_and_order(rows, order):
    predictions, golds, no_answer = by_id(rows)
    found = squad.evaluate_v2(predictions, golds, no_answer)
    parts = [prefix for prefix in ("HasAns_", "NoAns_") if f"{prefix}total" in found]
    assert sum(found[f"{prefix}total"] for prefix in parts) == found["total"] == len(golds)
    for name in ("exact", "f1"):
        total = sum(found[f"{prefix}{name}"] * found[f"{prefix}total"] for prefix in parts)
        assert total / found["total"] == pytest.approx(found[name])
    ids = list(golds)
    order.shuffle(ids)
    shuffled = squad.evaluate_v2(predictions, {key: golds[key] for key in ids}, no_answer)
    for key in set(found) - {"best_exact", "best_f1", "best_exact_thresh", "best_f1_thresh"}:
        assert shuffled[key] == pytest.approx(found[key])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 10))
def test_no_threshold_beats_the_best_one(data, size):
    scores = np.array(data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)))
    no_answer = np.array(data.draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))) / 4
    has_answer, answered = (
        np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))) for _ in range(2)
    )
    scores = np.where(has_answer, scores * answered, ~answered)  # what an answer or none can get
    best, threshold = squad.best_threshold(scores, no_answer, answered, has_answer)
    reached = [
        np.where(no_answer > at, ~has_answer, scores).mean() for at in (-math.inf, *no_answer, 0.0, math.inf)
    ]
    assert best >= max(reached) - 1e-12
    if len(set(no_answer)) == size:  # without ties the best is reached
        assert best == pytest.approx(max(reached))
        assert threshold == 0.0 or threshold in no_answer


def test_best_threshold_by_hand():
    # accepted in the order 1 (right), 0 (unanswerable, answered), 2 (right): 1, 2, 1, 2; the first maximum
    scores, no_answer = np.array([0.0, 1.0, 1.0]), np.array([0.2, 0.1, 0.3])
    answered, has_answer = np.array([True, True, True]), np.array([False, True, True])
    assert squad.best_threshold(scores, no_answer, answered, has_answer) == (pytest.approx(2 / 3), 0.1)
    # nothing right: refusing every answer is best, and the threshold is 0
    assert squad.best_threshold(scores * 0, no_answer, answered, has_answer) == (pytest.approx(1 / 3), 0.0)


def test_version_1_by_hand():
    predictions = {"x": "the cat", "y": "black dog", "z": ""}
    golds = {"x": ["cat", "dog"], "y": ["dog"], "z": ["bird"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = squad.evaluate_v1(predictions, golds)
    assert found == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(100 * (1 + 2 / 3) / 3)}
    exact, overlap = squad.per_question(predictions, golds, empty_is_one=False)
    assert exact.tolist() == [1, 0, 0] and overlap == pytest.approx([1, 2 / 3, 0])


GOLDS, SCORES = {"x": ["cat"], "y": []}, {"x": 0.0, "y": 1.0}


@pytest.mark.parametrize(
    ("predictions", "golds", "no_answer", "message"),
    [
        ({"x": "cat"}, GOLDS, SCORES, r"question 'y' has no prediction \(1 such of 2\)"),
        ({"x": "cat", "y": "", "z": ""}, GOLDS, SCORES, "the prediction for 'z' is for none of the 2"),
        ({"x": "cat", "y": ""}, GOLDS, {"x": 0.0}, "question 'y' has no no-answer score"),
        ({"x": "cat", "y": ""}, GOLDS, {"x": math.nan, "y": 0.0}, "score of question 'x' is nan"),
        ({}, {}, {}, "there are no questions"),
    ],
)
def test_bad_questions(predictions, golds, no_answer, message):
    with pytest.raises(ValueError, match=message) as error:
        squad.evaluate_v2(predictions, golds, no_answer)
    assert "\n" not in str(error.value)


def test_bad_values():
    with pytest.raises(ValueError, match=r"question 'y' has no gold answer \(1 of 2\)"):
        squad.evaluate_v1({"x": "cat", "y": ""}, GOLDS)
    with pytest.raises(ValueError, match="threshold is nan"):
        squad.evaluate_v2({"x": "cat", "y": ""}, GOLDS, SCORES, math.nan)
    with pytest.raises(TypeError, match=r"an answer is None, a NoneType"):
        squad.exact_match(None, ["cat"])
    with pytest.raises(TypeError, match=r"gold answers are the text 'cat'; give a list"):
        squad.f1("cat", "cat", empty_is_one=False)


@pytest.mark.skipif(not (DATA / "squad_v2").is_dir(), reason="no SQuAD files; set ADALORA_FAST_DATA")
def test_real_questions():
    """Gold answers score 1; those of other questions as the literal rules say."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(DATA / "squad_v2" / "validation.parquet", columns=["id", "answers"])
    rows = table.slice(0, 3000).to_pylist()
    golds = {row["id"]: row["answers"]["text"] for row in rows}
    right = {key: texts[0] if texts else "" for key, texts in golds.items()}
    found = squad.evaluate_v2(right, golds, {key: float(not texts) for key, texts in golds.items()}, 0.5)
    assert found["exact"] == found["f1"] == found["best_f1"] == 100.0 and found["NoAns_total"] > 1000
    shifted = dict(zip(golds, [*list(right.values())[1:], ""]))
    exact, overlap = squad.per_question(shifted, golds, empty_is_one=True)
    literal = np.array([literal_scores(shifted[key], golds[key], True) for key in golds])
    np.testing.assert_allclose(np.stack([exact, overlap], axis=1), literal, rtol=0, atol=1e-15)
    assert 0 < exact.mean() < overlap.mean() < 1
