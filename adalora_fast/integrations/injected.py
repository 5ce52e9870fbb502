"""``fuse`` for models that carry their adapter layers themselves, and for all that is adapted in a module.

``model.add_adapter(AdaLoraConfig(...))`` and ``inject_adapter_in_model`` leave a model with adapter layers
and without PEFT's tuner. ``fuse`` gives it a handle, ``model.adalora``: a fused ``PeftModel`` over the same
modules (:mod:`adalora_fast.integrations.locate`). The model keeps its name, methods and state dict. It gains:

- ``rankallocator`` and ``update_and_allocate(step)``;
- γ · R in ``outputs.loss`` of a training forward, as ``PeftModel`` has it;
- in transformers' ``save_pretrained`` and ``load_adapter``: the allocator's state, and loading into the
  adapter under training.

Its files hold every triplet, pruned ones with λ = 0, because ``load_adapter`` of transformers takes nothing
else.
"""

import contextlib
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from adalora_fast.allocator.allocator import RankAllocator
from adalora_fast.allocator.state import is_sharded, write_state

from .adapter_names import is_in_a_key
from .checkpoints import move_files
from .fused import (
    FusedAdaLoraModel,
    FuseSettings,
    check_model,
    check_rank_pattern,
    fuse_peft_model,
    is_finished,
    is_fused,
)
from .layers import adapter_layers, fuse_layer
from .locate import HANDLE, peft_models
from .scales import check_scales, take_over


class InjectedAdaLoraModel(FusedAdaLoraModel):
    """The tuner of a handle. What changes in the model is read from the model: mode, active adapters,
    allocator.
    """

    drops_pruned = False

    @property
    def training(self) -> bool:
        """The model's mode."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        """``train(mode)`` sets it in the model."""

    @property
    def active_adapter(self) -> list[str]:
        """What transformers' ``set_adapter`` chose in the layers."""
        layers = adapter_layers(self.model).values()
        return next((layer.active_adapters for layer in layers), [])

    @active_adapter.setter
    def active_adapter(self, names) -> None:
        """PEFT's ``set_adapter`` sets it in the layers."""

    @property
    def rankallocator(self) -> RankAllocator | None:
        """The model's attribute of that name."""
        return self.model.__dict__.get("rankallocator")

    @rankallocator.setter
    def rankallocator(self, allocator: RankAllocator | None) -> None:
        self.model.__dict__["rankallocator"] = allocator

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        """PEFT's; the model that comes back carries no adapters and is fused no longer."""
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        take_handle(model)
        if "_hf_peft_config_loaded" in model.__dict__:
            model._hf_peft_config_loaded = False
        return model

    def settle(self, adapter: str) -> None:
        """Layers and scales of an adapter that PEFT has just added."""
        trained = getattr(self, "trainable_adapter_name", None)
        for layer in adapter_layers(self.model).values():
            fuse_layer(layer, self.fused_with.precision, trained)
        take_over(adapter_layers(self.model), self.peft_config[adapter], adapter)


class _Regularise:
    """Forward hook of the model: what the tuner's own forward does in a ``PeftModel``."""

    def __init__(self, tuner: InjectedAdaLoraModel) -> None:
        self.tuner = tuner

    def __call__(self, module: nn.Module, args: tuple, outputs):
        return self.tuner.regularise(outputs)


class WithHandle:
    """What ``fuse`` adds to a model that carries its adapter layers itself."""

    def update_and_allocate(self, global_step: int) -> None:
        """See :meth:`FusedAdaLoraModel.update_and_allocate`."""
        self.adalora.base_model.update_and_allocate(global_step)

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: dict, state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """PEFT asks the model to cut what it saves; layers with a rank pattern are cut already."""
        return state_dict

    def __reduce_ex__(self, protocol):
        """The class is made by ``fuse`` and has the original's name: copies find it by the original."""
        return _empty, (self.fused_from,), self.__getstate__()


class WithHandleInTransformers(WithHandle):
    """The same for a transformers model: its methods for adapters know the allocator."""

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """transformers', plus the allocator's state; written beside the target and moved into place."""
        allocator, tuner = self.rankallocator, self.adalora.base_model
        saves_ours = (
            allocator is not None
            and self._hf_peft_config_loaded
            and self.active_adapters() == [tuner.trainable_adapter_name]
        )
        if not saves_ours:
            return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        _warn_of_what_is_not_saved(self, tuner)
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; give save_pretrained a folder")
        if allocator.t == 0 and tuner.was_trained() and not allocator.is_over:
            warnings.warn("saving an adapter that was trained without one allocator step", stacklevel=2)
        with tuner.saving(tuner.trainable_adapter_name), _place_in(target, is_main_process, kwargs) as place:
            super().save_pretrained(place, is_main_process=is_main_process, **kwargs)
            if is_main_process and not is_sharded(allocator):
                write_state(allocator, place)

    def load_adapter(self, peft_model_id=None, adapter_name: str | None = None, *args, **kwargs):
        """transformers' for a new adapter. Into the adapter under training: its weights and the allocator's
        state from a local folder, as ``PeftModel.load_adapter`` of a fused model does.

        Raises:
            ValueError: a file is missing, damaged or of another model; nothing was changed then.
        """
        tuner, name = self.adalora.base_model, adapter_name or "default"
        ours = self.rankallocator is not None and name == tuner.trainable_adapter_name
        if ours and peft_model_id is not None and Path(str(peft_model_id)).is_dir():
            return self.adalora.load_adapter(peft_model_id, name, *args, **kwargs)
        with _unless_it_fails(self, name):
            _check_name(self, name)
            result = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
            check_scales(self.peft_config[name])
        tuner.settle(name)
        return result

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """transformers'; the layers are fused."""
        name = adapter_name or "default"
        with _unless_it_fails(self, name):
            _check_name(self, name)
            check_scales(adapter_config)
            super().add_adapter(adapter_config, adapter_name)
        self.adalora.base_model.settle(name)

    def delete_adapter(self, adapter_names) -> None:
        """transformers'; without the adapter under training the model is no longer fused."""
        tuner = self.adalora.base_model
        trained = getattr(tuner, "trainable_adapter_name", None)
        super().delete_adapter(adapter_names)
        if trained not in self.__dict__.get("peft_config", {}):
            take_handle(self)


def _check_name(model: nn.Module, adapter: str) -> None:
    """Refuse a name with which transformers would save a part of the adapters, without a word.

    Raises:
        ValueError: it is a part of a layer's name; transformers finds an adapter's tensors by text.
    """
    taken = next((layer for layer in adapter_layers(model) if is_in_a_key(adapter, [layer])), None)
    if taken is not None:
        raise ValueError(
            f"an adapter called {adapter!r} could not be saved: the name is a part of {taken}.lora_E, and "
            "transformers finds an adapter's tensors by text; choose another name"
        )


@contextlib.contextmanager
def _place_in(target: Path, is_main_process: bool, kwargs: dict):
    """A folder that takes ``target``'s place file by file at the end (an upload needs ``target`` itself)."""
    target.mkdir(parents=True, exist_ok=True)
    if not is_main_process or kwargs.get("push_to_hub"):
        yield target
        return
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as place:
        yield Path(place)
        move_files(Path(place), target)


@contextlib.contextmanager
def _unless_it_fails(model: nn.Module, name: str):
    """PEFT notes an adapter before it refuses it."""
    known = name in model.peft_config
    try:
        yield
    except Exception:
        if not known:
            model.peft_config.pop(name, None)
        raise


def _warn_of_what_is_not_saved(model: PreTrainedModel, tuner: InjectedAdaLoraModel) -> None:
    """transformers saves the adapter alone: a head that was unfrozen by hand would be lost without a word."""
    marks = (".lora_A.", ".lora_E.", ".lora_B.", ".modules_to_save.", ".trainable_tokens_delta.")
    config = tuner.peft_config[tuner.trainable_adapter_name]
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(mark in name for mark in marks)
    ]
    if config.bias != "none":
        lost = [name for name in lost if not name.endswith("bias")]
    if lost:
        warnings.warn(
            f"{', '.join(lost)} of {type(model).__name__} is trained but not saved with the adapter; put it "
            "into modules_to_save of the AdaLoraConfig",
            UserWarning,
            stacklevel=3,
        )


@cache
def _class_with_handle(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with a handle. Its name stays: transformers chooses labels, losses and heads by it."""
    base = WithHandleInTransformers if issubclass(cls, PreTrainedModel) else WithHandle
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (base, cls), {**names, "fused_from": cls})


def _empty(cls: type[nn.Module]) -> nn.Module:
    fused = _class_with_handle(cls)
    return fused.__new__(fused)


def give_handle(model: nn.Module, handle: PeftModel) -> None:
    """Make ``handle``, which is fused, the model's own."""
    tuner = handle.base_model
    model.__dict__["rankallocator"] = tuner.__dict__.pop("rankallocator", None)
    for name in ("training", "active_adapter"):
        tuner.__dict__.pop(name, None)  # the model's count from here on
    tuner.__class__ = InjectedAdaLoraModel
    model.__dict__[HANDLE] = handle
    model.__class__ = _class_with_handle(type(model))
    model.register_forward_hook(_Regularise(tuner))


def take_handle(model: nn.Module) -> None:
    """Undo :func:`give_handle`."""
    for name in (HANDLE, "rankallocator"):
        model.__dict__.pop(name, None)
    if isinstance(model, WithHandle):
        model.__class__ = model.fused_from
    for number, hook in list(model._forward_hooks.items()):
        if isinstance(hook, _Regularise):
            del model._forward_hooks[number]


def forget_handle(model: nn.Module, memo: dict) -> None:
    """Have ``copy.deepcopy`` leave the handle of ``model`` out; the copy needs :func:`take_handle` then."""
    handle = model.__dict__.get(HANDLE)
    if handle is not None:
        memo |= {id(handle): None, id(handle.base_model): None}


def fuse_inside(model: nn.Module, settings: FuseSettings) -> nn.Module:
    """``fuse`` for everything adapted in ``model`` that is not fused yet; all of it, or an error and nothing.

    Raises:
        TypeError: there is no AdaLoRA in it.
        ValueError: all of it is fused already, or a config or an option is refused.
    """
    found = peft_models(model)
    if not found:
        for mixed in (m for m in getattr(model, "modules", list)() if isinstance(m, PeftMixedModel)):
            check_model(mixed)  # says why not
        raise TypeError(_why_nothing(model))
    unfused = {name: each for name, each in found.items() if not is_fused(each)}
    if not unfused:
        raise ValueError("this model is fused already; make a new one to change its score")
    if len(unfused) > 1:
        for name, each in unfused.items():
            try:
                _try(each, settings)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
    for each in unfused.values():
        carrier = each.base_model.model
        if isinstance(carrier, PreTrainedModel) and each not in model.modules():
            for name in each.peft_config:
                _check_name(carrier, name)
    for each in unfused.values():
        fuse_peft_model(each, settings)
        carrier = each.base_model.model
        if each not in model.modules():  # a handle
            give_handle(carrier, each)
    return model


def _why_nothing(model: nn.Module) -> str:
    kind = type(model).__name__
    if isinstance(model, nn.Module) and adapter_layers(model):
        return (
            f"{kind} carries AdaLoRA layers but not their configuration; fuse the whole model, "
            "for which get_peft_model, add_adapter or inject_adapter_in_model was called"
        )
    return (
        f"fuse needs a model with PEFT's AdaLoRA in it, got {kind}; call get_peft_model or add_adapter first"
    )


def _try(model: PeftModel, settings: FuseSettings) -> None:
    """Raise what :func:`fuse_peft_model` would, and change nothing."""
    tuner = check_model(model)
    for config in tuner.peft_config.values():
        check_scales(config)
    name = getattr(tuner, "trainable_adapter_name", None)
    if name not in tuner.peft_config:
        return
    pattern = tuner.peft_config[name].rank_pattern
    check_rank_pattern(pattern)
    scratch = SimpleNamespace(
        trainable_adapter_name=name,
        peft_config=tuner.peft_config,
        model=tuner.model,
        fused_with=settings,
    )
    FusedAdaLoraModel.make_allocator(scratch, finished=pattern is not None and is_finished(tuner, name))
