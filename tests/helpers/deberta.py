"""A tiny DeBERTa-v3 in the files of `microsoft/deberta-v3-base`: a SentencePiece model, float16 weights of a
pre-training in `pytorch_model.bin`, and a configuration in the hub's own spelling.

Reading it takes the path that the real one takes, with the conversion of its SentencePiece model to a fast
tokenizer; `sentencepiece` and `protobuf` must be installed.
"""

import builtins
import inspect
import io
import json
import string
from pathlib import Path

import pytest

from tests.helpers.tiny import words

PIECES, EMBEDDINGS, WIDTH, LAYERS = 400, 420, 32, 2  # the hub's has 128000 pieces and 128100 embeddings
CONFIGURATION = {
    "model_type": "deberta-v2",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 0,
    "vocab_size": EMBEDDINGS,
}
try:
    import google.protobuf  # noqa: F401
    import sentencepiece
except ImportError:
    sentencepiece = None
needs_sentencepiece = pytest.mark.skipif(
    sentencepiece is None, reason="sentencepiece and protobuf are not installed (the experiments extra)"
)


def save_deberta(folder: Path) -> Path:
    """Write the model into `folder`, the same one every time; about a third of a second."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGURATION, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text('{\n  "do_lower_case": false,\n  "vocab_type": "spm"\n}\n')
    (folder / "spm.model").write_bytes(sentencepiece_model())
    save_weights(folder)
    return folder


def sentencepiece_model() -> bytes:
    """A unigram model of English, with the special tokens in the places where the hub's model has them."""
    documents = [inspect.getdoc(value) or "" for _, value in sorted(vars(builtins).items())]
    lines = [line.strip() for text in documents for line in text.splitlines() if line.strip()]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *20 * [" ".join(words())]]),
        model_writer=written,
        model_type="unigram",
        vocab_size=PIECES,
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def save_weights(folder: Path) -> None:
    """Weights as after pre-training: the encoder under its prefix, two heads that no task uses, float16."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        weights = {f"deberta.{name}": value for name, value in encoder.state_dict().items()}
        for head in ("lm_predictions.lm_head", "mask_predictions"):
            weights[f"{head}.dense.weight"] = torch.randn(WIDTH, WIDTH)
    torch.save({name: value.half() for name, value in weights.items()}, folder / "pytorch_model.bin")
