"""A tiny mBART of real sentences, for runs of translation on a processor, and the pairs to train it on.

    python experiments/tiny_mbart.py PAIRS.parquet OUT [--evaluation 500] [--pieces 2000] [--width 64]

writes OUT/model (random weights, a SentencePiece model of the training pairs, files as those of
facebook/mbart-large-cc25) and OUT/data/wmt16_ro_en/{train,validation}_sample.parquet, so named that every
result says that it is of a sample. The last `--evaluation` pairs of the file are for evaluation. What such a
model translates means nothing; runs on it can be compared.
"""

import argparse
import io
import json
import string
from pathlib import Path

import pyarrow.parquet
import sentencepiece
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

LANGUAGES = 25  # of mBART-CC25, whose codes come after the pieces; then <mask>
ROMANIAN = 20  # place of ro_RO behind the pieces
LETTERS = "".join(sorted(set(string.printable) - set(string.whitespace))) + "ăâîșțĂÂÎȘȚ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    for name, value in (("evaluation", 500), ("pieces", 2000), ("width", 64), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    table = pyarrow.parquet.read_table(given.pairs, columns=["translation"])
    count = table.num_rows - given.evaluation
    if given.evaluation < 1 or count < 1:
        parser.error(f"{given.pairs} has {table.num_rows} pairs; take fewer than that for evaluation")
    data = given.output / "data" / "wmt16_ro_en"
    data.mkdir(parents=True, exist_ok=True)
    parts = {"train": table.slice(0, count), "validation": table.slice(count)}
    for split, rows in parts.items():
        pyarrow.parquet.write_table(rows, data / f"{split}_sample.parquet")
    pairs = parts["train"].column("translation").to_pylist()
    texts = [text for pair in pairs for text in (pair["en"], pair["ro"])]
    save_model(given.output / "model", texts, given.pieces, given.width, given.layers)


def save_model(folder: Path, texts: list[str], pieces: int, width: int, layers: int) -> None:
    """Write the model, the same one for the same texts."""
    folder.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, model_type="unigram", vocab_size=pieces,
        required_chars=LETTERS, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "sentencepiece.bpe.model").write_bytes(written.getvalue())
    config = {
        "model_type": "mbart", "architectures": ["MBartForConditionalGeneration"],
        "activation_function": "gelu", "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.1,
        "d_model": width, "encoder_layers": layers, "decoder_layers": layers, "num_hidden_layers": layers,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width,
        "init_std": 0.02, "is_encoder_decoder": True, "max_position_embeddings": 256,
        "normalize_before": True, "normalize_embedding": True, "scale_embedding": True,
        "static_position_embeddings": False, "vocab_size": pieces + LANGUAGES + 2,
        "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": pieces + ROMANIAN}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.manual_seed(0)
    loaded = AutoConfig.from_pretrained(folder, local_files_only=True)
    AutoModelForSeq2SeqLM.from_config(loaded).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
