"""A tiny mBART in the files of `facebook/mbart-large-cc25`: a SentencePiece model, a configuration in the
hub's own spelling, weights with tied embeddings; and pairs of sentences to translate.

Reading it takes the path that the real one takes; `sentencepiece` and `protobuf` must be installed.
"""

import io
import json
import os
import random
import string
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers.tiny import write_parquet

try:
    import google.protobuf  # noqa: F401
    import sentencepiece
except ImportError:
    sentencepiece = None
needs_sentencepiece = pytest.mark.skipif(
    sentencepiece is None, reason="sentencepiece and protobuf are not installed (the experiments extra)"
)
DATA = Path(os.environ.get("ADALORA_FAST_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = DATA / "wmt16_ro_en" / "validation.parquet"
needs_pairs = pytest.mark.skipif(
    not REAL.is_file(), reason="no newsdev2016; set ADALORA_FAST_DATA to a folder with wmt16_ro_en"
)

PIECES, WIDTH, LAYERS = 120, 16, 2  # the hub's has 250000 pieces
EMBEDDINGS = PIECES + 27  # <pad>, 25 languages, <mask>
ENGLISH, ROMANIAN = PIECES + 4, PIECES + 20  # en_XX and ro_RO
CONFIGURATION = {
    "model_type": "mbart",
    "architectures": ["MBartForConditionalGeneration"],
    "activation_function": "gelu",
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "dropout": 0.1,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_hidden_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "init_std": 0.1,
    "is_encoder_decoder": True,
    "max_length": 1024,
    "num_beams": 5,
    "max_position_embeddings": 64,
    "normalize_before": True,
    "normalize_embedding": True,
    "scale_embedding": True,
    "static_position_embeddings": False,
    "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": ROMANIAN}},
    "vocab_size": EMBEDDINGS,
}
WORDS = {
    "the moon": "luna", "the bread": "pâinea", "the soup": "supa", "the star": "steaua", "is": "este",
    "was": "a fost", "old": "veche", "warm": "caldă", "new": "nouă", "small": "mică", "and": "și",
}  # fmt: skip


def pairs(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """English sentences of a few words, no two alike, and what they are in Romanian."""
    nouns = ["the moon", "the bread", "the soup", "the star"]
    verbs, adjectives = ["is", "was"], ["old", "warm", "new", "small"]
    every = [
        (noun, verb, one, "and", two)
        for noun in nouns
        for verb in verbs
        for one in adjectives
        for two in adjectives
        if one != two
    ]
    chosen = random.Random(seed).sample(every, count)
    english = [" ".join(words).capitalize() + "." for words in chosen]
    romanian = [" ".join(WORDS[word] for word in words).capitalize() + "." for words in chosen]
    return english, romanian


def real_pairs(start: int, stop: int) -> tuple[list[str], list[str]]:
    """These rows of newsdev2016."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(REAL).column("translation").to_pylist()[start:stop]
    return [row["en"] for row in rows], [row["ro"] for row in rows]


def write_pairs(data_dir: Path, **splits: tuple[Iterable, Iterable]) -> Path:
    """wmt16_ro_en/<split>.parquet in the hub's form, from (English, Romanian) by split."""
    for split, (english, romanian) in splits.items():
        rows = [{"en": en, "ro": ro} for en, ro in zip(english, romanian, strict=True)]
        write_parquet(data_dir / "wmt16_ro_en" / f"{split}.parquet", translation=rows)
    return data_dir


def save_mbart(folder: Path, *, seed: int = 0) -> Path:
    """Write the model into `folder`, the same one every time."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGURATION, indent=2) + "\n")
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model())
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGURATION, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def sentencepiece_model() -> bytes:
    """A unigram model of both languages, its special tokens where the hub's model has them."""
    english, romanian = pairs(96)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*english, *romanian]),
        model_writer=written,
        model_type="unigram",
        vocab_size=PIECES,
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace))) + "ăâîșțĂÂÎȘȚ",
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()
