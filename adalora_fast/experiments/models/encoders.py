"""Loading a model with the head of a task, and its tokenizer: by `transformers`, quietly, and checked."""

import copy
import importlib.util
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from adalora_fast.experiments.settings.quiet import without_model_bars

from .families import Kind, check_model_type, family_of, is_of_head, set_dropout
from .packages import model_type_of, resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = "nf4"
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


def load_model(
    name: str,
    *,
    kind: Kind,
    labels: tuple[str, ...] = (),
    classifier_dropout: float | None = None,
    dropout: float | None = None,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    attention: str | None = None,
) -> tuple[nn.Module, Any]:
    """The encoder `name` (`minilm`, a local folder, a name on the hub) with a head for `kind`, and its
    tokenizer.

    What the checkpoint has of the head is kept where its size fits; a head of another size starts at random,
    with a warning. Every tensor of the encoder must be in the checkpoint. A local folder is read without a
    network.

    `labels`: names of the classes in the order of their codes, for a classification. `classifier_dropout`
    is applied before the classifier, `dropout` to the encoder's hidden states and attention; None leaves the
    model's own. `dtype` is the encoder's, float32, bfloat16 or float16, whatever the checkpoint is stored in;
    the head is float32 in any case, and casts what the encoder gives it. With nf4 the encoder's linear layers
    hold NormalFloat numbers of 4 bits in blocks of 64, the scales of the blocks quantised in turn (QLoRA,
    Dettmers et al. 2023, section 3), and multiply in `compute_dtype`; all else is float32. `attention`:
    eager, sdpa or flash_attention_2; None is the model's default.

    Raises FileNotFoundError where a file or the hub is missing, and ValueError for a model without this kind
    of head, weights that are not those of the configuration, a tokenizer that does not fit, and options that
    the model does not have.
    """
    _check_options(kind, labels, dtype, compute_dtype, attention)
    with _quiet():
        path, config, outline = _outlined(name, kind, labels, classifier_dropout, dropout, attention)
        family = family_of(outline)
        head = family.head_for(kind)
        quantisation = _four_bits(head, DTYPES[compute_dtype]) if dtype == QUANTISED else None
        model, report = _load(name, path, config, kind, attention, quantisation)
        tokenizer = _load_tokenizer(name, path)
    _check_weights(name, head, report)
    _check_tokenizer(name, tokenizer, config.vocab_size, kind)
    if dtype == QUANTISED:
        _leave_as_quantised(model)
    elif dtype != "float32":
        cast_encoder(model, head, DTYPES[dtype])
    return model, tokenizer


def outline_model(
    name: str,
    *,
    kind: Kind,
    labels: tuple[str, ...] = (),
    classifier_dropout: float | None = None,
    dropout: float | None = None,
    attention: str | None = None,
) -> nn.Module:
    """The model that `load_model` gives, on the meta device: every module and name, but no numbers. Weights
    and tokenizer are not looked for; otherwise the same errors.
    """
    with _quiet():
        return _outlined(name, kind, labels, classifier_dropout, dropout, attention)[2]


def _outlined(
    name: str,
    kind: Kind,
    labels: tuple[str, ...],
    classifier_dropout: float | None,
    dropout: float | None,
    attention: str | None,
) -> tuple[str, Any, nn.Module]:
    """(what `from_pretrained` is given, the configuration with these dropouts, the model on meta)."""
    path = resolve_model(name)
    if Path(path).is_dir():
        model_type_of(path)  # says what is wrong with a config.json better than transformers does
    config = _configuration(name, path, kind, labels)
    check_model_type(name, config, kind)
    outline = _outline(name, config, kind, attention)
    set_dropout(config, family_of(outline), kind, classifier_dropout, dropout)
    return path, config, outline


def _four_bits(head: list[str], compute_dtype: torch.dtype) -> Any:
    """What tells transformers to hold all linear layers outside of the `head` modules in four bits (without
    one, all but the output layer).
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[rf"(?:.*\.)?{name}" for name in head] or None,  # of four bits too
    )


def _leave_as_quantised(model: nn.Module) -> None:
    """No other form of the weights in evaluation: on some CPUs bitsandbytes rounds the scales of the blocks
    in the first one, for good, and takes no matrices but those of certain sizes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantised(model: nn.Module) -> nn.Module:
    """`model` with plain linear layers of float32 that hold the numbers for which its quantised ones stand;
    the same model where none is quantised.
    """
    if getattr(model, "is_quantized", False):
        with _quiet():
            model = model.dequantize(dtype=torch.float32)
    return model


def cast_encoder(model: nn.Module, head: list[str], dtype: torch.dtype) -> None:
    """In place: every parameter outside of the `head` modules to `dtype`; the head stays as it is and takes
    what it is given as its own dtype.
    """
    for name, parameter in model.named_parameters():
        if not is_of_head(name, head):
            parameter.data = parameter.data.to(dtype)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in head:
            module.register_forward_pre_hook(_as_own_dtype, with_kwargs=True)


def _as_own_dtype(module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    # PEFT copies a module of modules_to_save together with this hook: the dtype is that of the copy.
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, inputs)), {key: cast(value) for key, value in keywords.items()}


def _check_options(
    kind: str, labels: tuple[str, ...], dtype: str, compute_dtype: str, attention: str | None
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(get_args(Kind))}")
    if kind == "classification" and len(labels) < 2:
        raise ValueError(f"a classification into {labels!r} needs at least two labels; name them")
    if kind != "classification" and labels:
        raise ValueError(f"{kind} has no classes, but labels are {labels!r}; leave them out")
    if dtype not in (*DTYPES, QUANTISED):
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join((*DTYPES, QUANTISED))}")
    if compute_dtype not in DTYPES:
        raise ValueError(f"unknown compute_dtype {compute_dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype == QUANTISED and not _is_installed("bitsandbytes"):
        raise ValueError(
            "dtype nf4 needs bitsandbytes; install it with: pip install 'adalora_fast[quantized]'"
        )
    if attention is not None and attention not in ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}; choose one of {', '.join(ATTENTIONS)}")


def _auto_class(kind: Kind) -> Any:
    import transformers

    return {
        "question_answering": transformers.AutoModelForQuestionAnswering,
        "translation": transformers.AutoModelForSeq2SeqLM,
    }.get(kind, transformers.AutoModelForSequenceClassification)


def _configuration(name: str, path: str, kind: Kind, labels: tuple[str, ...]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    head: dict[str, Any] = {"problem_type": None, "num_labels": 2}  # a start and an end
    if kind == "translation":
        head = {}
    if kind == "regression":
        head = {"problem_type": "regression", "num_labels": 1}
    if kind == "classification":
        head = {"problem_type": "single_label_classification", "num_labels": len(labels)}
        head["id2label"] = dict(enumerate(labels))
        head["label2id"] = {label: code for code, label in enumerate(labels)}
    try:
        return AutoConfig.from_pretrained(path, **_where(path), **head)
    except OSError as error:
        raise _unreachable(name) from error
    except (*_UNREADABLE, StrictDataclassError) as error:
        raise ValueError(
            f"the configuration of model {name!r} cannot be read ({_in_one_line(error)}); give another model"
        ) from error


def _where(path: str) -> dict[str, Any]:
    return {"local_files_only": Path(path).is_dir(), "trust_remote_code": False}


def _missing(name: str, path: str, remedy: str) -> FileNotFoundError:
    """What to say where a folder lacks something, or else the hub."""
    return FileNotFoundError(remedy) if Path(path).is_dir() else _unreachable(name)


def _unreachable(name: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"the model {name!r} is not reachable; give --model minilm or the path of a local folder"
    )


def _in_one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")


def _outline(name: str, config: Any, kind: Kind, attention: str | None) -> nn.Module:
    """The model without its numbers; ValueError where transformers has no such head for this type, or the
    model not this attention.
    """
    auto_class = _auto_class(kind)

    def build(attention: str | None) -> nn.Module:
        with torch.device("meta"):  # no memory and no initial values
            return auto_class.from_config(copy.deepcopy(config), attn_implementation=attention)

    try:
        outline = build(None)
    except _UNREADABLE as error:
        raise ValueError(
            f"model {name!r} of type {config.model_type!r} cannot have a head for {kind} "
            f"({_in_one_line(error)}); give another model"
        ) from error
    if attention is None:
        return outline
    try:
        return build(attention)
    except _UNREADABLE as error:
        possible = []
        for other in ATTENTIONS:
            try:
                build(other)
                possible.append(other)
            except _UNREADABLE:
                pass
        raise ValueError(
            f"model {name!r} of type {config.model_type!r} cannot use attention {attention!r} here; "
            f"choose {' or '.join(possible)}"
        ) from error


def _load(
    name: str, path: str, config: Any, kind: Kind, attention: str | None, quantisation: Any
) -> tuple[nn.Module, Any]:
    """The model in float32, quantised or not, and what `from_pretrained` reports of its tensors."""
    from safetensors import SafetensorError

    options = {"config": config, "dtype": torch.float32, "attn_implementation": attention}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # judged in _check_weights
    if quantisation is not None:
        options["quantization_config"] = quantisation
    try:
        return _auto_class(kind).from_pretrained(path, **options, **_where(path))
    except OSError as error:
        remedy = f"no readable weights in {path}; give a folder with a model.safetensors"
        raise _missing(name, path, remedy) from error
    except (*_UNREADABLE, EOFError, SafetensorError) as error:
        raise ValueError(
            f"the weights of model {name!r} cannot be read ({_in_one_line(error)}); copy them again"
        ) from error


def _check_weights(name: str, head: list[str], report: dict[str, Any]) -> None:
    """ValueError where the encoder would not be the checkpoint's; a warning where a head is not used."""
    missing = sorted(key for key in report["missing_keys"] if not is_of_head(key, head))
    if missing:
        raise ValueError(
            f"the checkpoint of model {name!r} lacks {len(missing)} tensors of the encoder, one of them "
            f"{missing[0]}; give a checkpoint of its config.json"
        )
    other_size = sorted(report["mismatched_keys"])
    for key, stored, built in other_size:
        if not is_of_head(key, head):
            raise ValueError(
                f"{key} of model {name!r} is {list(stored)} in the checkpoint and {list(built)} by its "
                "config.json; give a checkpoint of that configuration"
            )
    if other_size:
        modules = sorted({key.rpartition(".")[0] for key, *_ in other_size})
        warnings.warn(
            f"the checkpoint of model {name!r} has a head of another size; at random starts: "
            f"{', '.join(modules)}",
            UserWarning,
            stacklevel=3,
        )


def _load_tokenizer(name: str, path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **_where(path))
    except OSError as error:
        remedy = f"no readable tokenizer in {path}; save the model's tokenizer there too"
        raise _missing(name, path, remedy) from error
    except Exception as error:  # `tokenizers` raises nothing more special
        folder = Path(path)
        needed = any(folder.glob("*.model")) if folder.is_dir() else "sentencepiece" in str(error).lower()
        if needed and not all(map(_is_installed, ("sentencepiece", "google.protobuf"))):
            # transformers asks for tiktoken, which does not help
            raise ValueError(
                f"the tokenizer of model {name!r} cannot be read without sentencepiece and protobuf; install "
                "them with: pip install 'adalora_fast[experiments]'"
            ) from error
        raise ValueError(
            f"the tokenizer of model {name!r} cannot be read ({_in_one_line(error)}); copy its files again"
        ) from error


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _check_tokenizer(name: str, tokenizer: Any, vocab_size: int, kind: Kind) -> None:
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() <= {"▁", *tokenizer.all_special_tokens}:  # made up where there is no vocabulary file
        raise ValueError(f"model {name!r} comes without a vocabulary; save its tokenizer beside it")
    highest = max(vocabulary.values())
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer of model {name!r} has the token id {highest}, the model only {vocab_size} "
            "embeddings; give a model with its own tokenizer"
        )
    if kind == "question_answering" and not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of model {name!r} does not say where in the text a token is, as question "
            "answering needs it; save a fast tokenizer beside it"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, reports and advice from libraries, and no conversion of a checkpoint on the hub."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    conversion = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    logging.set_verbosity_error()
    try:
        with without_model_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if conversion is None:
            del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        else:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = conversion
