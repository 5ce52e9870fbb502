"""A sweep on a Ray cluster: one run per GPU, or per processor where there is none."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from .plan import Planned

BUSY_SECONDS = 5


def on_cluster(
    runs: list[Planned],
    address: str,
    console: Console,
    *,
    record: Callable[[Planned, BaseException], None],
) -> None:
    """Every run as a task of the cluster at `address` ("local" starts one here, "auto" finds a running one).

    The folder of the sweep must be the same on all its machines. A run whose worker dies (out of memory,
    machine gone) is started again there twice, and resumes. Errors go to `record`, and the others go on.

    Raises:
        ValueError: Ray is not installed, or the address does not answer.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--ray needs Ray; install it with: pip install 'adalora_fast[cluster]'") from None
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(
                address=None if address == "local" else address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise ValueError(
                f"no Ray cluster answers at {address!r} ({' '.join(str(error).split())[:120]}); "
                "start one with `ray start --head`, or give --ray local"
            ) from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(run_remotely)
        submit = partial(remote.remote, command=sys.argv)
        began = time.monotonic()
        waiting = {submit(asdict(run.settings), str(run.path)): run for run in runs}
        while waiting:
            finished, _ = ray.wait(list(waiting), num_returns=1)
            run = waiting.pop(finished[0])
            try:
                line = ray.get(finished[0])
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, BlockingIOError):  # another sweep is at work on it
                    time.sleep(BUSY_SECONDS)
                    waiting[submit(asdict(run.settings), str(run.path))] = run
                    continue
                record(run, cause)
                line = f"{run.name}: failed: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
            else:
                run.failure.unlink(missing_ok=True)
            done = len(runs) - len(waiting)
            left = str(timedelta(seconds=round((time.monotonic() - began) / done * len(waiting))))
            console.print(f"[{done}/{len(runs)}, {left} left] {line}", highlight=False, markup=False)
    finally:
        if started:
            ray.shutdown()


def run_remotely(settings: dict[str, Any], path: str, command: list[str]) -> str:
    """In a worker: one run, and the line that says how it went. `command` is what the user typed."""
    import torch

    from adalora_fast.experiments.run.progress import TrainingProgress
    from adalora_fast.experiments.run.single import start_run
    from adalora_fast.experiments.settings.recipes import Recipe
    from adalora_fast.experiments.settings.settings import RunSettings

    sys.argv = command  # what config.json shows
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # one run per processor
    asked = RunSettings(**{**settings, "recipe": Recipe(**settings["recipe"])})
    with TrainingProgress(console=Console(quiet=True)) as progress:
        result = start_run(asked, Path(path), progress)
    outcome = f"{result['primary_metric']} {result['primary']:.3f}, {result['seconds']:.0f} s"
    return f"{asked.task}/{asked.label} seed {asked.seed}: {outcome}"
