"""A CUDA graph's stand-in on a CPU: the operations of one call, recorded, and done again without its Python.

As in a graph, whatever the host decided while recording stays decided, tensors that existed before are read
and written where they are, and those that were made are made anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Tape(TorchDispatchMode):
    """``Tape(run)`` runs it once; :meth:`replay` repeats its operations."""

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__()
        self.operations = []
        with self:
            run()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        self.operations.append((function, arguments, options, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Every operation again, in order, on the tensors that now stand for those of the recording."""
        made: dict[int, Tensor] = {}
        for function, arguments, options, recorded in self.operations:
            now = tree_map_only(Tensor, lambda t: made.get(id(t), t), (arguments, options))
            result = function(*now[0], **now[1])
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new
