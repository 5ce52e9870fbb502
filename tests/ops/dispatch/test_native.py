"""The optional extension: its operators' schemas, and what happens where it is missing or broken."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adalora_fast.ops import importance_update_, select_triplets
from adalora_fast.ops.dispatch import backend, native
from adalora_fast.ops.importance import ScoreRule
from adalora_fast.ops.importance.native import SCORE_NUMBERS, SMOOTHING_NUMBERS, places_of
from tests.helpers.scoring import SCORES, SMOOTHINGS, make_buffers, make_parameters

ROOT = Path(__file__).parents[3]
NATIVE_OPS = {
    "adapter_right_factor_gradients_",
    "importance_update_",
    "importance_scores",
    "allocation_select",
    "allocation_apply_mask_",
    "allocation_allocate_",
}


@pytest.fixture
def fresh(monkeypatch):
    """Choices and reasons are made anew, in the test and after it."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    caches = (native.refusal, backend.choose, backend.kernel)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def built():
    reason = native.refusal("_C")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("op", ["importance", "allocation"])
def test_the_cpu_uses_it_where_it_is_built(built, fresh, op):
    assert backend.choose(op, "cpu").backend == "cpu"
    assert backend.choose(op, "cuda").reasons["cpu"] == "the C++ kernels do not run on cuda"


def test_without_it_the_reference_runs_and_says_why(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    for op in ("importance", "allocation"):
        choice = backend.choose(op, "cpu")
        assert choice.backend == "reference"
        assert "_C is not built; install a C++ compiler" in choice.reasons["cpu"]
    assert select_triplets(torch.tensor([1.0, 3.0]), torch.tensor(1)).tolist() == [False, True]
    parameters = make_parameters()
    statistics, updates = make_buffers(parameters, "fisher", "ema")
    importance_update_(parameters, parameters, statistics, updates, ScoreRule("fisher", "ema"))
    assert (statistics > 0).all()
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    backend.choose.cache_clear()
    with pytest.raises(ValueError, match=r"cpu cannot run allocation on cpu: .* is not built.*; use auto"):
        backend.choose("allocation", "cpu")


def test_a_library_that_does_not_load_is_a_reason(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    reason = native.refusal("_C")
    assert reason.startswith("the extension _C.abi3.so does not load: ") and "\n" not in reason
    assert backend.choose("importance", "cpu").backend == "reference"


def test_the_cuda_part_is_not_loaded_without_cuda(fresh):
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is built with CUDA")
    assert native.refusal("_C_cuda") == "this PyTorch is built without CUDA"


def test_scores_and_smoothings_are_numbered_as_in_the_header():
    header = (ROOT / "csrc/cpu/importance.h").read_text()
    for name, numbers in (("Score", SCORE_NUMBERS), ("Smoothing", SMOOTHING_NUMBERS)):
        names = re.search(rf"enum class {name} {{ (.*) }};", header).group(1).split(", ")
        assert {entry: number for number, entry in enumerate(names)} == numbers
    assert set(SCORE_NUMBERS) == set(SCORES) and set(SMOOTHING_NUMBERS) == set(SMOOTHINGS)


@pytest.mark.parametrize("score", SCORES)
def test_schemas(built, score):
    """What the schemas say is written is written, and nothing else; no tracer sees them, so no fake."""
    ops = torch.ops.adalora_fast_C
    parameters = make_parameters(dtype=torch.float32)
    grads = [None if i == 2 else p.flip(0).clone() for i, p in enumerate(parameters)]
    statistics, updates = make_buffers(parameters, score, "ema", torch.float32)
    numbers = places_of(parameters, score), SCORE_NUMBERS[score], SMOOTHING_NUMBERS["ema"]
    lambdas = [torch.randn(3, 1), torch.randn(2, 1)]
    for op, arguments in (
        (ops.adapter_right_factor_gradients_, [torch.randn(s) for s in ((3, 5), (3, 5), (3, 1))]),
        (ops.importance_update_, (parameters, grads, statistics, updates, *numbers, 0.9, 0.9)),
        (ops.importance_scores, (statistics + 1, *numbers)),
        (ops.allocation_select, (torch.randn(8), torch.tensor(3))),
        (ops.allocation_apply_mask_, (torch.rand(5) > 0.5, lambdas)),
        (ops.allocation_allocate_, (torch.randn(5), torch.tensor(3), lambdas)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema",))


def test_every_native_operator_is_checked_here(built):
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("adalora_fast_C::")}  # fmt: skip
    assert registered == NATIVE_OPS


def build(tmp_path, before=lambda: None, **environment):
    """Run setup.py in a copy of what it needs, after ``before``."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "adalora_fast").mkdir()
    (tmp_path / "adalora_fast" / "__init__.py").write_text('__version__ = "0"\n')
    before()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ADALORA_FAST_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tmp_path, env=kept | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_installing_without_a_compiler_succeeds_and_says_so(tmp_path):
    done = build(tmp_path, PATH="", CXX="")
    assert done.returncode == 0, done.stderr
    assert "adalora_fast._C was not built: there is no C++ compiler" in done.stderr
    assert not list((tmp_path / "adalora_fast").glob("*.so"))


def test_a_compiler_that_fails_is_no_failure_either(tmp_path):
    done = build(tmp_path, CXX=shutil.which("false"))
    assert done.returncode == 0, done.stderr
    assert "adalora_fast._C was not built: " in done.stderr and "works without it" in done.stderr


def failing_compiler(folder: Path) -> str:
    path = folder / "c++"
    path.write_text(
        "#!/bin/sh\necho 'In file included from a.h' >&2\necho 'a.cpp:3: error: no such macro' >&2\nexit 4\n"
    )
    path.chmod(0o755)
    return str(path)


def test_a_build_that_failed_leaves_its_reason_and_no_older_library(fresh, monkeypatch, tmp_path):
    """pip hides what a successful installation prints; the report of the package is where a user looks."""
    compiler = failing_compiler(tmp_path)
    package = tmp_path / "adalora_fast"

    def leave_a_library() -> None:
        (package / "_C.abi3.so").write_bytes(b"of older sources")

    done = build(tmp_path, leave_a_library, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert not list(package.glob("_C.*so"))
    monkeypatch.setattr(native, "PACKAGE", package)
    reason = f"{compiler} ended with 4: a.cpp:3: error: no such macro"
    expected = f"the extension adalora_fast._C is not built: {reason} (docs/native.md)"
    assert native.refusal("_C") == expected
    assert backend.choose("importance", "cpu").reasons["cpu"] == expected


# Macros that the stable ABI of PyTorch 2.10 has. A newer one would compile with the PyTorch that is developed
# with, and leave the library out everywhere else.
KNOWN_MACROS = {
    "STABLE_TORCH_LIBRARY",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_CUDA_KERNEL_LAUNCH_CHECK",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}


def test_the_sources_use_macros_of_the_oldest_pytorch_only():
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*.*")]
    used = {name for text in sources for name in re.findall(r"\b(?:STABLE|STD|TORCH)_[A-Z_]+\b", text)}
    assert used == KNOWN_MACROS


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ADALORA_FAST_STRICT_BUILD": "1", "PATH": "", "CXX": ""}, "_C was not built: there is no C++"),
        ({"ADALORA_FAST_BUILD_CUDA": "yes"}, "ADALORA_FAST_BUILD_CUDA='yes' is neither 0 nor 1"),
        ({"ADALORA_FAST_BUILD_CUDA": "1", "PATH": ""}, "there is no nvcc in PATH or CUDA_HOME"),
    ],
)
def test_a_build_that_was_insisted_on_fails_in_one_line(tmp_path, environment, said):
    done = build(tmp_path, **{"CUDA_HOME": ""} | environment)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr
