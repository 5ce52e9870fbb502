"""The place under which `JoinableAllocator` was first documented (docs/distributed.md); it stays."""

from adalora_fast.allocator.join import JoinableAllocator

__all__ = ["JoinableAllocator"]
