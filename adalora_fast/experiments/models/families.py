"""How an encoder names its matrices and heads."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["classification", "regression", "question_answering", "translation"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of model names things, and what it is for.

    `matrices` maps the adapted matrices of a layer, in the order in which reports show them, to module-name
    suffixes: the same six as in AdaLoRA's own scripts, or what an architecture fuses them into; never the
    pooler. One suffix may be that of a matrix in encoder and decoder. `adapted` names those that are adapted
    where nothing else is asked for (None: all). `layers` is a pattern of the module lists that hold the
    layers. `head` (classification, regression) and `question_answering_head` are trained fully, because they
    start at random or were not trained for this (the pooler); a model for translation has none: its output
    layer is the embeddings. `dropout`, `classifier_dropout` and
    `question_answering_dropout` are names in the model's configuration: the model's own dropouts, and the
    dropout before either head (None: there is none).
    """

    matrices: dict[str, str]
    head: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("classification", "regression", "question_answering")
    adapted: tuple[str, ...] | None = None
    layers: str = "layers?"
    question_answering_head: tuple[str, ...] = ("qa_outputs",)
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    classifier_dropout: str | None = "classifier_dropout"
    question_answering_dropout: str | None = None

    def head_for(self, kind: Kind) -> list[str]:
        """Names for PEFT's `modules_to_save`: what is trained fully beside the adapters."""
        return list(self.question_answering_head if kind == "question_answering" else self.head)

    def pattern(self, matrices: Iterable[str]) -> str:
        """What the whole names of these matrices match in every layer, for PEFT's `target_modules`."""
        suffixes = "|".join(re.escape(self.matrices[name]) for name in matrices)
        return rf"(?:.*\.)?{self.layers}\.\d+\.(?:{suffixes})"


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

_GATED = {  # EuroBERT, NomicBERT, GTE
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "intermediate": "mlp.up_proj",
    "output": "mlp.down_proj",
}

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


_NAMINGS = (*(family.matrices for family in FAMILIES.values()), _GATED)
_CLASSIFIER_DROPOUTS = ("classifier_dropout", "classifier_dropout_prob")
_DROPOUT_OF_HEAD = re.compile("classif|cls|summary|qa_|pooler")
_PEFT_HEADS = {"classifier", "score", "qa_outputs"}  # which PEFT always saves beside an adapter


def family_of(model: nn.Module) -> Family:
    """How `model`, a transformers model with a head, names things: as `FAMILIES` says, and otherwise as can
    be seen in it.
    """
    return FAMILIES.get(model.config.model_type) or _as_built(model)


def check_model_type(name: str, config: Any, kind: Kind) -> None:
    """ValueError where the model `name` of this configuration is not for `kind`: no known family of it, and
    no encoder.
    """
    if config.model_type in FAMILIES:
        if kind in FAMILIES[config.model_type].kinds:
            return
    elif kind in Family.kinds and _is_text_encoder(config):
        return
    possible = [known for known, family in FAMILIES.items() if kind in family.kinds]
    others = ", or another text encoder that predicts masked words" if kind in Family.kinds else ""
    raise ValueError(
        f"model {name!r} of type {config.model_type!r} is not for {kind.replace('_', ' ')} here; choose one "
        f"of type {', '.join(possible)}{others}"
    )


def _is_text_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return config.model_type in masked and hasattr(config, "vocab_size") and not decodes


def _as_built(model: nn.Module) -> Family:
    """The family of an encoder that `FAMILIES` does not have.

    Its layers are the members of the longest module list with linear layers (of several as long, of all).
    Its matrices are those of a known naming if they are all there, otherwise all linear layers in the layers,
    by their own names where no naming has one. Its head is what has weights outside of the encoder, and the
    pooler.
    """
    encoder, config = model.base_model, model.config
    outside = {name: child for name, child in model.named_children() if child is not encoder}
    head = tuple(name for name, child in outside.items() if _has_weights(child))
    if not head or any(_PEFT_HEADS & set(dict(outside[name].named_children())) for name in head):
        known = ", ".join(name for name, family in FAMILIES.items() if family.head)
        raise ValueError(
            f"a model of type {config.model_type!r} does not keep encoder and head apart as PEFT needs it; "
            f"choose one of type {known}"
        )
    pooler = ("pooler",) if _has_weights(getattr(encoder, "pooler", None)) else ()
    lists, suffixes = _linear_layers(encoder)
    namings = (naming for naming in _NAMINGS if set(naming.values()) <= set(suffixes))
    own = {_matrix_of(suffix): suffix for suffix in suffixes}
    return Family(
        matrices=next(namings, own if len(own) == len(suffixes) else dict(zip(suffixes, suffixes))),
        layers=f"(?:{'|'.join(map(re.escape, lists))})",
        head=(*pooler, *head),
        question_answering_head=head,
        dropout=tuple(
            name
            for name, value in config.to_dict().items()
            if "dropout" in name and type(value) in (float, int) and not _DROPOUT_OF_HEAD.search(name)
        ),
        classifier_dropout=next((name for name in _CLASSIFIER_DROPOUTS if hasattr(config, name)), None),
    )


def _linear_layers(encoder: nn.Module) -> tuple[list[str], list[str]]:
    """Paths of the longest module lists, and the names that linear layers have in their members."""
    members: dict[str, set[str]] = {}
    inside: dict[str, list[str]] = {}
    for name, module in encoder.named_modules():
        place = re.fullmatch(r"(\D+)\.(\d+)\.(.+)", name)
        if place is not None and isinstance(module, nn.Linear):
            members.setdefault(place[1], set()).add(place[2])
            inside.setdefault(place[1], []).append(place[3])
    most = max(map(len, members.values()), default=0)
    lists = [path for path, its in members.items() if len(its) == most]
    return lists, list(dict.fromkeys(suffix for path in lists for suffix in inside[path]))


def _has_weights(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None


def position_limit(model: nn.Module) -> int | None:
    """How many tokens a model has positions for; None where positions are relative or rotary."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions")):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # counted from behind it
            return min(model.config.max_position_embeddings, module.num_embeddings - unused)
    return None


def is_of_head(name: str, head: Iterable[str]) -> bool:
    """Whether a parameter of this name lies in one of the `head` modules."""
    return not set(head).isdisjoint(name.split("."))


def locate_matrix(layer_name: str) -> tuple[int, str] | None:
    """(layer index, matrix name) of an adapted module, for instance (3, "query"), the name being the module's
    own within its layer where it is not known; None outside of layers. What the encoder has too is called
    "decoder query" in the decoder, and so on: places are distinct.
    """
    place = re.search(r"(decoder\.[^.]+)?\.(\d+)\.(.+)", layer_name)
    if place is None:
        return None
    matrix = _matrix_of(place[3])
    in_decoder = place[1] and not matrix.startswith("cross")
    return int(place[2]), f"decoder {matrix}" if in_decoder else matrix


def _matrix_of(suffix: str) -> str:
    """What a naming calls the matrix with this module name within its layer; the same name if none does."""
    return next(
        (matrix for naming in _NAMINGS for matrix, known in naming.items() if known == suffix), suffix
    )


def set_dropout(
    config: Any, family: Family, kind: Kind, classifier_dropout: float | None, dropout: float | None
) -> None:
    """Write both into `config`, each without a change of the other. ValueError where it cannot have one."""
    for option, value in (("classifier_dropout", classifier_dropout), ("dropout", dropout)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{option} is {value}; it must be between 0 and 1")
    before_head = (
        family.question_answering_dropout if kind == "question_answering" else family.classifier_dropout
    )
    if classifier_dropout is not None and before_head is None:
        raise ValueError(
            f"classifier_dropout is {classifier_dropout}, but a {config.model_type} model has no dropout of "
            f"its own before its {kind.replace('_', ' ')} head; leave it out"
        )
    if before_head is not None:
        if classifier_dropout is not None:
            setattr(config, before_head, classifier_dropout)
        elif getattr(config, before_head, None) is None and hasattr(config, "hidden_dropout_prob"):
            # which it would follow, changed or not
            setattr(config, before_head, config.hidden_dropout_prob)
    if dropout is not None:
        for field in family.dropout:
            setattr(config, field, dropout)


def adapted_modules(model: nn.Module, matrices: Sequence[str] | None) -> str:
    """PEFT's `target_modules`: a pattern of these matrices in every layer; of those that its family adapts if
    None.

    Raises:
        ValueError: the model has no such matrix, or none at all.
    """
    family, model_type = family_of(model), model.config.model_type
    if not family.matrices:
        raise ValueError(
            f"a {model_type} encoder has no linear matrices in its layers; use --method full, head or bitfit"
        )
    unknown = next((name for name in matrices or () if name not in family.matrices), None)
    if unknown is not None:
        raise ValueError(
            f"a {model_type} encoder has no matrix {unknown!r}; choose from {', '.join(family.matrices)}"
        )
    return family.pattern(matrices or family.adapted or family.matrices)
