"""A tiny encoder and a tiny task, made on the spot; some words decide the label."""

import io
import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from adalora_fast.experiments.settings.recipes import Recipe

TOPICS = (("moon", "star", "comet", "orbit"), ("bread", "soup", "apple", "onion"))
FILLERS = ("the", "a", "old", "new", "big", "small", "near", "far", "warm", "cold")
WIDTH, LAYERS = 32, 2
RECIPE = Recipe(
    epochs=2,
    learning_rate=5e-3,
    batch_size=8,
    max_length=16,
    init_r=4,
    target_r=2,
    deltaT=2,
    tinit=2,
    tfinal=4,
)


def words() -> list[str]:
    return [*FILLERS, *(word for topic in TOPICS for word in topic)]


def save_encoder(folder: Path, *, model_type: str = "bert") -> Path:
    """A two-layer encoder with random weights and a word-level tokenizer, saved as `save_pretrained` does."""
    import torch
    from transformers import AutoModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words()]) + "\n")
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModel.from_config(encoder_config(model_type)).save_pretrained(folder)
    return folder


def encoder_config(model_type: str) -> Any:
    """A two-layer configuration of any of the families."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 5 + len(words()),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    if model_type == "distilbert":
        sizes = {"vocab_size": sizes["vocab_size"], "dim": WIDTH, "n_layers": LAYERS, "n_heads": 2}
        sizes |= {"hidden_dim": 2 * WIDTH, "max_position_embeddings": 40}
    if model_type in ("albert", "squeezebert"):
        sizes |= {"embedding_size": WIDTH}
    if model_type == "eurobert":
        sizes |= {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    if model_type == "xlm":
        sizes = {"vocab_size": sizes["vocab_size"], "emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": 2}
        sizes |= {"max_position_embeddings": 40, "pad_index": 0}
    if model_type == "deberta-v2":
        sizes |= {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        sizes |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        sizes |= {"type_vocab_size": 0}
    if model_type == "modernbert":  # its own places of special tokens are beyond this vocabulary
        sizes |= {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
        sizes |= {"local_attention": 8, "global_attn_every_n_layers": 2}
    return AutoConfig.for_model(model_type, **sizes)


def changed_encoder(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of `folder` whose config.json has other values; None removes one."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def sentences(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Sentences about one of two topics, and which one it is."""
    generator = random.Random(seed)
    labels = [generator.randrange(2) for _ in range(count)]
    texts = []
    for label in labels:
        chosen = generator.choices(FILLERS, k=generator.randint(2, 8)) + generator.choices(TOPICS[label], k=2)
        generator.shuffle(chosen)
        texts.append(" ".join(chosen))
    return texts, labels


def write_parquet(path: Path, **columns: list) -> Path:
    """A parquet file with these columns."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_sst2(data_dir: Path, *, train: int = 40, validation: int = 24, suffix: str = "") -> Path:
    """A task in the form of SST-2 (one sentence, two classes); `suffix="_sample"` marks the training rows."""
    for split, count, end in (("train", train, suffix), ("validation", validation, "")):
        texts, labels = sentences(count, seed=len(split))
        write_parquet(data_dir / "sst2" / f"{split}{end}.parquet", sentence=texts, label=labels)
    return data_dir


def quiet_console(width: int = 200) -> Console:
    """A console without a terminal that keeps what is printed."""
    return Console(file=io.StringIO(), width=width)


def printed(console: Console) -> str:
    return console.file.getvalue()
