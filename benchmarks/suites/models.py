"""Whole models with random weights, and everyone's way to train one: what the suites of whole models share.

No file is read and none downloaded; the time of a step does not depend on the weights. Adapters are drawn as
they are in the middle of a run, with factors close to orthogonal and λ that are not zero, and steps are
counted from the middle of the schedule, so that every step prunes.
"""

import contextlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from adalora_fast import fuse
from adalora_fast.ops.dispatch import backend
from benchmarks.roofline import name_of
from benchmarks.suites import SCALES

RANK, TARGET_RANK, ALPHA = 16, 8, 32
TOTAL_STEP, FIRST_STEP = 100_000, 25_000  # at a quarter of the steps 0.42 of what goes is still there
TOLERANCE = 1e-4  # relative, of float32
TARGETS = {
    "deberta": ["query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """An encoder's sizes; ``buckets`` are those of DeBERTa's relative positions."""

    family: str
    layers: int
    width: int
    heads: int
    intermediate: int
    vocabulary: int
    buckets: int = 256


SIZES = {
    "deberta-v3-base": Size(
        family="deberta", layers=12, width=768, heads=12, intermediate=3072, vocabulary=128100
    ),
    "deberta-v3-large": Size(
        family="deberta", layers=24, width=1024, heads=16, intermediate=4096, vocabulary=128100
    ),
    # The table of frozen embeddings takes no time but much memory.
    "deberta-v3-base 2 layers": Size(
        family="deberta", layers=2, width=768, heads=12, intermediate=3072, vocabulary=8192
    ),
    "minilm-l6": Size(family="bert", layers=6, width=384, heads=12, intermediate=1536, vocabulary=30522),
    "tiny deberta": Size(
        family="deberta", layers=2, width=32, heads=2, intermediate=64, vocabulary=61, buckets=8
    ),
    "tiny bert": Size(family="bert", layers=2, width=32, heads=2, intermediate=64, vocabulary=61),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, the batch that goes through it, and where in its schedule an adapter is."""

    model: str
    batch: int
    length: int
    dtype: torch.dtype
    device: torch.device
    rank: int = RANK
    target_rank: int = TARGET_RANK
    first_step: int = FIRST_STEP
    total_step: int = TOTAL_STEP

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    @property
    def name(self) -> str:
        return f"{self.model} {name_of(self.dtype)} {self.batch}x{self.length}"

    def what(self) -> dict[str, str | int | float | bool]:
        """The setting as names and values."""
        return {
            "model": self.model, "layers": self.size.layers, "width": self.size.width,
            "adapted": 6 * self.size.layers, "rank": self.rank, "dtype": name_of(self.dtype),
            "batch": self.batch, "length": self.length, "tokens": self.batch * self.length,
        }  # fmt: skip

    def tiny(self) -> "Setting":
        """The same family, so small that a gate costs nothing, in float32, with much to prune at each
        step.
        """
        return replace(
            self, model=f"tiny {self.size.family}", batch=2, length=8, dtype=torch.float32, rank=4,
            target_rank=2, first_step=5, total_step=20,
        )  # fmt: skip


def settings(scale: str, device: torch.device) -> list[Setting]:
    """The models and batches of a scale.

    Raises:
        ValueError: there is no such scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is none of {', '.join(SCALES)}")
    cuda = device.type == "cuda"
    if scale == "tiny":
        chosen = [("tiny deberta", 2, 8), ("tiny bert", 2, 8)]
    elif cuda:
        chosen = [
            ("deberta-v3-base", 32, 128),
            ("deberta-v3-base", 8, 384),
            ("deberta-v3-large", 16, 128),
            ("minilm-l6", 64, 128),
        ]
    else:
        chosen = [("minilm-l6", 16, 64), ("deberta-v3-base 2 layers", 8, 128)]
    if scale == "quick":
        chosen = chosen[:1]
    dtype = torch.bfloat16 if cuda else torch.float32
    return [Setting(model=m, batch=b, length=n, dtype=dtype, device=device) for m, b, n in chosen]


def base_model(setting: Setting) -> nn.Module:
    """The base with random weights, frozen but for its head, in training mode without dropout."""
    torch.manual_seed(0)
    size = setting.size
    same = {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "intermediate_size": size.intermediate,
        "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    with setting.device:  # where the numbers are drawn: a CPU takes long for a large model
        if size.family == "bert":
            model = BertForSequenceClassification(BertConfig(**same))
        else:
            config = DebertaV2Config(
                **same, relative_attention=True, position_buckets=size.buckets, norm_rel_ebd="layer_norm",
                share_att_key=True, pos_att_type=["p2c", "c2p"], max_relative_positions=-1,
                position_biased_input=False, type_vocab_size=0, layer_norm_eps=1e-7, pooler_dropout=0.0,
            )  # fmt: skip
            model = DebertaV2ForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model.to(setting.dtype).train()


def make_batch(setting: Setting) -> dict[str, Tensor]:
    """Random tokens and labels; there is no padding, so no mask either."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, setting.size.vocabulary, (setting.batch, setting.length), generator=generator)
    labels = torch.randint(2, (setting.batch,), generator=generator)
    return {"input_ids": tokens.to(setting.device), "labels": labels.to(setting.device)}


def adapted(setting: Setting, prepare: Callable[[nn.Module], nn.Module] = lambda base: base) -> PeftModel:
    """PEFT's AdaLoRA on what ``prepare`` makes of the base model, as in the middle of a run."""
    config = AdaLoraConfig(
        task_type="SEQ_CLS", init_r=setting.rank, target_r=setting.target_rank, lora_alpha=ALPHA,
        tinit=1, tfinal=1, deltaT=1, total_step=setting.total_step,
        target_modules=TARGETS[setting.size.family],
    )  # fmt: skip
    model = get_peft_model(prepare(base_model(setting)), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * _spread(name, parameter))
    return model


def _spread(name: str, factor: Tensor) -> float:
    """The deviation that makes the rows of A and the columns of B about orthonormal; λ is about 1."""
    if ".lora_A." in name:
        return factor.shape[1] ** -0.5
    return factor.shape[0] ** -0.5 if ".lora_B." in name else 1.0


@contextlib.contextmanager
def reference_backend() -> Iterator[None]:
    """Within the context every op runs in plain PyTorch."""
    before = os.environ.get(backend.VARIABLE)
    _choose("reference")
    try:
        yield
    finally:
        _choose(before)


def _choose(name: str | None) -> None:
    if name is None:
        del os.environ[backend.VARIABLE]
    else:
        os.environ[backend.VARIABLE] = name
    backend.choose.cache_clear()
    backend.kernel.cache_clear()


class Training:
    """A model in training; a call is one whole step and returns its loss, without waiting for the device.

    Args:
        model: what is trained; its optimizer is made here.
        loss: the forward.
        allocate: called with the step's number after the optimizer; None where there is no allocator.
        context: what a step runs in.
    """

    def __init__(
        self,
        setting: Setting,
        model: nn.Module,
        loss: Callable[[], Tensor],
        allocate: Callable[[int], None] | None = None,
        context: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.model, self.loss, self.allocate, self.context = model, loss, allocate, context
        self.numbers = itertools.count(setting.first_step)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = True if setting.device.type == "cuda" else None  # None: PyTorch's choice
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=fused)

    def __call__(self, mark: Callable[[str], None] = lambda part: None) -> Tensor:
        """``mark`` is called with the name of each part when the host has done it."""
        with self.context():
            loss = self.loss()
            mark("forward")
            loss.backward()
            mark("backward")
            self.update()
            mark("clipping and optimizer")
            if self.allocate is not None:
                self.allocate(next(self.numbers))
            mark("allocator")
            self.optimizer.zero_grad()
            mark("zero_grad")
        return loss.detach()

    def update(self) -> None:
        """Clipping and the optimizer's step."""
        nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        self.optimizer.step()


def _adalora(setting: Setting, model: PeftModel, forward: nn.Module | None = None, **options) -> Training:
    """A step with the model's own allocator; ``forward`` is what is called in the model's place."""
    batch, call = make_batch(setting), model if forward is None else forward
    return Training(
        setting, model, lambda: call(**batch).loss, model.base_model.update_and_allocate, **options
    )


def train_frozen(setting: Setting) -> Training:
    """The head alone, with a backward down to the embeddings' output, as any adapter needs it."""
    model, batch = base_model(setting), make_batch(setting)
    embed = model.get_input_embeddings()

    def loss() -> Tensor:
        inputs = embed(batch["input_ids"]).detach().requires_grad_()
        return model(inputs_embeds=inputs, labels=batch["labels"]).loss

    return Training(setting, model, loss)


def train_lora(setting: Setting) -> Training:
    """PEFT's LoRA at the rank that AdaLoRA ends with."""
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=setting.target_rank,
        lora_alpha=ALPHA,
        target_modules=TARGETS[setting.size.family],
    )
    model, batch = get_peft_model(base_model(setting), config), make_batch(setting)
    return Training(setting, model, lambda: model(**batch).loss)


def train_peft(setting: Setting) -> Training:
    return _adalora(setting, adapted(setting))


def train_peft_compiled(setting: Setting) -> Training:
    if setting.device.type != "cuda":
        raise RuntimeError(
            "compiling a whole model for a CPU takes minutes and a C++ compiler; measured on CUDA only"
        )
    torch.compiler.reset()  # else the models before this one count as its variants, of which few are allowed
    model = adapted(setting)
    return _adalora(setting, model, torch.compile(model, dynamic=False))


def train_peft_liger(setting: Setting) -> Training:
    return _adalora(setting, adapted(setting, with_liger_norms))


def train_fused(setting: Setting) -> Training:
    return _adalora(setting, fuse(adapted(setting)))


def train_fused_reference(setting: Setting) -> Training:
    return _adalora(setting, fuse(adapted(setting)), context=reference_backend)


def with_liger_norms(model: nn.Module) -> nn.Module:
    """Swap every LayerNorm for Liger's, in place, with the same weight and bias."""
    from liger_kernel.transformers import LigerLayerNorm

    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.LayerNorm):
                swapped = LigerLayerNorm(norm.normalized_shape[0], eps=norm.eps)
                swapped.weight, swapped.bias = norm.weight, norm.bias
                setattr(parent, name, swapped)
    return model


TRAINERS: dict[str, Callable[[Setting], Training]] = {
    "frozen": train_frozen,
    "peft lora": train_lora,
    "peft": train_peft,
    "peft compiled": train_peft_compiled,
    "adalora_fast": train_fused,
    "adalora_fast reference": train_fused_reference,
    "peft + liger norms": train_peft_liger,
}
# Their losses are PEFT's. (So are the compiled model's, but a small one would have to be compiled as well.)
SAME_LOSSES = ("adalora_fast", "adalora_fast reference", "peft + liger norms")


def training_names() -> tuple[str, ...]:
    """Who takes part; Liger where it is installed."""
    liger = importlib.util.find_spec("liger_kernel") is not None
    return tuple(name for name in TRAINERS if liger or "liger" not in name)


def losses(name: str, setting: Setting, steps: int = 3) -> list[float]:
    """The losses of the first steps."""
    training = TRAINERS[name](setting)
    return [float(training()) for _ in range(steps)]


def check_losses(name: str, setting: Setting) -> None:
    """Fail unless three steps on a tiny model have PEFT's losses, for those who compute the same.

    Raises:
        AssertionError: a loss is another one.
    """
    if name not in SAME_LOSSES:
        return
    tiny = setting.tiny()
    found, expected = losses(name, tiny), losses("peft", tiny)
    for step, (own, truth) in enumerate(zip(found, expected, strict=True)):
        assert math.isclose(own, truth, rel_tol=TOLERANCE), (
            f"{name}: the loss of step {step} is {own:.6g}, PEFT's is {truth:.6g}"
        )


def check_finite(name: str, loss: Tensor) -> None:
    """Fail unless the loss is a number; waits for the device."""
    value = float(loss.detach())
    assert math.isfinite(value), f"{name}: the loss is {value}"
