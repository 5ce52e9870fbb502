"""The one place where kernels are launched: where they cannot run, watching them, late imports."""

import subprocess
import sys
import types

import pytest
import torch

from adalora_fast.ops.dispatch import backend, launch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    cached = launch.is_interpreted, launch._cuda_refusal
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def interpret(monkeypatch, value: bool) -> None:
    monkeypatch.setattr(launch, "is_interpreted", lambda: value)


@pytest.mark.parametrize("device_type", ["meta", "mps", "xpu", "nowhere"])
def test_other_devices_are_refused_by_name(device_type):
    assert launch.refusal(device_type) == f"Triton kernels run on cuda, not on {device_type}"


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_without_triton_nothing_runs(monkeypatch, device_type):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert launch.refusal(device_type) == "triton is not installed; pip install triton"
    assert not launch.is_interpreted()


def test_a_cpu_runs_them_in_the_interpreter_where_it_is_asked_to(monkeypatch):
    interpret(monkeypatch, True)
    assert "ADALORA_FAST_BACKEND=triton asks for it" in launch.refusal("cpu")
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert "ADALORA_FAST_BACKEND=triton asks for it" in launch.refusal("cpu")
    monkeypatch.setenv(backend.VARIABLE, " Triton ")
    assert launch.refusal("cpu") is None


def test_a_cpu_does_not_run_compiled_kernels(monkeypatch):
    interpret(monkeypatch, False)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert "TRITON_INTERPRET=1" in launch.refusal("cpu")


def fake_gpus(monkeypatch, *capabilities: tuple[int, int], available: bool = True) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


@pytest.mark.parametrize("capabilities", [[(8, 0)], [(9, 0)], [(8, 9), (12, 0)]], ids=str)
def test_new_gpus_run_them(monkeypatch, capabilities):
    fake_gpus(monkeypatch, *capabilities)
    assert launch.refusal("cuda") is None


@pytest.mark.parametrize("capabilities", [[(7, 5)], [(9, 0), (7, 0)]], ids=str)
def test_one_old_gpu_is_enough_to_refuse(monkeypatch, capabilities):
    fake_gpus(monkeypatch, *capabilities)
    oldest = min(capabilities)
    assert launch.refusal("cuda").endswith(f"8.0 or newer, a GPU here has {oldest[0]}.{oldest[1]}")


def test_no_gpu_is_refused(monkeypatch):
    fake_gpus(monkeypatch, available=False)
    assert launch.refusal("cuda") == "no CUDA device is visible"


def test_a_pytorch_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert launch.refusal("cuda") == "this PyTorch is built without CUDA"


def test_reasons_are_one_line():
    for device_type in ("cpu", "cuda", "meta"):
        reason = launch.refusal(device_type)
        assert reason is None or (reason and "\n" not in reason)


class Kernel:
    """Remembers how it was launched."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **meta: self.calls.append((grid, arguments, meta))


def test_a_launch_runs_the_kernel():
    kernel = Kernel()
    launch.launch(kernel, (2, 3), "a", 1, BLOCK=16)
    assert kernel.calls == [((2, 3), ("a", 1), {"BLOCK": 16})]


def test_observed_launches_do_not_run():
    kernel, seen = Kernel(), []
    with launch.observed(lambda *call: seen.append(call)):
        launch.launch(kernel, (2,), "a", BLOCK=16)
    assert seen == [(kernel, (2,), ("a",), {"BLOCK": 16})] and kernel.calls == []


def test_observers_nest_and_are_forgotten_after_errors():
    kernel, outer, inner = Kernel(), [], []
    with launch.observed(lambda *call: outer.append(call)):
        with pytest.raises(RuntimeError, match="inside"), launch.observed(lambda *call: inner.append(call)):
            launch.launch(kernel, (1,))
            raise RuntimeError("inside")
        launch.launch(kernel, (2,))
    launch.launch(kernel, (3,))
    assert [call[1] for call in inner] == [(1,)]
    assert [call[1] for call in outer] == [(2,)]
    assert [call[0] for call in kernel.calls] == [(3,)]


def test_a_lazy_module_is_imported_when_it_is_used(monkeypatch):
    module = types.ModuleType("adalora_fast_lazy")
    module.answer = 42
    lazy = launch.LazyModule("adalora_fast_lazy")
    with pytest.raises(ModuleNotFoundError):
        lazy.answer  # noqa: B018
    monkeypatch.setitem(sys.modules, "adalora_fast_lazy", module)
    assert lazy.answer == 42
    with pytest.raises(AttributeError):
        lazy.question  # noqa: B018
    monkeypatch.delitem(sys.modules, "adalora_fast_lazy")
    assert lazy.answer == 42, "what was found stays"


def test_importing_the_package_does_not_import_the_kernels():
    code = "import sys, adalora_fast.ops; sys.exit('adalora_fast.ops.adapter.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
