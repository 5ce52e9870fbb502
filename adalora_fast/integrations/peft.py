"""``fuse``: a PEFT AdaLoRA model made fast and correct in place; same state dict, same checkpoints, same
methods.
"""

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from adalora_fast.allocator import SCORE_GRADIENTS, RankAllocator
from adalora_fast.allocator_state import FILE_NAME, read_state, write_state
from adalora_fast.integrations.layers import FusedSVDLinear, adapter_layers, factor_finders, fuse_layer
from adalora_fast.nn import orthogonality_of
from adalora_fast.ops.adapter import PRECISIONS
from adalora_fast.ops.orthogonality import PENALTIES
from adalora_fast.scores import get_score, resolve_smoothing

FORGOTTEN_AFTER = 100  # optimizer steps without one allocator step


class FusedAdaLoraModel(AdaLoraModel):
    """PEFT's AdaLoRA tuner with the fused layers, the closed-form regulariser and :class:`RankAllocator`."""

    def forward(self, *args, **kwargs):
        """The base model's forward; in training γ · R is added to ``outputs.loss`` (never in evaluation)."""
        outputs = self.model.forward(*args, **kwargs)
        if not (self.training and torch.is_grad_enabled()) or self.rankallocator is None:
            return outputs
        self._watch_for_forgotten_allocator()
        weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
        self.regularised = isinstance(getattr(outputs, "loss", None), torch.Tensor)
        if self.regularised and weight > 0:
            outputs.loss = outputs.loss + weight * self.orthogonality_loss().to(outputs.loss.device)
        return outputs

    def orthogonality_loss(self) -> torch.Tensor:
        """R of the adapter under training (see :func:`adalora_fast.orthogonality_loss`)."""
        return orthogonality_of(self.rankallocator._factors(), self.orth_penalty, self.rankallocator)

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
        return sum(parameter._version for parameter in self.rankallocator._lambdas())

    def _finite_gradients(self) -> bool:
        """Whether an optimizer step was due (a ``GradScaler`` skips it for infinite gradients)."""
        grads = [parameter.grad for parameter in self.rankallocator._parameters()]
        return all(grad is None or bool(grad.isfinite().all()) for grad in grads)

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
            fuse_layer(layer, self.precision, getattr(self, "trainable_adapter_name", None))

    def make_allocator(self, finished: bool) -> None:
        """A fresh allocator for the layers as they are now, with the settings given to ``fuse``."""
        name = self.trainable_adapter_name
        config = self.peft_config[name]
        RankAllocator(
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
            **self.allocator_settings,
        )

    # -- checkpoints

    def peft_rank_pattern(self) -> dict[str, list[bool]]:
        """The rank pattern under PEFT's keys."""
        adapter = self.trainable_adapter_name
        return {f"{name}.lora_E.{adapter}": kept for name, kept in self.rankallocator.rank_pattern().items()}

    @contextlib.contextmanager
    def saving(self):
        """While a finished run is saved its config holds the pattern, so that PEFT drops the pruned triplets.

        In memory it is None: a checkpoint from the middle of a run must keep whole tensors.
        """
        config = self.peft_config[self.trainable_adapter_name]
        if self._cut_pattern is None and self.rankallocator.is_over:
            config.rank_pattern = self.peft_rank_pattern()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message=".*LoRA tensor.s. have invalid shape.*"
                )  # rank 0 is meant
                yield
        finally:
            config.rank_pattern = self._cut_pattern

    def match_ranks(self, folder: Path) -> None:
        """Give every layer the rank it has in the checkpoint, before PEFT copies the weights."""
        adapter = self.trainable_adapter_name
        config = self.peft_config[adapter]
        ranks = _saved_ranks(folder)
        pattern = json.loads((folder / "adapter_config.json").read_text()).get("rank_pattern") or None
        for name, layer in adapter_layers(self.model).items():
            rank = ranks.get(f"base_model.model.{name}.lora_E")
            if rank is None or adapter not in layer.lora_A or rank == layer.lora_A[adapter].shape[0]:
                continue
            if not isinstance(layer, FusedSVDLinear):
                raise ValueError(
                    f"{name} ({type(layer).__name__}) cannot change its rank to {rank}; load a new model"
                )
            layer.resize(adapter, rank, config)
        self._cut_pattern = pattern
        self.make_allocator(finished=pattern is not None)


class WithAllocator:
    """What ``fuse`` adds to a ``PeftModel``: checkpoints carry the allocator, and are written whole or not at
    all.
    """

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs) -> None:
        """PEFT's, plus the allocator's state; written beside the target and moved into place at the end."""
        tuner = self.base_model
        if tuner.rankallocator is None or not is_main_process:
            return super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        allocator = tuner.rankallocator
        if allocator.t == 0 and tuner._forgotten > 0 and not allocator.is_over:
            warnings.warn(
                "saving an adapter that was trained without one allocator step", UserWarning, stacklevel=2
            )
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; give save_pretrained a folder")
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as place:
            if (target / "README.md").is_file():
                shutil.copy2(target / "README.md", place)  # PEFT updates a model card that is there
            with tuner.saving():
                super().save_pretrained(place, *args, **kwargs)
            adapter = tuner.trainable_adapter_name
            folder = Path(place) if adapter == "default" else Path(place) / adapter
            if folder.is_dir():
                write_state(allocator, folder)
            _move_files(Path(place), target)

    def load_adapter(self, model_id, adapter_name: str, *args, **kwargs):
        """PEFT's, and the allocator's state if the checkpoint has one; whole and cut-down checkpoints both
        load.
        """
        tuner, folder = self.base_model, Path(str(model_id)) / (kwargs.get("subfolder") or "")
        ours = tuner.rankallocator is not None and adapter_name == tuner.trainable_adapter_name
        if not ours or not (folder / "adapter_config.json").is_file():
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        state = read_state(folder)
        tuner.peft_config[adapter_name].rank_pattern = None
        tuner.match_ranks(folder)
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        tuner.peft_config[adapter_name].rank_pattern = tuner._cut_pattern
        if state is not None and tuner._cut_pattern is None:
            tuner.rankallocator.load_state_dict(state)
            if not tuner.rankallocator.is_final and not (
                args[0] if args else kwargs.get("is_trainable", False)
            ):
                _warn_unfinished(state["config"])
        elif state is None and tuner._cut_pattern is None:
            warnings.warn(
                f"{folder} has no {FILE_NAME}: the allocator starts with empty statistics", stacklevel=2
            )
        return result


def _warn_unfinished(saved: dict) -> None:
    warnings.warn(
        f"this checkpoint was saved before the final mask, at step {saved['t']} with "
        f"{saved['budget']} triplets (final "
        f"budget {saved['schedule']['target']}); train on, or call rankallocator.finalize()",
        UserWarning,
        stacklevel=3,
    )


def _move_files(source: Path, target: Path) -> None:
    """Rename every file below ``source`` to its place below ``target`` (same file system)."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)


def _saved_ranks(folder: Path) -> dict[str, int]:
    """Key of every lora_E in the checkpoint and its rank, from the file's header."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(".lora_E")}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}); restore it from a copy") from error


@cache
def _fused_model_class(cls: type[PeftModel]) -> type[PeftModel]:
    return type(f"Fused{cls.__name__}", (WithAllocator, cls), {"__module__": __name__})


def __getattr__(name: str):
    """The classes made by ``fuse`` by name, so that a fused model can be copied and pickled by its owner."""
    if name.startswith("FusedPeftModel"):
        import peft

        return _fused_model_class(getattr(peft, name.removeprefix("Fused")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fuse(
    model: PeftModel,
    score: str = "sensitivity",
    *,
    smoothing: str | None = None,
    score_gradient: str = "total",
    orth_penalty: str = "fro",
    precision: str = "default",
) -> PeftModel:
    """Make a PEFT AdaLoRA model fast and its allocation correct, in place.

    Layers, tuner and model change their class, nothing is copied: parameters, state dict, optimizers made
    before, and PEFT's methods stay valid. Layers without a fused form (quantised bases, convolutions) keep
    PEFT's forward; ``model.base_model.unfused`` names them with the reason.

    Args:
        model: what ``get_peft_model(base, AdaLoraConfig(...))`` or ``PeftModel.from_pretrained`` returned.
        score: ``sensitivity`` (PEFT's), ``movement``, ``fisher``, ``gsnr``, ``magnitude`` or a registered
            name.
        smoothing, score_gradient: see :class:`adalora_fast.RankAllocator`.
        orth_penalty: ``"fro"`` (PEFT's) or ``"squared"`` (the paper's).
        precision: ``"default"`` or ``"highest"``, see :func:`adalora_fast.ops.adalora_linear`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a PeftModel with AdaLoRA (also a model made by ``inject_adapter_in_model``).
        ValueError: fused already, a config whose numbers do not fit, an unknown score, smoothing or penalty.
    """
    tuner = _check_model(model)
    resolve_smoothing(get_score(score), smoothing)
    if score_gradient not in SCORE_GRADIENTS:
        raise ValueError(f"score_gradient {score_gradient!r} is not one of {SCORE_GRADIENTS}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {PRECISIONS}")
    if orth_penalty not in PENALTIES:
        raise ValueError(f"orth_penalty {orth_penalty!r} is not one of {PENALTIES}")
    adapter = getattr(tuner, "trainable_adapter_name", None)
    config = tuner.peft_config.get(adapter)
    pattern = None
    if config is not None:
        _check_rank_pattern(config.rank_pattern)
        pattern = config.rank_pattern
    previous = getattr(tuner, "rankallocator", None)
    tuner.rankallocator = None
    if config is not None:
        settings = {"score": score, "smoothing": smoothing, "score_gradient": score_gradient}
        tuner.allocator_settings = settings
        try:
            FusedAdaLoraModel.make_allocator(tuner, finished=pattern is not None)
        except (ValueError, TypeError):
            tuner.rankallocator = previous
            del tuner.allocator_settings
            raise
    reasons = {
        name: fuse_layer(layer, precision, adapter) for name, layer in adapter_layers(tuner.model).items()
    }
    tuner.unfused = {name: reason for name, reason in reasons.items() if reason is not None}
    tuner.orth_penalty, tuner.precision = orth_penalty, precision
    tuner.regularised, tuner._warned_order, tuner._forgotten = True, False, 0
    tuner._cut_pattern = pattern
    tuner.__class__ = FusedAdaLoraModel
    tuner._seen_version = tuner._watched_version = None if config is None else tuner._optimizer_version()
    model.__class__ = _fused_model_class(type(model))
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether ``fuse`` was applied to this PeftModel."""
    return isinstance(model, WithAllocator)


def _check_model(model: nn.Module) -> AdaLoraModel:
    if is_fused(model):
        raise ValueError("this model is fused already; make a new one to change its score")
    if not isinstance(model, PeftModel):
        if any(isinstance(module, AdaLoraLayer) for module in getattr(model, "modules", list)()):
            raise TypeError(
                f"{type(model).__name__} carries AdaLoRA layers but is no PeftModel "
                "(inject_adapter_in_model makes such "
                "models); use get_peft_model(model, config) and fuse its result"
            )
        raise TypeError(
            f"fuse needs a PeftModel with AdaLoRA, got {type(model).__name__}; call get_peft_model first"
        )
    tuner = model.base_model
    if type(tuner) is not AdaLoraModel:
        raise TypeError(
            f"fuse needs a PeftModel with AdaLoRA, this one has {type(tuner).__name__}; use an AdaLoraConfig"
        )
    return tuner


def _check_rank_pattern(pattern: dict | None) -> None:
    for name, kept in (pattern or {}).items():
        if not isinstance(kept, (list, torch.Tensor)) or (
            isinstance(kept, list) and set(map(type, kept)) - {bool}
        ):
            raise ValueError(
                f"rank_pattern gives {name!r} the value {kept!r}, as LoRA would; AdaLoRA's is "
                "made by training: leave it "
                "None and set init_r and target_r"
            )
