"""Sweeps on Ray: a cluster of two worker processes, started here."""

import json

import pytest

from adalora_fast.experiments.settings.files import read_json
from adalora_fast.experiments.sweep import sweep
from adalora_fast.experiments.sweep.plan import make_plan
from adalora_fast.experiments.sweep.sweep import run_sweep
from tests.experiments.sweep.test_sweep import DEFAULTS, GRID
from tests.helpers.tiny import printed, quiet_console

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'adalora_fast[cluster]'")


@pytest.fixture
def two_workers(monkeypatch):
    """A cluster of two processors on this machine."""
    monkeypatch.undo()  # its processes speak to each other
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False,
             object_store_memory=80 * 2**20)  # fmt: skip
    yield
    ray.shutdown()


def test_runs_are_spread_and_a_failure_is_recorded(two_workers, tmp_path, encoder, data_dir):
    """Two runs, and one that cannot work in a worker; the same folder as without a cluster."""
    recipe = tmp_path / "mine.json"
    grid = GRID | {"arms": ["fisher", "lora"], "seeds": [0]}
    recipe.write_text(json.dumps({"defaults": DEFAULTS, "grid": grid}))
    plan = make_plan(recipe=str(recipe), model=str(encoder), data_dir=data_dir)
    runs = plan.runs(tmp_path / "out")
    blocked = runs[1].path.with_name(f".{runs[1].path.name}.partial")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be")
    console = quiet_console()
    assert run_sweep(plan, tmp_path / "out", console, ray="auto") == 1
    result = read_json(runs[0].path / "result.json")
    assert result["arm"] == "fisher" and result["total_rank"] == 24
    failure = read_json(runs[1].failure)
    assert "cannot write to" in failure["error"] or "File exists" in failure["error"], failure["error"]
    assert f"failed: {runs[1].name}" in printed(console) and "sst2/fisher seed 0: accuracy" in printed(
        console
    )
    blocked.unlink()
    assert run_sweep(plan, tmp_path / "out", console, ray="auto") == 0
    assert not runs[1].failure.exists() and (runs[1].path / "result.json").is_file()


def test_no_cluster_answers(tmp_path, encoder, data_dir, monkeypatch):
    def refuse(**options):
        raise ConnectionError("Could not find\nany running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    runs = [sweep.Planned(settings=None, path=tmp_path / "run")]
    from adalora_fast.experiments.sweep.cluster import on_cluster

    with pytest.raises(
        ValueError, match=r"no Ray cluster answers at 'auto' \(Could not find any running Ray"
    ):
        on_cluster(runs, "auto", quiet_console(), record=lambda *both: None)
