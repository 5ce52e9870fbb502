"""Question answering: files, held-out rows, and windows over passages."""

import math
import re

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
    TOKENIZERS,
    answerable,
    every_tokenizer,
    labelled,
    make_tokenizer,
    oracle,
    questions,
)
from tests.helpers.tiny import write_parquet


def write(folder, split="train", task="squad", **columns):
    rows = {
        "id": ["a", "b"],
        "title": ["t", "t"],
        "context": ["the old moon", " a new star "],
        "question": [" which moon?", "what is new?"],
        "answers": [
            {"text": ["old"], "answer_start": [4]},
            {"text": ["star", "new star"], "answer_start": [7, 3]},
        ],
    }
    rows = {name: values for name, values in (rows | columns).items() if values is not None}
    write_parquet(folder / task / f"{split}.parquet", **rows)
    return folder


def test_reads_the_file(tmp_path):
    split = load_questions(TASKS["squad"], "train", write(tmp_path))
    assert len(split) == 2 and not split.sample and split.source.endswith("squad/train.parquet")
    assert split.ids == ["a", "b"] and split.contexts[1] == " a new star "
    assert split.questions[0] == " which moon?"
    assert split.answers[1] == {"text": ["star", "new star"], "answer_start": [7, 3]}


def test_a_part_of_the_split_is_a_sample(tmp_path):
    split = load_questions(TASKS["squad"], "train", write(tmp_path, split="train_sample"))
    assert split.sample
    whole = load_questions(TASKS["squad"], "train", write(tmp_path))
    assert not whole.sample and whole.take(2) == whole.take(None) == whole
    assert whole.take(1).sample and len(whole.take(1)) == 1
    swapped = whole.select([1, 0])
    assert swapped.ids == ["b", "a"] and swapped.answers[1] == whole.answers[0] and not swapped.sample


def answer(text, start):
    return {"text": [text], "answer_start": [start]}


@pytest.mark.parametrize(
    ("given_answer", "found"),
    [
        (("star", 8), ("star", 5)),  # off by some
        (("star", 12), ("star", 14)),  # the nearer of two
        (("star", -3), ("star", 5)),
        (("star", 900), ("star", 14)),
        ((" star", 14), (" star", 13)),  # a leading space
        (("star\n", 15), ("star", 14)),  # white space that the context lacks
        (("star", 5), ("star", 5)),
    ],
)
def test_moves_an_answer_to_where_it_is(tmp_path, given_answer, found):
    folder = write(
        tmp_path,
        context=["the  star and star.", "new"],
        answers=[answer(*given_answer), answer("new", 0)],
    )
    assert load_questions(TASKS["squad"], "train", folder).answers[0] == answer(*found)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answers": None}, "no column 'answers'.*rename"),
        ({"id": ["a", "a"]}, "row 1: id 'a' occurs twice"),
        ({"question": ["x", None]}, "row 1: question is None, not a text"),
        ({"context": [1, 2]}, "row 0: context is 1, not a text"),
        ({"answers": [answer("sun", 4), answer("new", 3)]}, "row 0: answer 'sun' is not in the context"),
        ({"answers": [answer("old", 4), answer(" ", 2)]}, "row 1: an answer is ' '"),
        ({"answers": [answer("old", 4), answer(None, 2)]}, "row 1: an answer is None"),
        ({"answers": [answer("old", 4), answer("new", None)]}, "row 1: an answer begins at None"),
        (
            {"answers": [answer("old", 4), {"text": ["new"], "answer_start": []}]},
            "row 1: 1 answers have 0 places",
        ),
        ({"answers": [answer("old", 4), {"text": [], "answer_start": []}]}, "row 1 has no answer"),
        ({"answers": ["old", "new"]}, "row 0: answers is 'old', not a struct"),
        (
            {"answers": [{"text": "old", "answer_start": 4}] * 2},
            "row 0: answers is .*, not a struct of the lists",
        ),
    ],
)
def test_names_the_row_that_is_wrong(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message) as error:
        load_questions(TASKS["squad"], "train", write(tmp_path, **columns))
    assert "\n" not in str(error.value)


def test_names_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no train\.parquet.*--data-dir"):
        load_questions(TASKS["squad"], "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"rajpurkar/squad_v2.*not reachable.*--data-dir"):
        load_questions(TASKS["squad_v2"], "train", None)
    rows = {name: [] for name in ("id", "context", "question", "answers")}
    write_parquet(tmp_path / "squad" / "train.parquet", **rows)
    with pytest.raises(ValueError, match="has no rows"):
        load_questions(TASKS["squad"], "train", tmp_path)


def test_version_2_has_questions_without_an_answer(tmp_path):
    none = {"text": [], "answer_start": []}
    folder = write(tmp_path, task="squad_v2", answers=[answer("old", 4), none])
    assert load_questions(TASKS["squad_v2"], "train", folder).answers == [answer("old", 4), none]


@settings(max_examples=40, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda c: len(set(c)) > 1),
    fraction=st.floats(0.01, 0.99),
)
def test_no_context_is_on_both_sides(contexts, fraction):
    split = questions(*((f"context {c}" + " " * (i % 2), str(i), None, 0) for i, c in enumerate(contexts)))
    train, held_out = split.hold_out(fraction)
    sides = [{context.strip() for context in side.contexts} for side in (train, held_out)]
    assert not sides[0] & sides[1] and sides[0] and sides[1]
    assert sorted(train.ids + held_out.ids) == sorted(split.ids)
    for side in (train, held_out):
        assert [int(question) for question in side.questions] == sorted(map(int, side.questions))
    largest = max(contexts.count(c) for c in contexts)
    assert abs(len(held_out) - fraction * len(split)) <= largest  # within one context of the wish


def test_the_same_rows_are_held_out_every_time():
    split = questions(*((f"context {i // 2}", str(i), None, 0) for i in range(40)))
    assert len(split.hold_out(0.2)[1]) == 8
    assert split.hold_out(0.2)[1].ids == split.hold_out(0.2)[1].ids != split.select(range(8)).ids


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, math.nan])
def test_a_part_that_cannot_be_held_out(fraction):
    split = questions(("a", "?", None, 0), ("b", "?", None, 0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        split.hold_out(fraction)


def test_one_context_cannot_be_split():
    with pytest.raises(ValueError, match="all rows have the same text"):
        questions(("a", "?", None, 0), ("a ", "!", None, 0)).hold_out(0.5)


@every_tokenizer
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(answerable(), min_size=1, max_size=3), stride=st.integers(0, 12))
def test_windows_cover_the_context(tokenizer, rows, stride):
    split = questions(*rows)
    features = evaluation_features(split, tokenizer, max_length=MAX_LENGTH, stride=stride)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for row, context in enumerate(split.contexts):
        whole = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        seen: list = []
        windows = np.flatnonzero(features.example == row)
        assert len(windows) >= 1
        for number, window in enumerate(windows):
            inside = features.offsets[window, :, 0] >= 0
            offsets = features.offsets[window][inside]
            ids = np.array(features.columns["input_ids"][window])
            mask = features.columns["attention_mask"][window]
            assert len(ids) == len(mask) <= MAX_LENGTH
            assert ids[features.null[window]] == tokenizer.cls_token_id
            assert not inside[features.null[window]]
            shared = stride if number else 0
            new = offsets[shared:]
            if number:
                assert len(new) > 0 and offsets[:shared].tolist() == seen[len(seen) - shared :]
                assert len(offsets) - stride >= (MAX_LENGTH - special - stride) // 2 or window == windows[-1]
            expected = whole["input_ids"][len(seen) : len(seen) + len(new)]
            seen += new.tolist()
            assert ids[inside[: len(ids)]][shared:].tolist() == expected
            if window != windows[-1]:
                assert sum(mask) == MAX_LENGTH
        assert [tuple(pair) for pair in seen] == whole["offset_mapping"]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_characters_are_inside_their_label(data):
    context = data.draw(st.text(alphabet="moon star,x1 .", min_size=1, max_size=40).filter(str.strip))
    begin = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(begin + 1, len(context)))
    text = context[begin:end]
    if not text.strip():
        return
    (found,) = labelled(questions((context, "near", text, begin)), BERT, max_length=64)
    assert found == found.strip() and text.strip() in found
    outside = found.split(text.strip())
    assert not any(set(side) & set(" ,.") for side in (outside[0], outside[-1]))  # only the rest of a word


@pytest.mark.parametrize(
    ("context", "text", "start", "found"),
    [
        ("the moonstar old", "on", 6, "moonstar"),  # begins and ends inside a token ([UNK])
        ("the stars", "star", 4, "star"),
        ("the stars", "tar", 5, "star"),
        ("the new moon", " new ", 3, "new"),  # white space around the answer
        ("​the moon", "​the", 0, "the"),  # a character that the tokenizer drops
        ("the ​ moon", "​", 4, None),  # and nothing else
        ("old [CLS] new", "[CLS]", 4, "[CLS]"),  # a text that spells a special token
    ],
)
def test_labels_of_odd_answers(context, text, start, found):
    assert labelled(questions((context, "old", text, start)), BERT) == [found]


@every_tokenizer
def test_an_answer_cut_by_every_window_is_labelled_as_none(tokenizer):
    context = " ".join(["moon"] * 30)
    texts = labelled(questions((context, "star", context, 0)), tokenizer)
    assert len(texts) > 1 and set(texts) == {None}


@pytest.mark.parametrize("text", ["new", " new", "new ", " new "])
def test_white_space_around_an_answer_brings_no_other_word(text):
    context = "the new moon"
    split = questions((context, "old", text, context.index(text)))
    assert labelled(split, TOKENIZERS["deberta"]) == [" new"]


def test_white_space_counted_at_the_beginning_of_a_window_only():
    tokenizer = make_tokenizer("roberta", add_prefix_space=True)
    context = " ".join(["moon"] * 30)
    places = [match.start() for match in re.finditer("moon", context)]
    texts = labelled(
        questions(*((context, "x", "moon", place) for place in places)), tokenizer, max_length=25, stride=4
    )
    kept = sum(text is not None for text in texts)
    assert {text.strip() for text in texts if text} == {"moon"}
    windows = len(texts) // len(places)
    assert kept == len(places) + 2 * (windows - 1)  # neighbours share two words of two tokens
    assert windows == 4 and any(text == " moon" for text in texts)


def test_windows_without_the_answer_are_labelled_as_none():
    context = " ".join(["moon"] * 40 + ["comet"])
    texts = labelled(
        questions((context, "star", "comet", context.index("comet")), (context, "star", None, 0)), BERT
    )
    windows = len(texts) // 2
    assert windows > 2 and texts[windows - 1] == "comet" and texts.count(None) == len(texts) - 1


@every_tokenizer
def test_a_long_question_leaves_room(tokenizer):
    context = " ".join(["moon star"] * 20)
    long, longer = " star" * 500, "x" * 5000
    split = questions((context, long, "moon", 0), (context, longer, "moon", 0), (context, "", "moon", 0))
    features = evaluation_features(split, tokenizer, max_length=MAX_LENGTH, stride=STRIDE)
    room = (MAX_LENGTH - tokenizer.num_special_tokens_to_add(pair=True) - STRIDE) // 2
    tokens = (features.offsets[..., 0] >= 0).sum(axis=1)
    for row in range(3):
        assert tokens[features.example == row].max() >= STRIDE + room
    # Nothing but the limit of 64 cuts it where there is room.
    wide = evaluation_features(split.select([0]), tokenizer, max_length=400, stride=STRIDE)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    assert sum(wide.columns["attention_mask"][0]) - (wide.offsets[0, :, 0] >= 0).sum() - special == 64


def test_a_tokenizer_that_pads_on_the_left():
    tokenizer = TOKENIZERS["last"]
    split = questions(("the old moon [CLS]", "new", "old moon", 4))
    features = evaluation_features(split, tokenizer, max_length=MAX_LENGTH, stride=STRIDE)
    assert [len(ids) for ids in features.columns["input_ids"]] == [MAX_LENGTH]
    tokens = tokenizer.convert_ids_to_tokens(features.columns["input_ids"][0])
    expected = ["the", "old", "moon", "[CLS]", "[SEP]", "new", "[SEP]", "[CLS]"]
    assert tokens == ["[PAD]"] * (MAX_LENGTH - 8) + expected
    assert features.null[0] == MAX_LENGTH - 1 and features.start_positions[0] == MAX_LENGTH - 7
    assert features.end_positions[0] == MAX_LENGTH - 6


def test_columns_are_what_the_tokenizer_gives_its_model():
    split = questions(("the old moon", "new", "old", 4))
    columns = training_features(split, BERT, max_length=MAX_LENGTH, stride=STRIDE)
    labels = {"start_positions", "end_positions"}
    assert set(columns) == {"input_ids", "token_type_ids", "attention_mask"} | labels
    assert BERT.convert_ids_to_tokens(columns["input_ids"][0]) == [
        "[CLS]",
        "new",
        "[SEP]",
        "the",
        "old",
        "moon",
        "[SEP]",
    ]
    assert columns["token_type_ids"] == [[0, 0, 0, 1, 1, 1, 1]]
    assert columns["start_positions"] == columns["end_positions"] == [4]
    plain = training_features(split, TOKENIZERS["roberta"], max_length=MAX_LENGTH, stride=STRIDE)
    assert set(plain) == {"input_ids", "attention_mask", "token_type_ids"} & set(plain) | labels
    assert "token_type_ids" in TOKENIZERS["roberta"].model_input_names or "token_type_ids" not in plain


def test_tokenizers_that_cannot_be_used():
    split = questions(("the old moon", "new", "old", 4))

    class Slow:
        is_fast = False

    nameless = make_tokenizer()
    nameless.cls_token = None
    for tokenizer, message in (
        (Slow(), "Slow does not say which characters.*use a fast tokenizer"),
        (nameless, r"has no \[CLS\] token.*use an encoder"),
        (make_tokenizer("bare"), r"adds no \[CLS\] token"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            training_features(split, tokenizer, max_length=MAX_LENGTH, stride=STRIDE)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_length": 9, "stride": 5}, "max_length 9 leaves no room.*choose at least 10"),
        ({"max_length": 20, "stride": 100}, "choose at least 105 or a smaller stride"),
        ({"max_length": 20, "stride": -1}, "stride is -1"),
    ],
)
def test_lengths_that_do_not_fit(lengths, message):
    split = questions(("the old moon " * 9, "new star", "old", 4))
    with pytest.raises(ValueError, match=message):
        evaluation_features(split, BERT, **lengths)


def test_the_smallest_length_that_fits():
    context = "the old moon " * 9
    split = questions((context, "new star", "old", 4))
    features = evaluation_features(split, BERT, max_length=10, stride=5)
    assert decode(split, features, *oracle(features), unanswerable=False)[0].text == "old"
    assert features.offsets.max() == len(context.rstrip())


def test_no_questions():
    with pytest.raises(ValueError, match="no questions of here are left"):
        training_features(questions(), BERT, max_length=MAX_LENGTH, stride=STRIDE)
