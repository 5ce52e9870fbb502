"""Questions about passages for tests: tokenizers made on the spot, splits, and perfect logits."""

import numpy as np
import pytest
from hypothesis import strategies as st

from adalora_fast.experiments.data.squad import QuestionSplit, evaluation_features

MAX_LENGTH, STRIDE = 24, 5
WORDS = ("moon", "star", "comet", "old", "new", "the", "near")
PARTS = ("##s", "##ly", "##r", "##e", "##n", "x", "##x", "q", "##q", ".", ",", "!", "(", ")", "-", "1", "##1")


def make_tokenizer(kind="bert", *, add_prefix_space=False):
    """Word pieces as in BERT; bytes, with two separators between the texts, as in RoBERTa; pieces that
    include the space before them, as in DeBERTa-v3; or [CLS] and padding where XLNet has them.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    if kind == "roberta":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {
            token: i for i, token in enumerate([*names.values(), *alphabet, "mo", "on", "Ġmo", "Ġs"])
        }
        merges = [("m", "o"), ("o", "n"), ("Ġ", "mo"), ("Ġ", "s")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.RobertaProcessing(
            ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]), add_prefix_space=add_prefix_space
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if kind == "deberta":
        letters = sorted({letter for word in WORDS for letter in word} | set("xq.,!()-1"))
        pieces = [*names.values(), "▁", *letters, *(f"▁{word}" for word in WORDS)]
        scores = [-10.0 if len(piece) == 1 else -1.0 for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=pieces.index("[UNK]")))
        tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        pieces = [*names.values(), *WORDS, *PARTS]
        vocabulary = {token: i for i, token in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if kind == "last":  # the first token is not [CLS], and texts come in the other order
        sequence, pair = "$A [SEP] [CLS]:2", "$A [SEP] $B:1 [SEP]:1 [CLS]:2"
    elif kind == "bare":
        sequence, pair = "$A", "$A $B:1"
    else:
        sequence, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=sequence,
        pair=pair,
        special_tokens=[(name, pieces.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left" if kind == "last" else "right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


TOKENIZERS = {kind: make_tokenizer(kind) for kind in ("bert", "roberta", "deberta", "last")}
BERT = TOKENIZERS["bert"]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def questions(*rows, sample=False):
    """A split of (context, question, answer or None, its place)."""
    answers = [
        {"text": [], "answer_start": []} if text is None else {"text": [text], "answer_start": [start]}
        for _, _, text, start in rows
    ]
    return QuestionSplit(
        ids=[f"q{i}" for i in range(len(rows))],
        contexts=[row[0] for row in rows],
        questions=[row[1] for row in rows],
        answers=answers,
        source="here",
        sample=sample,
    )


def oracle(features):
    """Logits that are 1 at the labels and 0 elsewhere."""
    starts = np.zeros(features.offsets.shape[:2], dtype=np.float32)
    ends = np.zeros_like(starts)
    windows = np.arange(len(features))
    starts[windows, features.start_positions] = 1
    ends[windows, features.end_positions] = 1
    return starts, ends


def labelled(split, tokenizer, max_length=MAX_LENGTH, stride=STRIDE):
    """The text under the label of every window, None for [CLS]."""
    features = evaluation_features(split, tokenizer, max_length=max_length, stride=stride)
    texts = []
    for window, row in enumerate(features.example):
        start, end = features.start_positions[window], features.end_positions[window]
        begin, stop = features.offsets[window, start, 0], features.offsets[window, end, 1]
        if start == features.null[window]:
            assert end == start
            texts.append(None)
        else:
            texts.append(split.contexts[row][begin:stop])
    return texts


gaps = st.sampled_from([" ", "  ", "\n", " \t "])
words = st.sampled_from(
    [*WORDS, "stars", "newly", "xqx", "[CLS]", "[SEP]", ".", "(", "émoon", "日本", "🌙", "☃"]
)


@st.composite
def answerable(draw):
    """A context of pieces with white space between, a question, and an answer from piece to piece."""
    chosen = draw(st.lists(words, min_size=1, max_size=60))
    context, places = draw(st.sampled_from(["", " ", "\n "])), []
    for word in chosen:
        places.append((len(context), len(context) + len(word)))
        context += word + draw(gaps)
    first = draw(st.integers(0, len(chosen) - 1))
    last = draw(st.integers(first, min(first + 3, len(chosen) - 1)))
    begin, end = places[first][0], places[last][1]
    question = draw(st.sampled_from(["", "  "])) + " ".join(draw(st.lists(words, max_size=30)))
    return context, question, context[begin:end], begin
