"""What trainers of policies (TRL's) ask of a PeftModel: frozen copies of the adapter, and weights by name.

DPO, KTO, RLOO and GRPO of TRL call ``model.add_adapter("ref", model.peft_config["default"])`` on a PeftModel
that they are given, with the trained adapter's own config object, and copy the weights of parameters whose
name has ``.default.`` in it. PEFT's AdaLoRA refuses a second trainable adapter, and its parameters, which
end in ``.default``, would not be copied: the reference would silently be the base model.

For generation they merge the adapter and send vLLM every parameter without ``lora_`` in its name, PEFT's
``ranknum`` too, which vLLM refuses.
"""

import copy
from collections.abc import Iterator

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from adalora_fast.nn import Factors

from .layers import FusedLayer, adapter_layers, set_factors


class WithPolicies:
    """What ``fuse`` adds to a ``PeftModel`` for them."""

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        """PyTorch's; of a merged adapter without ``ranknum``, which is no weight of the merged model."""
        layer = next((module for module in self.modules() if isinstance(module, AdaLoraLayer)), None)
        merged = layer is not None and layer.merged
        for name, parameter in super().named_parameters(*args, **kwargs):
            if not (merged and ".ranknum." in name):
                yield name, parameter

    def add_adapter(self, adapter_name: str, peft_config: AdaLoraConfig, *args, **kwargs) -> None:
        """PEFT's; given the config object of the adapter under training, a frozen copy of that adapter.

        The copy has the trained adapter's weights, ranks and scales as they are now (``modules_to_save``
        too) and a config of its own with ``inference_mode=True``. The allocator and the orthogonality term
        stay with the trained adapter.

        Args:
            adapter_name: the new adapter's name.
            peft_config: its config; any other object than the trained adapter's is PEFT's to judge.

        Raises:
            ValueError: the trained adapter changes the base's biases, which all adapters share.
        """
        trained = getattr(self.base_model, "trainable_adapter_name", None)
        if peft_config is not self.peft_config.get(trained) or adapter_name in self.peft_config:
            return super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        if peft_config.bias != "none":
            raise ValueError(
                f"adapter {trained!r} trains biases of the base model (bias={peft_config.bias!r}), which a "
                f"frozen copy {adapter_name!r} would share; give the trainer ref_model= (beta=0 in GRPO and "
                "RLOO), or set bias='none'"
            )
        config = copy.deepcopy(peft_config)
        config.inference_mode = True
        config.rank_pattern = None  # the layers get their ranks below
        config.layer_replication = None  # the base has its replicas already
        super().add_adapter(adapter_name, config, *args, **kwargs)
        config.layer_replication = copy.deepcopy(peft_config.layer_replication)
        _copy_weights(self.base_model.model, trained, adapter_name)


@torch.no_grad()
def _copy_weights(model: nn.Module, source: str, target: str) -> None:
    """Give adapter ``target`` the factors, ranks, scales and ``modules_to_save`` of ``source``."""
    for layer in adapter_layers(model).values():
        if source not in layer.lora_A:
            continue
        factors = (layer.lora_A[source], layer.lora_E[source], layer.lora_B[source])
        copies = [nn.Parameter(factor.detach().clone(), requires_grad=False) for factor in factors]
        set_factors(layer, target, Factors(*copies))
        layer.ranknum[target].copy_(layer.ranknum[source])
        layer.scaling[target] = layer.scaling[source]
        if isinstance(layer, FusedLayer):
            layer._denominator[target] = layer._denominator[source]
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            tensors = module.state_dict(keep_vars=True)
            for name, tensor in tensors.items():
                parts = name.split(".")
                if source in parts:
                    parts[parts.index(source)] = target
                    tensors[".".join(parts)].copy_(tensor)


def pattern_of_copy(model: nn.Module, adapter: str) -> dict[str, list[bool]] | None:
    """The pattern that makes layers of the initial rank as small as these, or None if they have that rank.

    A copy's config has none in memory: PEFT would cut the layers again whenever it loads weights into them.
    """
    layers = adapter_layers(model)
    ranks = {
        name: (layer.lora_E[adapter].shape[0], round(layer.ranknum[adapter].item()))
        for name, layer in layers.items()
        if adapter in layer.lora_E
    }
    if all(rank == initial for rank, initial in ranks.values()):
        return None
    return {
        f"{name}.lora_E.{adapter}": [True] * rank + [False] * (initial - rank)
        for name, (rank, initial) in ranks.items()
    }
