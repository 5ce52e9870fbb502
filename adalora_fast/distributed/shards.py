"""Parameters that are sharded over processes: who holds which rows, and what has to be put together of them.

``fully_shard`` cuts every parameter along its first dimension, so that a process holds some of the rows of Q
[r, in] and Λ [r, 1] (some triplets) and of P [out, r] (some entries of every triplet). Statistics are kept
for what is held; the triplets' sums are added up over the processes before anything is selected::

    S_i = s(λ_i) + 1/d1 Σ_j s(P_ji) + 1/d2 Σ_j s(Q_ij)        each term where its entries are held

The regulariser needs whole factors: they are gathered with one collective, every process computes the same R,
and the gradient's own rows go back to the shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_fast.ops.importance import SIGNALS, ScoreRule, layout_of, reference

# Gradients may be missing, parameters are not.
AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | None)


def is_running() -> bool:
    """Whether processes were told of each other."""
    return dist.is_available() and dist.is_initialized()


def shards_of(tensors: Sequence[Tensor]) -> "Shards | None":
    """How ``tensors`` are sharded; None if no one is.

    Raises:
        ValueError: not along the first dimension, or not all over the same processes.
    """
    if not is_running():
        return None
    from torch.distributed.tensor import DTensor

    sharded = [isinstance(tensor, DTensor) for tensor in tensors]
    if not any(sharded):
        return None
    cut_ones = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    first = cut_ones[0]
    mesh, placements = first.device_mesh, first.placements
    cut = [dimension for dimension, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) > 1 or any(not placements[dimension].is_shard(0) for dimension in cut):
        raise ValueError(
            f"an adapter factor is placed as {placements}; only fully_shard's sharding along dimension 0 is "
            "known: leave adapters out of tensor parallelism"
        )
    for tensor in cut_ones:
        if tensor.device_mesh != mesh or tensor.placements != placements:
            raise ValueError(
                f"adapter factors are sharded in two ways, {placements} over {mesh} and {tensor.placements} "
                f"over {tensor.device_mesh}; give every fully_shard the same mesh"
            )
    group = mesh.get_group(cut[0]) if cut else None
    return Shards(
        group=group,
        rank=dist.get_rank(group) if cut else 0,
        size=dist.get_world_size(group) if cut else 1,
        shapes=tuple((tensor.shape[0], tensor.shape[1]) for tensor in tensors),
        sharded=tuple(sharded),
    )


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Which rows of some tensors this process and the others hold.

    Args:
        group: the processes that hold the rows of one tensor between them.
        rank, size: this process in the group, and how many are in it.
        shapes: the whole tensors' shapes.
        sharded: which tensors are cut; of the others every process holds all.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    shapes: tuple[tuple[int, int], ...]
    sharded: tuple[bool, ...]

    def rows(self, i: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of tensor i's rows in a process (None: this one), as ``torch.chunk`` cuts them."""
        count, rank = self.shapes[i][0], self.rank if rank is None else rank
        if not self.sharded[i]:
            return 0, count
        share = -(-count // self.size)
        return min(rank * share, count), min((rank + 1) * share, count)

    def held(self, tensors: Sequence[AnyTensor]) -> list[AnyTensor]:
        """The parts of ``tensors`` that this process holds; they share memory with them.

        Raises:
            ValueError: they are others than expected.
        """
        parts = [
            tensor.to_local() if tensor is not None and cut else tensor  # pyright: ignore[reportAttributeAccessIssue] - a DTensor
            for tensor, cut in zip(tensors, self.sharded, strict=True)
        ]
        for i, part in enumerate(parts):
            start, stop = self.rows(i)
            if part is not None and part.shape[0] != stop - start:
                raise ValueError(
                    f"process {self.rank} of {self.size} holds {part.shape[0]} rows of a factor "
                    f"{self.shapes[i]}, {stop - start} were expected; shard it with fully_shard"
                )
        return parts  # pyright: ignore[reportReturnType] - None only where it was given

    def all_of(self, flag: Tensor) -> Tensor:
        """Whether the bool scalar holds in every process."""
        if self.size == 1:
            return flag
        everywhere = flag.to(torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, self.group)
        return everywhere.bool()

    def gather(self, flat: Tensor, sizes: list[int]) -> list[Tensor]:
        """Every process's ``flat`` [..., its size], in the order of ranks."""
        longest = max(sizes)
        padded = flat.new_zeros(*flat.shape[:-1], longest)
        padded[..., : flat.shape[-1]] = flat
        found = padded.new_empty(self.size, *padded.shape)
        if self.size == 1:
            found.copy_(padded)
        else:
            dist.all_gather_into_tensor(found.flatten(), padded.flatten(), self.group)
        return [part[..., :size] for part, size in zip(found.unbind(), sizes, strict=True)]

    def _shapes_in(self, rank: int) -> list[tuple[int, int]]:
        starts_stops = (self.rows(i, rank) for i in range(len(self.shapes)))
        return [
            (stop - start, shape[1]) for (start, stop), shape in zip(starts_stops, self.shapes, strict=True)
        ]

    @cached_property
    def _sizes(self) -> list[int]:
        return [sum(rows * columns for rows, columns in self._shapes_in(rank)) for rank in range(self.size)]

    def whole(self, parts: list[Tensor]) -> list[Tensor]:
        """The whole tensors of which every process gives its ``parts``; one collective."""
        kind = parts[0].dtype
        for part in parts:
            kind = torch.promote_types(kind, part.dtype)
        flat = torch.cat([part.to(kind).flatten() for part in parts])
        pieces = [
            [piece.view(shape) for piece, shape in zip(found.split([a * b for a, b in shapes]), shapes)]
            for rank, found in enumerate(self.gather(flat, self._sizes))
            for shapes in [self._shapes_in(rank)]
        ]
        return [
            torch.cat(of_one).to(part.dtype) if cut else part.clone()
            for *of_one, part, cut in zip(*pieces, parts, self.sharded, strict=True)
        ]


def gather_whole(shards: Shards, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The whole tensors, for something that every process computes alike; differentiable."""
    return list(_Gather.apply(shards, *shards.held(tensors)))


class _Gather(torch.autograd.Function):
    """Backward: of the whole gradient, which all processes have, the rows that are held here."""

    @staticmethod
    def forward(ctx, shards: Shards, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.shards = shards
        return tuple(shards.whole(list(parts)))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        held = (
            None if grad is None else grad[slice(*ctx.shards.rows(i))].contiguous()
            for i, grad in enumerate(grads)
        )
        return None, *held


def finite(parts: list[Tensor], grads: list[Tensor | None], score: str, dtype: torch.dtype) -> Tensor:
    """Bool scalar: every signal of these parts is finite, by the importance op's own measure."""
    return reference.signals(layout_of(parts, score), parts, grads, SIGNALS[score], dtype)[1]


def triplet_scores(shards: Shards, parts: list[Tensor], statistics: Tensor, rule: ScoreRule):
    """S of every triplet [T] from the statistics of all processes; the same in all of them."""
    ranks = [shape[0] for shape in shards.shapes[1::3]]
    starts = [sum(ranks[:k]) for k in range(len(ranks))]
    scores = torch.zeros(sum(ranks), dtype=statistics.dtype, device=statistics.device)
    for group in layout_of(parts, rule.score).groups:
        rows = {name: group.view(statistics[row]) for row, name in enumerate(rule.statistics)}
        entries = reference.element_scores(rows, rule)  # [n, rows held, columns]
        sums = entries.sum(1 if group.kind == "lora_B" else 2)  # [n, triplets]
        for i, of_one in zip(group.members, sums.unbind(), strict=True):
            if not shards.sharded[i] and shards.rank > 0:
                continue  # the first process counts what everybody holds
            first, count = shards.rows(i)[0], shards.shapes[i][1]
            if group.kind == "lora_B":
                first, count = 0, shards.shapes[i][0]
            begin = starts[i // 3] + first
            scores[begin : begin + len(of_one)].add_(of_one, alpha=1 / count)
    if shards.size > 1:
        dist.all_reduce(scores, group=shards.group)
    return scores


def whole_statistics(shards: Shards, statistics: Tensor, score: str) -> Tensor:
    """The statistics of the whole parameters, from those of all processes' parts; one collective."""
    layouts = [_layout(shards._shapes_in(rank), score) for rank in range(shards.size)]
    layout = _layout(shards.shapes, score)
    result = statistics.new_zeros(statistics.shape[0], layout.size)
    gathered = shards.gather(statistics, [each.size for each in layouts])
    for rank in reversed(range(shards.size)):  # the first process's last: it speaks for what everybody holds
        for row, values in enumerate(gathered[rank]):
            target = _views(layout, result[row])
            for i, view in _views(layouts[rank], values.contiguous()).items():
                target[i][slice(*shards.rows(i, rank))] = view
    return result


def held_statistics(shards: Shards, statistics: Tensor, score: str) -> Tensor:
    """Of the whole parameters' statistics those of the parts that this process holds."""
    layout, own = _layout(shards.shapes, score), _layout(shards._shapes_in(shards.rank), score)
    result = statistics.new_zeros(statistics.shape[0], own.size)
    for row, values in enumerate(statistics):
        source = _views(layout, values)
        for i, view in _views(own, result[row]).items():
            view.copy_(source[i][slice(*shards.rows(i))])
    return result


def _layout(shapes, score: str) -> reference.Layout:
    return layout_of([torch.empty(shape, device="meta") for shape in shapes], score)


def _views(layout: reference.Layout, row: Tensor) -> dict[int, Tensor]:
    """Parameter → its entries in one row of a statistics buffer."""
    return {
        i: view
        for group in layout.groups
        for i, view in zip(group.members, group.view(row).unbind(), strict=True)
    }
