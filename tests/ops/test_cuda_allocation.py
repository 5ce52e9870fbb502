"""The CUDA sources compile for every GPU they are for, without spills; on a GPU, they equal the reference."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from adalora_fast.ops import allocate_, apply_mask_, select_triplets
from adalora_fast.ops.allocation import reference
from adalora_fast.ops.dispatch import backend, native

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_compiles_without_spills(architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    include = Path(torch.__file__).parent / "include"
    if not include.is_dir():
        pytest.skip("this PyTorch comes without headers")
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC", "-Werror=all-warnings", "-Xptxas=-v", "-DUSE_CUDA"]
    done = subprocess.run(
        [nvcc, *flags, f"-arch={architecture}", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem",
         str(include), "-c", str(ROOT / "csrc/cuda/allocation.cu"), "-o", str(tmp_path / "allocation.o")],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '\w*?\d+([a-z_]+_kernel)", done.stderr)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert sorted(kernels) == ["allocate_kernel", "allocate_kernel", "apply_mask_kernel"]
    assert spills == [("0", "0")] * 3
    assert max(registers) <= 64, "a block of 1024 threads does not fit"


@pytest.fixture
def cuda():
    reason = native.cuda_refusal("cuda") if torch.cuda.is_available() else "there is no GPU"
    if reason is not None:
        pytest.skip(reason)
    assert backend.choose("allocation", "cuda").backend == "cuda"
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 33, 1152, 65536])
@pytest.mark.parametrize("values", [1, 5, 10**6])
def test_selection_on_a_gpu(cuda, dtype, count, values):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(-values, values, (count,), generator=generator).to(dtype)
    scores[:: max(count // 7, 2)] = float("nan")
    for budget in {0, 1, count // 3, count - 1, count, count + 1}:
        kept = select_triplets(scores.to(cuda), torch.tensor(budget, device=cuda))
        assert torch.equal(kept.cpu(), reference.select(scores, torch.tensor(budget)))


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 72, 256, 257, 600])
def test_allocation_on_a_gpu_waits_for_nothing(cuda, layers):
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    ranks = [(16, 4, 0, 33)[k % 4] for k in range(layers)]
    plain = [torch.full((r, 1), 3.0, dtype=dtypes[k % 4]) for k, r in enumerate(ranks)]
    ours = [values.to(cuda) for values in plain]
    scores = torch.randn(sum(ranks), generator=torch.Generator().manual_seed(layers))
    expected = reference.select(scores, torch.tensor(sum(ranks) // 3))
    on_gpu = scores.to(cuda), torch.tensor(sum(ranks) // 3, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = allocate_(*on_gpu, ours)
        for values in ours:
            values.add_(1)
        apply_mask_(mask, ours)  # the frozen mask, once more
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference.apply_mask_(expected, plain)
    assert torch.equal(mask.cpu(), expected)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.cpu(), torch.where(b != 0, b + 1, b))
    _, kept = torch.ops.adalora_fast_C.allocation_allocate_(*on_gpu, ours)
    assert kept.tolist() == [int(part.sum()) for part in expected.split(ranks)]
