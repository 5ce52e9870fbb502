"""Reading and writing entries of tensors that a kernel knows by address and type code only.

Imported by kernel modules alone: it needs Triton. The codes are ``tables.TYPE_CODES``.
"""

import triton
import triton.language as tl


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # in bytes; said before the cast it would be forgotten
    return pointer


@triton.jit
def load_entries(address, code, offsets, inside, ALIGNED: tl.constexpr):
    """The entries at ``offsets`` of the tensor at ``address`` as float32, 0 outside.

    A code is the same for the whole program, so that only one branch runs. ALIGNED: the launcher checked that
    the address allows 16-byte access.
    """
    if code == 0:
        entries = tl.load(_pointer(address, tl.float32, ALIGNED) + offsets, mask=inside, other=0.0)
    elif code == 1:
        entries = tl.load(_pointer(address, tl.float16, ALIGNED) + offsets, mask=inside, other=0.0).to(
            tl.float32
        )
    else:
        entries = tl.load(_pointer(address, tl.bfloat16, ALIGNED) + offsets, mask=inside, other=0.0).to(
            tl.float32
        )
    return entries


@triton.jit
def store_entries(address, code, offsets, entries, inside, ALIGNED: tl.constexpr):
    """Write float32 ``entries`` to the tensor at ``address`` in its own type."""
    if code == 0:
        tl.store(_pointer(address, tl.float32, ALIGNED) + offsets, entries, mask=inside)
    elif code == 1:
        tl.store(_pointer(address, tl.float16, ALIGNED) + offsets, entries.to(tl.float16), mask=inside)
    else:
        tl.store(_pointer(address, tl.bfloat16, ALIGNED) + offsets, entries.to(tl.bfloat16), mask=inside)
