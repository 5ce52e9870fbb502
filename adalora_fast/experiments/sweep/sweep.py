"""A sweep: every run of a recipe's grid (task × arm × seed) in one folder, planned before anything runs.

    OUT/plan.json                                what was decided beforehand
    OUT/<task>/<arm>-seed<seed>/                 one run each
    OUT/<task>/<arm>-seed<seed>.failed.json      the error of one that failed
    OUT/tuning/<task>/<arm>-lr<rate>-seed<seed>/ OUT/tuned.json    with --tune

The same command goes on where it was interrupted. Started several times, on machines that share the folder,
the processes share the runs: each takes those that nobody is at work on.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from adalora_fast.environment import write_json
from adalora_fast.experiments.models.packages import resolve_model
from adalora_fast.experiments.run.folder import alone_in
from adalora_fast.experiments.run.progress import TrainingProgress
from adalora_fast.experiments.run.single import start_run
from adalora_fast.experiments.settings.files import read_object

from .plan import Plan, Planned, write_plan

WAIT_SECONDS = 5


def run_sweep(plan: Plan, output: Path, console: Console, *, ray: str | None = None) -> int:
    """Do what is left of the sweep; the number of runs that failed, or had no learning rate to begin with."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a sweep is not for torchrun; start its command several times, or give --ray, and each process "
            "takes runs of its own"
        )
    output = output.expanduser().absolute()
    check_plan(plan, output, console)
    write_plan(plan, output)
    failed = 0
    rates = None
    if plan.tuning is not None:
        runs = plan.tuning_runs(output)
        failed += carry_out(runs, console, ray=ray, title="tuning")
        places = {
            (
                run.settings.task,
                run.settings.arm,
                run.settings.recipe.learning_rate,
                run.settings.seed,
            ): run.path
            for run in runs
        }
        with alone_in(output):
            rates, without = plan.tuning.choose(output, places, plan.tasks, plan.arms)
        for reason in without:
            console.print(f"failed: {reason}", highlight=False, markup=False, soft_wrap=True)
        failed += len(without) * len(plan.seeds)
    failed += carry_out(plan.runs(output, rates), console, ray=ray, title="sweep")
    return failed


def check_plan(plan: Plan, output: Path, console: Console) -> None:
    """Whatever would fail in every run, or in every run of an arm, shows before the first one."""
    resolve_model(plan.model)
    planned = [*plan.tuning_runs(output), *plan.runs(output)]
    left = [run.settings for run in planned if not (run.path / "result.json").is_file()]
    if left:
        console.print("checking the model, the data and the arms", highlight=False)
    from .preflight import check_runs

    check_runs(left, output)


def carry_out(runs: list[Planned], console: Console, *, ray: str | None = None, title: str = "sweep") -> int:
    """Run what is not complete yet; the number of failures, each of which is written beside its run."""
    began = time.time()
    left = [run for run in runs if not run.is_settled]
    done = len(runs) - len(left)
    console.print(f"{title}: {len(runs)} runs, {done} of them complete already", highlight=False)
    if not left:
        return 0
    if ray is not None:
        from .cluster import on_cluster

        on_cluster(left, ray, console, record=record_failure)
    else:
        with TrainingProgress(runs=len(left), console=console) as progress:
            one_by_one(left, lambda run: start_run(run.settings, run.path, progress), progress, began)
    failures = [run for run in left if not run.is_settled]
    for run in failures:
        reason = read_object(run.failure).get("error") if run.failure.is_file() else "not finished"
        console.print(f"failed: {run.name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    return len(failures)


def one_by_one(
    runs: list[Planned], start: Callable[[Planned], Any], progress: TrainingProgress, began: float
) -> None:
    """In this process. Runs that another process is at work on are come back to."""
    while runs:
        busy = []
        for run in runs:
            if run.folder.is_complete or _failed_since(run, began):
                progress.finish_run(f"{run.name}: done by another process")
                continue
            try:
                with recording_failure(run):
                    start(run)
            except BlockingIOError:
                busy.append(run)
            except Exception as error:  # recorded: the sweep goes on
                progress.finish_run(f"{run.name}: failed: {one_line(error)}")
        if busy and len(busy) == len(runs):
            time.sleep(WAIT_SECONDS)
        runs = busy


def _failed_since(run: Planned, began: float) -> bool:
    try:
        return run.failure.stat().st_mtime >= began
    except FileNotFoundError:
        return False


@contextmanager
def recording_failure(run: Planned) -> Iterator[None]:
    """Write down the error of a run that fails, and pass it on; a run that works leaves no such note."""
    try:
        yield
    except BlockingIOError:
        raise
    except Exception as error:
        record_failure(run, error)
        raise
    run.failure.unlink(missing_ok=True)


def record_failure(run: Planned, error: BaseException) -> None:
    """<run>.failed.json; where even that cannot be written (a full disk), the error stands alone."""
    try:
        run.failure.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            run.failure,
            {
                "error": one_line(error),
                "traceback": "".join(traceback.format_exception(error)),
                "settings": asdict(run.settings),
            },
        )
    except OSError:
        pass


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
