"""Several processes that train one model: how they agree on a mask, over factors that may be sharded.

Data parallel processes hold the same parameters and, after the all-reduce of gradients, the same statistics.
That their masks are the same too is made sure of at every allocation: the first process's is broadcast. With
:mod:`adalora_fast.distributed.shards` the functions here do the same for a model under ``fully_shard``.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_fast import ops
from adalora_fast.ops import select_triplets

from .shards import gather_whole, is_running, shards_of


class Processes:
    """The processes that train one model together.

    Attributes:
        group: their process group; None stands for all processes. Processes that train models of their own
            need one each (``torch.distributed.new_subgroups(1)[0]``).
        has_data: whether this one still trains, while some may have run out of data
            (:class:`adalora_fast.JoinableAllocator`); None where all do.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.has_data: bool | None = None

    def __deepcopy__(self, memo: dict) -> "Processes":
        copy = Processes()
        copy.group, copy.has_data = self.group, self.has_data  # a group is no data
        return copy

    def are_several(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.size() > 1

    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if is_running() else 1

    def count(self, flags: tuple[bool, ...], device: torch.device) -> list[int]:
        """In how many processes each flag is set; all must ask, and wait for the device."""
        counts = torch.tensor([int(flag) for flag in flags], device=device)
        dist.all_reduce(counts, group=self.group)
        return counts.tolist()

    def agree_(self, tensor: Tensor) -> None:
        """Everybody has the first process's values from here on, or the first's that still trains.

        Only to find the latter waits for the device.
        """
        if self.are_several():
            source = 0 if self.has_data is None else self.first_with(self.has_data, tensor.device)
            dist.broadcast(tensor, group=self.group, group_src=source)

    def first_with(self, flag: bool, device: torch.device) -> int:
        """The first process whose ``flag`` is set; all must ask."""
        own = dist.get_rank(self.group) if flag else dist.get_world_size(self.group)
        first = torch.tensor(own, device=device)
        dist.all_reduce(first, dist.ReduceOp.MIN, self.group)
        return int(first)


def allocate_(scores: Tensor, budget: Tensor, lora_E: list[Tensor], processes: Processes) -> Tensor:
    """:func:`adalora_fast.ops.allocate_` with one outcome in all processes, over Λ that may be sharded."""
    if not processes.are_several() and shards_of(lora_E) is None:
        return ops.allocate_(scores, budget, lora_E)
    mask = select_triplets(scores, budget)
    processes.agree_(mask)
    apply_mask_(mask, lora_E)
    return mask


def apply_mask_(mask: Tensor, lora_E: list[Tensor]) -> None:
    """:func:`adalora_fast.ops.apply_mask_` over Λ that may be sharded."""
    ops.apply_mask_(*_held(mask, lora_E))


def add_(values: Tensor, lora_E: list[Tensor]) -> None:
    """λ ← λ + ``values`` [T], over Λ [r, 1] of every matrix that may be sharded."""
    values, lora_E = _held(values, lora_E)
    parts = values.split([of_one.shape[0] for of_one in lora_E])
    torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage] - the only call for many tensors
        lora_E, [part.view_as(to).to(to) for part, to in zip(parts, lora_E, strict=True)]
    )


def _held(of_triplets: Tensor, lora_E: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Both, as far as this process holds them."""
    shards = shards_of(lora_E)
    if shards is None:
        return of_triplets, lora_E
    parts = zip(of_triplets.split([values.shape[0] for values in lora_E]), range(len(lora_E)), strict=True)
    return torch.cat([part[slice(*shards.rows(i))] for part, i in parts]), shards.held(lora_E)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite, in all processes where the tensors are sharded; waits for the device."""
    shards = shards_of(tensors)
    if shards is not None:
        tensors = shards.held(tensors)
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    return finite if shards is None else bool(shards.all_of(torch.tensor(finite, device=tensors[0].device)))


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same, in whole where they are sharded, for something that every process computes alike: of its
    gradient each keeps the rows that it holds.
    """
    shards = shards_of(tensors)
    return list(tensors) if shards is None else gather_whole(shards, tensors)


def refuse_emptied(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters that others have taken the data out of.

    Raises:
        ValueError: they belong to DeepSpeed's ZeRO-3 or to FullyShardedDataParallel.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "DeepSpeed ZeRO-3 leaves parameters without data between their uses, so their triplets "
                "cannot be scored; use DistributedDataParallel or fully_shard (FSDP2)"
            )
        if parameter.dim() == 1:
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens parameters, so that triplets are cut in pieces; "
                "use fully_shard (FSDP2) or DistributedDataParallel"
            )
