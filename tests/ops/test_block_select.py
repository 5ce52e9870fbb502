"""The CUDA selection (csrc/common/block_select.h), run by an emulated block, against the reference.

The emulation takes the threads in several orders and fails where a value is used before the barrier that it
needs, so that what the GPU would compute does not depend on luck.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalora_fast.ops.allocation import reference

CSRC = Path(__file__).parents[2] / "csrc"
ORDERS = {"forward": 0, "backward": 1, "scattered": 2}
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 3.4e38]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The emulated block as a library; a header that does not compile is a failure, not a skip."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    done = subprocess.run(
        [compiler, *flags, str(CSRC / "test/emulation.cpp"), "-o", str(library)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def select(emulation, scores, budget, threads=256, order="forward"):
    """The emulated block's mask, from memory that was filled with the opposite of it beforehand."""
    run = emulation.emulate_float64 if scores.dtype == torch.float64 else emulation.emulate_float32
    mask = ~reference.select(scores, torch.tensor(budget))
    arguments = (pointer(scores), scores.numel(), ctypes.c_int64(budget), pointer(mask))
    assert run(*arguments, threads, ORDERS[order]) == 0, "a race between threads"
    return mask


def check(emulation, scores, budget, **options):
    kept = select(emulation, scores, budget, **options)
    assert torch.equal(kept, reference.select(scores, torch.tensor(budget)))
    assert kept.sum() == min(max(budget, 0), scores.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [256, 1024])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 2, 31, 33, 1152, 2000])
def test_sizes_orders_and_block_sizes(emulation, count, dtype, threads, order):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=dtype)
    for budget in {-1, 0, 1, count // 2, count - 1, count, count + 1}:
        check(emulation, scores, budget, threads=threads, order=order)


@pytest.mark.parametrize("value", [0.0, -2.5, float("inf"), float("-inf"), float("nan")], ids=str)
def test_all_equal_keeps_the_first(emulation, value):
    for count in (1, 33, 700):
        for budget in {1, count // 2, count - 1}:
            check(emulation, torch.full((count,), value), budget)


@pytest.mark.parametrize("values", [2, 300])
def test_ties_at_the_largest_size(emulation, values):
    scores = torch.randint(-values, values, (65536,), generator=torch.Generator().manual_seed(0)).float()
    for budget in (1, 30_000, 65_535):
        check(emulation, scores, budget, threads=1024, order="scattered")


def test_scores_that_differ_in_one_digit_only(emulation):
    """Each of the key's bytes decides once."""
    for dtype, integer, width in ((torch.float32, torch.int32, 32), (torch.float64, torch.int64, 64)):
        for shift in range(0, width - 8, 8):
            bits = torch.randperm(256, generator=torch.Generator().manual_seed(shift))[:100].to(integer)
            base = torch.tensor(1.5, dtype=dtype).view(integer) & ~(255 << shift)
            check(emulation, (base | bits << shift).view(dtype), 37)


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(
        st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-3, 3).map(float)), max_size=300
    ),
    share=st.floats(0, 1),
    order=st.sampled_from(list(ORDERS)),
    wide=st.booleans(),
)
def test_against_sorting(emulation, scores, share, order, wide):
    scores = torch.tensor(scores, dtype=torch.float64 if wide else torch.float32)
    check(emulation, scores, round(share * scores.numel()), order=order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_of_both_signs_are_equal_and_nan_is_the_lowest(emulation, dtype):
    for values in ([-0.0, 0.0, -0.0, 1.0], [float("nan"), float("-inf"), -3e38, float("nan"), 0.0]):
        for arranged in (values, values[::-1]):
            for budget in range(1, len(values)):
                check(emulation, torch.tensor(arranged, dtype=dtype), budget)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layers", [1, 7, 72, 256])
def test_the_fused_kernel_masks_and_counts_every_layer(emulation, layers, order):
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ranks = [(4, 0, 1, 33, 16, 64)[k % 6] for k in range(layers)]
    ours = [torch.full((r, 1), float("nan") if k % 3 else 2.0, dtype=dtypes[k % 4])
            for k, r in enumerate(ranks)]  # fmt: skip
    plain = [values.clone() for values in ours]
    scores = torch.randint(0, 50, (sum(ranks),), generator=torch.Generator().manual_seed(layers)).float()
    budget = sum(ranks) // 3
    mask = torch.empty(sum(ranks), dtype=torch.bool)
    kept = (ctypes.c_int * layers)(*[-1] * layers)
    done = emulation.emulate_allocate(
        pointer(scores), ctypes.c_int64(budget), pointer(mask),
        (ctypes.c_void_p * layers)(*[values.data_ptr() for values in ours]), (ctypes.c_int * layers)(*ranks),
        (ctypes.c_int * layers)(*[values.element_size() for values in ours]), layers, kept, ORDERS[order],
    )  # fmt: skip
    assert done == 0, "a race between threads"
    expected = reference.select(scores, torch.tensor(budget))
    reference.apply_mask_(expected, plain)
    assert torch.equal(mask, expected)
    assert list(kept) == [int(part.sum()) for part in expected.split(ranks)]
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.nan_to_num(5), b.nan_to_num(5))
