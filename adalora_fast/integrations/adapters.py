"""Adapters of a fused model coming, going, being saved and loaded; PEFT's methods, with places for names."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor

from .adapter_names import as_taken_out, by_layer, check_name, is_in_a_key
from .checkpoints import Checkpoint, renamed_pattern
from .layers import FusedLayer, adapter_layers
from .policies import pattern_of_copy
from .scales import set_scales
from .weights import check_before_saving


class WithAdapters(AdaLoraModel):
    """The part of the fused tuner that knows which adapters there are, their ranks and their names."""

    drops_pruned = True  # from the files of a finished run
    _is_saving = False
    _renamed: Callable[[str], str] = staticmethod(str)  # a key in a file → the same in the model

    def inject_adapter(self, model, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's, after a look at the name. What was trainable stays so: PEFT forgets it of modules called
        like the new adapter. An adapter that is added after the last one was deleted is active.
        """
        config = self.peft_config[adapter_name]
        check_name(model, config, adapter_name)
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        is_alone = not self.active_adapters
        if is_alone:
            self.active_adapter = adapter_name
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            if is_alone:
                self.active_adapter = []
            raise
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        if is_alone:
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def train_adapter(self, adapter: str) -> None:
        """Give an adapter that was just added an allocator: it is the one under training from here on."""
        self.trainable_adapter_name = adapter
        for layer in adapter_layers(self.model).values():
            if isinstance(layer, FusedLayer):
                layer.trained_adapter = adapter
        try:
            self.make_allocator(finished=False)
        except (ValueError, TypeError):
            self.delete_adapter(adapter)
            raise
        self.remember_versions()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; its scales go too, and its allocator if it is the one under training."""
        super().delete_adapter(adapter_name)
        for layer in adapter_layers(self.model).values():
            getattr(layer, "_denominator", {}).pop(adapter_name, None)
            getattr(layer, "scale_factors", {}).pop(adapter_name, None)
        if adapter_name != getattr(self, "trainable_adapter_name", None):
            return
        if self.rankallocator is not None:
            self.rankallocator.detach()
        self.rankallocator = None
        del self.trainable_adapter_name
        for layer in adapter_layers(self.model).values():
            if isinstance(layer, FusedLayer):
                layer.trained_adapter = None

    # -- saving --------------------------------------------------------------------------------

    def peft_rank_pattern(self) -> dict[str, list[bool]]:
        """The rank pattern under PEFT's keys."""
        adapter = self.trainable_adapter_name
        return {f"{name}.lora_E.{adapter}": kept for name, kept in self.rankallocator.rank_pattern().items()}

    @contextlib.contextmanager
    def saving(self, adapter: str) -> Iterator[None]:
        """While a finished run is saved its config holds the pattern, so that PEFT drops the pruned triplets.

        In memory it is None: a checkpoint from the middle of a run must keep whole tensors. (Once the layers
        themselves were cut down, by loading such a checkpoint, it is the pattern they were cut by.)
        """
        config = self.peft_config[adapter]
        before = config.rank_pattern, config.inference_mode
        if adapter == getattr(self, "trainable_adapter_name", None):
            check_before_saving(self)
        if config.rank_pattern is None:
            config.rank_pattern = self._pattern_to_save(adapter)
        self._is_saving = True
        try:
            with warnings.catch_warnings():
                # rank 0 is meant
                warnings.filterwarnings("ignore", message=".*LoRA tensor.s. have invalid shape.*")
                yield
        finally:
            config.rank_pattern, config.inference_mode = before
            self._is_saving = False

    def _pattern_to_save(self, adapter: str) -> dict[str, list[bool]] | None:
        if adapter != getattr(self, "trainable_adapter_name", None):
            return pattern_of_copy(self.model, adapter)
        drops = self.drops_pruned and self.rankallocator.is_over
        return self.peft_rank_pattern() if drops else None

    def whole_pattern(self, adapter: str) -> dict[str, list[bool]] | None:
        """By layer, the triplets that are not zero in whole tensors, where :meth:`saving` writes those of
        layers that were cut down; else None.
        """
        pattern = by_layer(self.peft_config[adapter].rank_pattern or {})
        return pattern if is_in_a_key(adapter, pattern) else None

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: dict[str, Any], state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """PEFT's, for adapters of any name.

        PEFT loads a rank pattern only under a name that is part of none of its keys. An adapter whose own
        name is part of one is saved whole, with zeros for the pruned triplets and without a pattern.
        """
        kept_of = {
            layer: torch.as_tensor(rank_pattern[key]).flatten()
            for layer in adapter_layers(self.model)
            if (key := as_taken_out(layer, adapter_name)) in rank_pattern
        }
        whole = self._is_saving and is_in_a_key(adapter_name, kept_of)
        for layer, kept in kept_of.items():
            for kind, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                key = f"base_model.model.{layer}.{kind}.{adapter_name}"
                state_dict[key] = (_whole if whole else _cut)(state_dict[key], kept, dim)
        self.peft_config[adapter_name].rank_pattern = (
            None if whole else {f"{layer}.lora_E": kept.tolist() for layer, kept in kept_of.items()}
        )
        return state_dict

    # -- loading -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loading(self, renamed: Callable[[str], str]) -> Iterator[None]:
        """Keys of the file that is loaded meanwhile are ``renamed(key)`` in the model."""
        self._renamed = renamed
        try:
            yield
        finally:
            del self._renamed

    def match_ranks(self, checkpoint: Checkpoint) -> None:
        """Give every layer the rank it has in the checkpoint, before PEFT copies the weights."""
        adapter = self.trainable_adapter_name
        resized = {
            name: checkpoint.rank(name)
            for name, layer in adapter_layers(self.model).items()
            if adapter in layer.lora_A and checkpoint.rank(name) != layer.lora_A[adapter].shape[0]
        }
        for name in resized:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, FusedLayer):
                raise ValueError(
                    f"{name} ({type(layer).__name__}) cannot change its rank; load into a new model"
                )
        for name, rank in resized.items():
            self.model.get_submodule(name).resize(adapter, rank, self.peft_config[adapter])
        set_scales(adapter_layers(self.model), self.peft_config[adapter], adapter)

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """PEFT's, with the scale of the initial rank kept in every layer, also where no triplet is left."""
        config = self.peft_config[adapter_name]
        config.rank_pattern = renamed_pattern(rank_pattern, self._renamed)
        # With the adapter's name in every key PEFT finds the layer, whatever the name is.
        pattern = {f"{key}.{adapter_name}": kept for key, kept in config.rank_pattern.items()}
        super().resize_modules_by_rank_pattern(pattern, adapter_name)
        set_scales(adapter_layers(self.model), config, adapter_name)
        self.restore_ranknum(config.rank_pattern, adapter_name)

    def restore_ranknum(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """The scale's rank is the initial one: the length of a layer's pattern (PEFT forgets it at rank
        0).
        """
        for layer, kept in by_layer(rank_pattern).items():
            module = self.model.get_submodule(layer)
            if isinstance(module, FusedLayer):
                module.set_ranknum(adapter_name, len(kept))


def check_names(model, configs: dict[str, AdaLoraConfig]) -> None:
    """:func:`check_name` for every adapter of a model."""
    for adapter, config in configs.items():
        check_name(model, config, adapter)


def _cut(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    """The kept triplets of a factor, which may have no others any more."""
    if tensor.shape[dim] == int(kept.sum()):
        return tensor
    return tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))


def _whole(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    """A factor with all its initial triplets, zeros for those that are not kept."""
    places = kept.nonzero().flatten().to(tensor.device)
    shape = list(tensor.shape)
    shape[dim] = len(kept)
    return tensor.new_zeros(shape).index_copy(dim, places, _cut(tensor, kept, dim))
