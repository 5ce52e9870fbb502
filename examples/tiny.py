"""Models, a tokenizer and data that are made on the spot, so that every example runs without a network."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = 60
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def encoder() -> BertForSequenceClassification:
    """Instead of AutoModelForSequenceClassification.from_pretrained("...", num_labels=2)."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=32, pad_token_id=0, **SIZES)
    return BertForSequenceClassification(config)


def decoder() -> LlamaForCausalLM:
    """Instead of AutoModelForCausalLM.from_pretrained("...")."""
    torch.manual_seed(0)
    tokens = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **SIZES, **tokens))


def vision() -> ViTForImageClassification:
    """Instead of AutoModelForImageClassification.from_pretrained("...", num_labels=2)."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_channels=1, **SIZES))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w2, w3, ...; instead of AutoTokenizer.from_pretrained("...")."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def sentences(count: int = 256) -> list[dict]:
    """Rows of 12 tokens; the label says whether the first token is from the upper half of the words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, WORDS, (count, 12), generator=generator)
    return [{"input_ids": row.tolist(), "labels": int(row[0] >= WORDS // 2)} for row in ids]


def texts(count: int = 64) -> list[str]:
    """Texts in which every word decides the next one."""
    return [" ".join(f"w{2 + (5 * i + 7 * j) % (WORDS - 2)}" for j in range(12)) for i in range(count)]


def images(count: int = 256) -> list[dict]:
    """Noise with a bright left or right half."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        pixels = torch.randn(1, 16, 16, generator=generator)
        pixels[..., 8 * (i % 2) : 8 * (i % 2) + 8] += 1
        rows.append({"pixel_values": pixels, "labels": i % 2})
    return rows


def show(ranks: dict[str, int]) -> None:
    """Print the rank of every adapted matrix."""
    for name, rank in ranks.items():
        print(f"{rank:3d}  {name}")
    print(f"{sum(ranks.values()):3d}  triplets are kept")
