"""Who keeps which triplets: scores and their statistics, the budget, the mask, and the state of it all."""

from .allocator import RankAllocator
from .capture import CapturableRankAllocator
from .join import JoinableAllocator
from .scores import Score, register_score

__all__ = ["CapturableRankAllocator", "JoinableAllocator", "RankAllocator", "Score", "register_score"]
