"""The adapter's compiled kernels at real sizes: accuracy, the same bits at every run, CUDA graphs, memory."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from adalora_fast.ops import adalora_linear
from adalora_fast.ops.adapter import triton as kernels
from tests.helpers.kernel_cases import (
    DEVICE,
    FACTORS,
    HAS_GPU,
    NEEDS_GPU,
    TRAINED,
    WAYS,
    assert_same,
    exact_case,
    exact_grad,
    planned,
    random_case,
    run,
    triton_backend,
)
from tests.helpers.naive import draw_grad, formula, leaves, results, truth
from tests.helpers.tolerances import RelativeRule

pytestmark = NEEDS_GPU
SHAPES = [(768, 768), (768, 3072), (3072, 768), (3072, 3072), (4096, 4096)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = 4096


@pytest.fixture(autouse=True)
def kernels_run():
    with triton_backend():
        yield


def real_case(inner=768, out=768, r=16, dtype=torch.bfloat16, rows=ROWS, seed=0):
    return random_case((rows, inner), out, r, dtype=dtype, factor_dtype=torch.float32, seed=seed)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("inner", "out"), SHAPES)
@pytest.mark.parametrize("r", [8, 16])
def test_real_sizes(inner, out, r, dtype):
    case = real_case(inner, out, r, dtype)
    grad = draw_grad(case).to(DEVICE)
    naive, rule = leaves(case), RelativeRule(dtype)
    plain = results(formula(*naive, product_dtype=dtype), naive, grad)
    exact, got = truth(case, grad), run(adalora_linear, case, grad)
    for name in exact:
        rule.add(name, got[name], plain[name], exact[name])
    rule.check()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("r", [1, 12, 33, 64, 128])
def test_other_ranks_and_tails(r, way):
    case = random_case((1000, 773), 771, r, dtype=torch.bfloat16, factor_dtype=torch.float32)
    grad = draw_grad(case).to(DEVICE)
    naive, rule = leaves(case), RelativeRule(torch.bfloat16)
    plain, exact = results(formula(*naive, product_dtype=torch.bfloat16), naive, grad), truth(case, grad)
    with planned(way):
        got = run(adalora_linear, case, grad)
    for name in exact:
        rule.add(name, got[name], plain[name], exact[name])
    rule.check()


def other_work() -> None:
    a = torch.randn(2048, 2048, device=DEVICE)
    (a @ a).sum()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_same_bits_at_every_run(dropout_p, dtype):
    case = real_case(768, 3072, dtype=dtype)
    grad = draw_grad(case).to(DEVICE)
    found = []
    for _ in range(5):
        torch.manual_seed(0)
        found.append(run(adalora_linear, case, grad, dropout_p=dropout_p, training=True))
        other_work()
    for again in found[1:]:
        assert_same(again, found[0])


def captured(case, grad, **options):
    """(replay, y, gradients): one forward and backward as a CUDA graph."""
    ours = leaves(case)
    tensors = [getattr(ours, name) for name in TRAINED]

    def step():
        y = adalora_linear(*ours, **options)
        return y, torch.autograd.grad(y, tensors, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    return graph.replay, y, gradients


def test_a_replayed_graph_equals_the_eager_call():
    case = real_case()
    grad = draw_grad(case).to(DEVICE)
    replay, y, gradients = captured(case, grad)
    want = run(adalora_linear, case, grad)
    for _ in range(2):
        y.detach().zero_()
        replay()
        assert_same({"y": y.detach(), **dict(zip(TRAINED, gradients))}, want)


def test_every_replay_draws_a_new_mask():
    case = real_case()
    grad = draw_grad(case).to(DEVICE)
    replay, y, gradients = captured(case, grad, dropout_p=0.5, training=True)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        for _ in range(2):
            replay()
            found.append({"y": y.detach().clone(), **{n: g.clone() for n, g in zip(TRAINED, gradients)}})
    first, second, again_first, again_second = found
    assert not torch.equal(first["y"], second["y"]) and not torch.equal(first["lora_A"], second["lora_A"])
    assert_same(again_first, first)
    assert_same(again_second, second)


def test_lengths_that_change():
    """Kernels compiled for one number of rows serve the others."""
    for rows in (1, 16, 4096, 63, 1000, 4097, 2, 128):
        case = exact_case(rows, 96, 80, 8)
        grad = exact_grad(case)
        assert_same(run(adalora_linear, case, grad), truth(case, grad))


def test_exact_sums_in_bfloat16():
    case = exact_case(500, 64, 40, 3, dtype=torch.bfloat16)
    case = case._replace(x=case.x * (torch.arange(64, device=DEVICE) % 4 == 0))
    grad = exact_grad(case)
    got, exact = run(adalora_linear, case, grad), truth(case, grad)
    for name in ("y", *FACTORS):
        assert torch.equal(got[name], exact[name].to(got[name].dtype)), name


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets of rows are of 64 bits: rows at the far end of a long input come out right."""
    inner, out = 64, 1024
    rows = 2**31 // out + 1000
    needed = rows * (inner + 2 * out) * 2 * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    base = exact_case(128, inner, out, 4)
    case = base._replace(x=base.x[torch.arange(rows, device=DEVICE) % 128])
    want = truth(base, exact_grad(base))
    for way in WAYS:
        with planned(way, kernels.plans.Tile(128, 64, 32, 4, 1)):
            ours = leaves(case)
            y = adalora_linear(*ours)
            part = exact_grad(base).repeat(-(-rows // 128), 1)[:rows]
            y.backward(part)
        tail = slice(rows // 128 * 128 - 128, rows // 128 * 128)
        for got, name in ((y.detach(), "y"), (ours.x.grad, "x")):
            assert torch.equal(got[:128].double(), want[name]) and torch.equal(got[tail].double(), want[name])
        del y, part, ours
        torch.cuda.empty_cache()


SMALL_RUN = """
import torch
from tests.helpers.kernel_cases import WAYS, exact_case, exact_grad, planned, run, triton_backend
from adalora_fast.ops import adalora_linear
case = exact_case(33, 40, 17, 3)
with triton_backend():
    for way in WAYS:
        for p in (0.0, 0.5):
            with planned(way):
                run(adalora_linear, case, exact_grad(case), dropout_p=p, training=True)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU and shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """PyTorch's caching allocator would hide reads past a tensor's end."""
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    # Calls of the CUDA API that libraries let fail on purpose are none of our business.
    options = ["--error-exitcode", "9", "--report-api-errors", "no"]
    command = ["compute-sanitizer", "--tool", tool, *options, sys.executable, "-c", SMALL_RUN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
