"""A whole training step: how long the host and the device take for it, and the same step as one CUDA graph.

    python -m benchmarks.whole_step --output FILE [--graph] [--rounds 16] [--tiny]

Contestants: the frozen model with its head in training, PEFT's LoRA, PEFT's AdaLoRA, and adalora_fast;
forward, backward, clipping, AdamW and, where there is one, the allocator, which prunes at every step.
Without ``--graph``: host time, time of the step, peak memory, and the host's time by part. With it:
forward, backward, clipping and AdamW are captured once and replayed, and the allocator's step stays eager,
after the replay. No profiler runs in this process. FILE is written after every contestant. ``--tiny`` runs
on any device, with sizes that mean nothing.

Nothing is timed that computes something else: three steps of a tiny model have PEFT's losses, and replayed
steps have the losses of eager ones.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adalora_fast.environment import environment, write_json
from benchmarks.measure import reason
from benchmarks.suites import models
from benchmarks.suites.inference import keep_positions
from benchmarks.turns import take_turns

NAMES = ("frozen", "peft lora", "peft", "adalora_fast")
BASELINE = "frozen"
WARM_UP = 4
COMPARED = 3  # replayed steps whose losses must be those of eager ones
Step = Callable[[], object]


def setting_for(device: torch.device, tiny: bool) -> models.Setting:
    if tiny:
        return models.Setting(
            model="tiny deberta", batch=2, length=8, dtype=torch.float32, device=device
        ).tiny()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return models.Setting(model="deberta-v3-base", batch=32, length=128, dtype=dtype, device=device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _spread(milliseconds: list[float]) -> dict[str, float]:
    if len(milliseconds) < 2:
        return {"median": milliseconds[0]}
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return {"median": statistics.median(milliseconds), "p20": cuts[0], "p80": cuts[-1]}


# Eager


def make(name: str, setting: models.Setting) -> tuple[models.Training, dict]:
    """A contestant after its first steps, and what they show: loss, seconds until then, peak memory.

    Raises:
        AssertionError: it computes something else.
    """
    models.check_losses(name, setting)
    cuda, began = setting.device.type == "cuda", time.perf_counter()
    before = torch.cuda.memory_allocated() if cuda else 0
    training = models.TRAINERS[name](setting)
    for _ in range(WARM_UP):
        loss = training()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        loss = training()
        _finish(setting.device)
    models.check_finite(name, loss)
    found = {"loss": float(loss), "seconds until ready": time.perf_counter() - began}
    if cuda:  # what the others hold was there before
        found["peak bytes of a step"] = torch.cuda.max_memory_allocated() - before
    return training, found


def time_steps(trainings: dict[str, models.Training], device: torch.device, rounds: int) -> dict[str, dict]:
    """Milliseconds of the host and of the whole step, contestants in turns."""
    host: dict[str, list[float]] = {name: [] for name in trainings}

    def timed(name: str) -> Step:
        def step() -> None:
            began = time.perf_counter()
            trainings[name]()
            host[name].append(1e3 * (time.perf_counter() - began))

        return step

    times = take_turns({name: timed(name) for name in trainings}, rounds)
    found = {}
    for name, whole in times.items():
        found[name] = {"host ms": _spread(host[name][-len(whole) :]), "step ms": _spread(whole)}
        if BASELINE in times:
            pairs = zip(whole, times[BASELINE], strict=True)
            found[name]["relative to frozen"] = statistics.median(own / base for own, base in pairs)
    return found


def host_by_part(training: models.Training, device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of the host in each part of a step; the device is waited for between steps."""
    parts: dict[str, list[float]] = {}
    for _ in range(rounds):
        _finish(device)
        last = time.perf_counter()

        def mark(part: str) -> None:
            nonlocal last
            now = time.perf_counter()
            parts.setdefault(part, []).append(1e3 * (now - last))
            last = now

        training(mark)
    _finish(device)
    return {part: statistics.median(times) for part, times in parts.items()}


def eager(setting: models.Setting, rounds: int, save: Callable[[dict], None]) -> dict[str, dict]:
    """Figures of all contestants; ``save`` gets what is known after each."""
    found: dict[str, dict] = {}
    trainings: dict[str, models.Training] = {}
    for name in NAMES:
        try:
            trainings[name], found[name] = make(name, setting)
        except Exception as error:  # one contestant must not end the others' run
            found[name] = {"missing": reason(error)}
        save(found)
    for name, figures in time_steps(trainings, setting.device, rounds).items():
        found[name] |= figures
    save(found)
    for name, training in trainings.items():
        found[name]["host ms by part"] = host_by_part(training, setting.device, max(2, rounds // 2))
        save(found)
    return found


# One graph


def on_cuda(step: Callable[[], Tensor]) -> tuple[Step, Tensor]:
    """The step captured as a CUDA graph: its replay, and the loss that a replay writes.

    Raises:
        RuntimeError: there is no CUDA device, or a graph cannot contain the step.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs a CUDA device; none is visible")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph.replay, loss


class Graphed:
    """A contestant whose forward, backward, clipping and AdamW are one graph after the first eager steps.

    Args:
        capture: makes the graph of a step; None: the step stays eager.
    """

    def __init__(self, name: str, setting: models.Setting, capture: Callable | None) -> None:
        self.training = training = models.TRAINERS[name](setting)
        keep_positions(training.model)
        cuda = setting.device.type == "cuda"
        options = {"fused": True, "capturable": True} if cuda else {}
        training.optimizer = torch.optim.AdamW(training.trained, lr=1e-3, **options)
        self.allocate = _allocator_of(training)
        for parameter in training.trained:  # a graph adds to the same gradients at every replay
            parameter.grad = torch.zeros_like(parameter)
        stream = torch.cuda.Stream() if cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # compiles kernels, makes the optimizer's state; None: no other stream
            for _ in range(WARM_UP):
                self._part()
                self._allocate()
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        self.loss: Tensor | None = None
        self.replay: Step = self._eager
        if capture is not None:
            self.replay, self.loss = capture(self._part)

    def _part(self) -> Tensor:
        torch._foreach_zero_([parameter.grad for parameter in self.training.trained])
        loss = self.training.loss()
        loss.backward()
        self.training.update()
        return loss.detach()

    def _eager(self) -> None:
        self.loss = self._part()

    def _allocate(self) -> None:
        if self.allocate is not None:
            self.allocate(next(self.training.numbers))

    def __call__(self) -> Tensor:
        self.replay()
        self._allocate()
        return self.loss


def _allocator_of(training: models.Training) -> Callable[[int], None] | None:
    """The allocator's step. A fused model's own entry looks whether the host stepped the optimizer, where a
    replay leaves no trace.
    """
    tuner = getattr(training.model, "base_model", None)
    step = getattr(getattr(tuner, "rankallocator", None), "step", None)
    return step if step is not None else training.allocate


def check_graph(name: str, setting: models.Setting, capture: Callable) -> None:
    """Fail unless replayed steps of a tiny model have the losses of eager ones.

    Raises:
        AssertionError: a loss is another one.
    """
    tiny = setting.tiny()
    replayed, plain = Graphed(name, tiny, capture), Graphed(name, tiny, None)
    for step in range(COMPARED):
        found, expected = float(replayed()), float(plain())
        close = abs(found - expected) <= models.TOLERANCE * abs(expected)
        assert close, f"{name}: the loss of replayed step {step} is {found:.6g}, eager it is {expected:.6g}"


def graphs(
    setting: models.Setting, rounds: int, save: Callable[[dict], None], capture: Callable = on_cuda
) -> dict[str, dict]:
    """Milliseconds of a replay, and of a replay and the allocator's step, of every contestant."""
    found: dict[str, dict] = {}
    for name in NAMES:
        try:
            check_graph(name, setting, capture)
            graphed = Graphed(name, setting, capture)
            figures = {"replay ms": _spread(take_turns({"replay": graphed.replay}, rounds)["replay"])}
            if graphed.allocate is not None:
                figures["replay and allocator ms"] = _spread(take_turns({"all": graphed}, rounds)["all"])
            models.check_finite(name, graphed())
            found[name] = figures
            del graphed
        except Exception as error:
            found[name] = {"missing": reason(error)}
        save(found)
    return found


# The command


def _line(name: str, found: dict) -> str:
    if "missing" in found:
        return f"{name:14s} missing: {found['missing']}"
    words = []
    for what, value in found.items():
        if isinstance(value, dict) and "median" in value:
            words.append(f"{what} {value['median']:.2f}")
        elif isinstance(value, dict):
            words.append(f"{what} ({', '.join(f'{part} {ms:.2f}' for part, ms in value.items())})")
        elif what.startswith("peak"):
            words.append(f"peak {value / 2**20:.0f} MiB")
        elif what == "relative to frozen":
            words.append(f"{value:.2f} x frozen")
    return f"{name:14s} {'; '.join(words)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the file of figures")
    parser.add_argument("--graph", action="store_true", help="the step as one CUDA graph")
    parser.add_argument("--rounds", type=int, default=16, help="timed steps of each (default 16)")
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing, on any device")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="(peft|transformers)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = setting_for(device, arguments.tiny)
    figures = {"benchmark": "whole_step", "graph": arguments.graph, "setting": setting.name}
    figures["environment"] = environment()

    def save(found: dict[str, dict]) -> None:
        write_json(arguments.output, {**figures, "contestants": found})

    run = graphs if arguments.graph else eager
    found = run(setting, arguments.rounds, save)
    print(f"{setting.name} on {device}, {'one graph' if arguments.graph else 'eager'}")
    for name in NAMES:
        print(_line(name, found[name]))
    without = [name for name in NAMES if "missing" in found[name]]
    needs_none = arguments.tiny and arguments.graph and device.type != "cuda"  # where it says why
    return 1 if without and not needs_none else 0


if __name__ == "__main__":
    sys.exit(main())
