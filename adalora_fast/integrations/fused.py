"""A PEFT AdaLoRA model made fast in place: its tuner and its model change their class, see ``fuse``."""

import warnings
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from peft import AdaLoraConfig, PeftMixedModel, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

from adalora_fast.allocator.allocator import SCORE_GRADIENTS, RankAllocator, check_weights
from adalora_fast.allocator.regulariser import Regulariser
from adalora_fast.allocator.scores import Score, get_score, resolve_smoothing
from adalora_fast.allocator.stability import check_stability
from adalora_fast.allocator.state import is_sharded
from adalora_fast.allocator.statistics import check_triplet
from adalora_fast.distributed.processes import all_finite, refuse_emptied, whole
from adalora_fast.distributed.shards import shards_of
from adalora_fast.nn.calls import call_every_layer
from adalora_fast.ops.adapter import PRECISIONS
from adalora_fast.ops.orthogonality import PENALTIES

from .adapters import WithAdapters, check_names
from .checkpoints import WithAllocator
from .heads import warn_of_untrained_heads
from .layers import adapter_layers, factor_finders, fuse_layer, merge_refusal
from .scales import check_scales, set_scales, take_over
from .weights import keep_pruned, warn_of_trained

PICKLED_AS = "adalora_fast.integrations.peft"  # the module that finds the classes made here by name
FORGOTTEN_AFTER = 100  # optimizer steps without one allocator step


@dataclass(frozen=True, kw_only=True)
class FuseSettings:
    """What ``fuse`` is asked for; see there.

    Raises:
        ValueError: one of them is unknown or out of range.
    """

    score: str | Score = "sensitivity"
    smoothing: str | None = None
    score_gradient: str = "total"
    weights: str = "after"
    triplet: str = "full"
    hysteresis: float = 0.0
    remember: bool = False
    orth_penalty: str = "fro"
    precision: str = "default"

    def __post_init__(self) -> None:
        resolve_smoothing(get_score(self.score), self.smoothing)
        if self.score_gradient not in SCORE_GRADIENTS:
            raise ValueError(f"score_gradient {self.score_gradient!r} is not one of {SCORE_GRADIENTS}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {PRECISIONS}")
        check_weights(self.weights)
        check_triplet(self.triplet)
        check_stability(self.hysteresis, self.remember)
        if self.orth_penalty not in PENALTIES:
            raise ValueError(f"orth_penalty {self.orth_penalty!r} is not one of {PENALTIES}")

    @property
    def of_allocator(self) -> dict[str, Any]:
        """What every allocator of the model is made with."""
        return {
            name: value for name, value in vars(self).items() if name not in ("orth_penalty", "precision")
        }


class FusedAdaLoraModel(WithAdapters):
    """PEFT's AdaLoRA tuner with the fused layers, the closed-form regulariser and :class:`RankAllocator`."""

    def forward(self, *args, **kwargs):
        """The base model's forward; in training γ · R is added to ``outputs.loss`` (never in evaluation)."""
        return self.regularise(self.model.forward(*args, **kwargs))

    def regularise(self, outputs):
        """``outputs`` of the base model; in training, and if they have a loss, with γ · R in it."""
        if not (self.training and torch.is_grad_enabled()) or self.rankallocator is None:
            return outputs
        self._watch_for_forgotten_allocator()
        regulariser = self.regulariser
        if not torch.compiler.is_compiling():
            regulariser.begin_forward()
        has_loss = isinstance(getattr(outputs, "loss", None), torch.Tensor)
        if self.orth_reg_weight() == 0 or not (has_loss or regulariser.needs_everybody()):
            return outputs
        term = regulariser.term()
        if has_loss:
            outputs.loss = outputs.loss + term.to(outputs.loss.device)
        return outputs

    def orth_reg_weight(self) -> float:
        """γ of the adapter under training."""
        return self.peft_config[self.trainable_adapter_name].orth_reg_weight

    def orthogonality_loss(self) -> torch.Tensor:
        """R of the adapter under training (see :func:`adalora_fast.orthogonality_loss`)."""
        return self.regulariser.noted(self.regulariser.loss())

    @property
    def regulariser(self) -> Regulariser:
        """The allocator's; an allocator that was made by hand gets its own here."""
        allocator = self.rankallocator
        if allocator.regulariser is None:
            self._regularise(allocator)
        return allocator.regulariser

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's entry: one allocator step, after ``optimizer.step()`` and before ``zero_grad()``.

        Args:
            global_step: the step's index, counted from 0.

        Raises:
            ValueError: no adapter is being trained, or no gradient is there.
        """
        allocator = self.require_allocator()
        if (
            not self._warned_order
            and self._optimizer_version() == self._seen_version
            and not is_sharded(allocator)  # fused optimizers leave no trace on sharded parameters
            and self._finite_gradients()
        ):
            self._warned_order = True
            warnings.warn(
                "update_and_allocate() was called before optimizer.step(), or twice; call it once, between "
                "optimizer.step() and zero_grad(), or pruned triplets come back",
                UserWarning,
                stacklevel=2,
            )
        allocator.step(global_step)
        self._seen_version = self._optimizer_version()

    def _optimizer_version(self) -> int:
        """Changes with every optimizer step that writes in place (bitsandbytes' kernels do not show)."""
        return sum(parameter._version for parameter in self.rankallocator.lambdas())

    def remember_versions(self) -> None:
        """From here on, a change of the weights means that an optimizer stepped."""
        self._first_version = self._seen_version = self._watched_version = self._optimizer_version()

    def was_trained(self) -> bool:
        """Whether the weights changed since they were made or loaded."""
        return self._optimizer_version() != self._first_version

    def _finite_gradients(self) -> bool:
        """Whether an optimizer step was due (a ``GradScaler`` skips it for infinite gradients, and adapters
        that did not run have none).
        """
        allocator = self.rankallocator
        if all(values.grad is None for values in allocator.lambdas()):  # the term alone moves no λ
            return False
        return all_finite([p.grad for p in allocator.parameters() if p.grad is not None])

    def train(self, mode: bool = True) -> "FusedAdaLoraModel":
        """PEFT's; what is evaluated has no pruned triplets, as what is saved."""
        if not mode:
            keep_pruned(self)
        return super().train(mode)

    def require_allocator(self) -> RankAllocator:
        """The allocator of the adapter under training.

        Raises:
            ValueError: every adapter is loaded for inference.
        """
        if self.rankallocator is None:
            raise ValueError(
                "no adapter of this model is trainable; load one with is_trainable=True, then fuse"
            )
        return self.rankallocator

    def _watch_for_forgotten_allocator(self) -> None:
        if torch.compiler.is_compiling() or self.rankallocator.t > 0 or self.rankallocator.is_over:
            return
        version = self._optimizer_version()
        self._forgotten += version != self._watched_version
        self._watched_version = version
        if self._forgotten == FORGOTTEN_AFTER:
            self._forgotten += 1
            warnings.warn(
                f"{FORGOTTEN_AFTER} optimizer steps and no allocator step: the budget never moves. Use "
                "AdaLoraCallback, rankallocator.attach(optimizer), or update_and_allocate(step)",
                UserWarning,
                stacklevel=2,
            )

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key):
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key)
        layer = getattr(parent, target_name)
        if isinstance(layer, AdaLoraLayer):
            fuse_layer(layer, self.fused_with.precision, getattr(self, "trainable_adapter_name", None))
            set_scales({current_key: layer}, lora_config, adapter_name)

    def _check_new_adapter_config(self, config: AdaLoraConfig) -> None:
        """PEFT's, and what fused layers cannot honour."""
        super()._check_new_adapter_config(config)
        check_scales(config)

    def _check_merge_allowed(self) -> None:
        """PEFT's, and every layer's base before the first of them is changed."""
        super()._check_merge_allowed()
        for name, layer in adapter_layers(self.model).items():
            if (reason := merge_refusal(layer)) is not None:
                raise NotImplementedError(f"{name} cannot be merged: {reason}")

    def make_allocator(self, finished: bool) -> None:
        """A fresh allocator for the layers as they are now, with the settings given to ``fuse``."""
        name = self.trainable_adapter_name
        config = self.peft_config[name]
        allocator = RankAllocator(
            self,
            target_r=config.target_r,
            tinit=config.tinit,
            tfinal=config.tfinal,
            deltaT=config.deltaT,
            total_step=config.total_step,
            beta1=config.beta1,
            beta2=config.beta2,
            layers=factor_finders(self.model, name),
            finished=finished,
            **self.fused_with.of_allocator,
        )
        FusedAdaLoraModel._regularise(self, allocator)

    def _regularise(self, allocator: RankAllocator) -> None:
        weight = partial(FusedAdaLoraModel.orth_reg_weight, self)
        Regulariser(allocator, self.fused_with.orth_penalty, weight)


class _AroundTheTuner:
    """Without a ``task_type`` PEFT's model calls the base model itself, around its tuner."""

    def forward(self, *args, **kwargs):
        """PEFT's, with what the tuner's forward adds."""
        return self.base_model.regularise(super().forward(*args, **kwargs))


@cache
def fused_model_class(cls: type[PeftModel]) -> type[PeftModel]:
    added = (_AroundTheTuner, WithAllocator) if cls.forward is PeftModel.forward else (WithAllocator,)
    return type(f"Fused{cls.__name__}", (*added, cls), {"__module__": PICKLED_AS})


def is_fused(model: nn.Module) -> bool:
    """Whether ``fuse`` was applied to this PeftModel."""
    return isinstance(model, WithAllocator)


def check_model(model: nn.Module) -> AdaLoraModel:
    if is_fused(model):
        raise ValueError("this model is fused already; make a new one to change its score")
    if isinstance(model, PeftMixedModel):
        raise TypeError(
            "PeftMixedModel has no rank allocator, its AdaLoRA adapters are never pruned; use get_peft_model "
            "without mixed=True to train one"
        )
    tuner = model.base_model
    if type(tuner) is not AdaLoraModel:
        raise TypeError(
            f"fuse needs a PeftModel with AdaLoRA, this one has {type(tuner).__name__}; use an AdaLoraConfig"
        )
    kinds = [(layer.lora_A, layer.lora_E, layer.lora_B) for layer in adapter_layers(tuner.model).values()]
    factors = [factor for layer in kinds for kind in layer for factor in kind.values()]
    refuse_emptied(factors)
    if shards_of(factors) is not None:
        raise ValueError("this model's parameters are sharded; call fuse before fully_shard")
    return tuner


def is_finished(tuner: AdaLoraModel, adapter: str) -> bool:
    """Whether the layers have the config's rank pattern for good: cut down by it, or masked to the budget.

    It is not so in the middle of a run of PEFT's, nor where a user gave a new model a pattern.
    """
    config, adapted = tuner.peft_config[adapter], adapter_layers(tuner.model)
    layers = [adapted.get(key.partition(".lora_E")[0]) for key in config.rank_pattern]
    if any(layer is None or adapter not in layer.lora_E for layer in layers):
        return False
    kept_in_all, is_cut, was_trained = 0, False, False
    singular_values = whole([layer.lora_E[adapter].detach() for layer in layers])
    for values, kept in zip(singular_values, config.rank_pattern.values(), strict=True):
        values, kept = values.flatten().cpu(), torch.as_tensor(kept).flatten().cpu()
        if len(values) != kept.sum() and (len(values) != len(kept) or values[~kept].any()):
            return False
        is_cut |= len(values) < len(kept)
        was_trained |= bool(values.any())
        kept_in_all += int(kept.sum())
    return is_cut or (was_trained and kept_in_all <= config.target_r * len(layers))


def check_rank_pattern(pattern: dict | None) -> None:
    for name, kept in (pattern or {}).items():
        if not isinstance(kept, (list, torch.Tensor)) or (
            isinstance(kept, list) and set(map(type, kept)) - {bool}
        ):
            raise ValueError(
                f"rank_pattern gives {name!r} the value {kept!r}, as LoRA would; AdaLoRA's is made by "
                "training: leave it None and set init_r and target_r"
            )


def fuse_peft_model(model: PeftModel, settings: FuseSettings) -> PeftModel:
    """``fuse`` for what ``get_peft_model`` or ``PeftModel.from_pretrained`` returned."""
    tuner = check_model(model)
    for config in tuner.peft_config.values():
        check_scales(config)
    check_names(tuner.model, tuner.peft_config)
    adapter = getattr(tuner, "trainable_adapter_name", None)
    config = tuner.peft_config.get(adapter)
    pattern, finished = None, False
    if config is not None:
        check_rank_pattern(config.rank_pattern)
        pattern = config.rank_pattern
        finished = pattern is not None and is_finished(tuner, adapter)
        _give_allocator(tuner, settings, finished)
    else:
        tuner.rankallocator, tuner.fused_with = None, settings
    layers = adapter_layers(tuner.model)
    reasons = {name: fuse_layer(layer, settings.precision, adapter) for name, layer in layers.items()}
    call_every_layer(model)
    tuner.unfused = {name: reason for name, reason in reasons.items() if reason is not None}
    tuner._warned_order, tuner._warned_returned, tuner._forgotten = False, False, 0
    tuner.__class__ = FusedAdaLoraModel
    for name, config_of_name in tuner.peft_config.items():
        take_over(adapter_layers(tuner.model), config_of_name, name)
    if config is not None:
        warn_of_untrained_heads(tuner, adapter)
        tuner.remember_versions()
        _settle_ranks(tuner, adapter, pattern, finished)
    model.__class__ = fused_model_class(type(model))
    return model


def _give_allocator(tuner: AdaLoraModel, settings: FuseSettings, finished: bool) -> None:
    """The allocator in place of PEFT's; an error leaves the tuner as it was."""
    previous = getattr(tuner, "rankallocator", None)
    tuner.rankallocator, tuner.fused_with = None, settings
    try:
        FusedAdaLoraModel.make_allocator(tuner, finished=finished)
    except (ValueError, TypeError):
        tuner.rankallocator = previous
        del tuner.fused_with
        raise


def _settle_ranks(tuner: FusedAdaLoraModel, adapter: str, pattern: dict | None, finished: bool) -> None:
    """What the config's rank pattern means for the layers as they are."""
    config = tuner.peft_config[adapter]
    if finished:
        tuner.restore_ranknum(pattern, adapter)
    elif pattern is not None:
        config.rank_pattern = None
        warnings.warn(
            "the config's rank_pattern is dropped: no finished run left it in these layers, which are "
            "allocated from the start, with empty statistics",
            UserWarning,
            stacklevel=4,
        )
    elif config.init_lora_weights:  # λ starts at zero
        warn_of_trained(tuner.rankallocator, adapter)
