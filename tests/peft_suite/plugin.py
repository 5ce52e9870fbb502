"""A pytest plugin for PEFT's own tests: those that concern AdaLoRA, offline, plain or on fused models.

``-p tests.peft_suite.plugin --adalora plain`` runs them as they are, ``--adalora fused`` with every AdaLoRA
model fused as soon as it is made. How each test ended goes into the file named by ``--outcomes`` (compare.py
judges it); with ``--before`` (the file of a plain run) only those that passed or failed there are run.
"""

import importlib.machinery
import inspect
import json
import sys
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from types import ModuleType

import peft
import pytest
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.mixed import MixedModel

from adalora_fast import fuse
from adalora_fast.integrations.fused import FusedAdaLoraModel, is_fused
from adalora_fast.integrations.layers import FusedSVDLinear, adapter_layers, fuse_layer
from tests.peft_suite.differences import DIFFERENCES

OFFLINE = (  # what a test that needs a hub ends with, where there is none
    "OfflineModeIsEnabled",
    "LocalEntryNotFoundError",
    "couldn't connect to",
    "Couldn't reach",
    "is not a local folder and is not a valid model identifier",
)


class Tally:
    """How every test ended by id, and how many models and layers it made that were fused."""

    def __init__(self) -> None:
        self.ends: dict[str, str] = {}
        self.fused: dict[str, int] = {}
        self.made = 0  # since the present test began

    def note(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        end = "offline" if report.failed and "offline" in properties else report.outcome
        if hasattr(report, "wasxfail") and report.skipped:
            end = "differs"
        if report.when == "call" or end != "passed":
            self.ends[report.nodeid] = end
        if report.when == "call":
            self.fused[report.nodeid] = properties["fused"]


TALLY = Tally()  # of this process: the one that distributes the tests hears of every report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adalora")
    group.addoption("--adalora", choices=("plain", "fused"), default="plain")
    group.addoption("--outcomes", type=Path)
    group.addoption("--before", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{mark}: PEFT's")
    _stand_in("diffusers", "StableDiffusionPipeline")
    if config.getoption("adalora") == "fused":
        _fuse_everything()


def _stand_in(name: str, *classes: str) -> None:
    """An importable module for one that tests of other methods need and these only name."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for cls in classes:
        setattr(module, cls, type(cls, (), {}))
    sys.modules.setdefault(name, module)


def _fuse_everything() -> None:
    """Whatever way the tests make an AdaLoRA model, it comes out fused."""
    peft.get_peft_model = _fusing(peft.get_peft_model)
    peft.inject_adapter_in_model = _fusing(peft.inject_adapter_in_model)
    PeftModel.from_pretrained = classmethod(_fusing(PeftModel.from_pretrained.__func__))
    create = MixedModel._create_and_replace

    def create_fused(self, config, adapter_name, target, target_name, parent, *args, **kwargs):
        create(self, config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        if isinstance(layer, AdaLoraLayer):
            TALLY.made += fuse_layer(layer, "default", None) is None

    MixedModel._create_and_replace = create_fused


def _fusing(make):
    @wraps(make)
    def made(*args, **kwargs):
        model = make(*args, **kwargs)
        if isinstance(model, PeftModel):
            if type(model.base_model) is AdaLoraModel and not is_fused(model):
                fuse(model)
        else:  # injected, without a tuner: only its layers
            for layer in adapter_layers(model).values():
                fuse_layer(layer, "default", None)
        TALLY.made += sum(isinstance(m, (FusedSVDLinear, FusedAdaLoraModel)) for m in model.modules())
        return model

    return made


def concerns_adalora(item: pytest.Function) -> bool:
    """Whether the id or an argument of a test is AdaLoRA, or the code of one that has no arguments."""
    if "adalora" in item.nodeid.lower():
        return True
    call = getattr(item, "callspec", None)
    if call is None:
        return "AdaLora" in inspect.getsource(item.function)
    return any(map(_is_adalora, _flat(call.params.values())))


def _is_adalora(value: object) -> bool:
    return isinstance(value, AdaLoraConfig) or (isinstance(value, type) and issubclass(value, AdaLoraConfig))


def _flat(values) -> Iterator[object]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    chosen = [item for item in items if concerns_adalora(item)]
    before = config.getoption("before")
    if before is not None:
        ends = json.loads(before.read_text())["ends"]
        chosen = [item for item in chosen if ends.get(item.nodeid) not in ("offline", "skipped")]
    if config.getoption("adalora") == "fused":
        for item in chosen:
            if item.nodeid in DIFFERENCES:
                item.add_marker(pytest.mark.xfail(reason=DIFFERENCES[item.nodeid], strict=False))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
    for name, module in list(sys.modules.items()):
        if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Seen()


class _Seen(dict):
    """PEFT's note of the models that were fetched already: all of them, so that no test goes online."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if call.when == "setup":
        TALLY.made = 0
    if call.when == "call":
        report.user_properties.append(("fused", TALLY.made))
    if report.failed and any(sign in str(call.excinfo.getrepr(chain=True)) for sign in OFFLINE):
        report.user_properties.append(("offline", True))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    TALLY.note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("outcomes")
    if path is not None and not hasattr(session.config, "workerinput"):
        path.write_text(json.dumps({"ends": TALLY.ends, "fused": TALLY.fused}, indent=1, sort_keys=True))
