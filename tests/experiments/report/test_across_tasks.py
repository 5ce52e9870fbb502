"""Whether an arm's ranks show the model or the task."""

import json

import pytest
from scipy.stats import spearmanr

from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.rank_maps import across_tasks
from adalora_fast.experiments.report.sections_ranks import rank_across_tasks
from tests.helpers.sweeps import agreeing, write_plan, write_run

RATES = {"fisher": 0.8, "random": 0.7}
MAPS = {"mrpc": [1, 2, 3, 4], "rte": [2, 1, 3, 4], "sst2": [4, 3, 2, 1]}


@pytest.fixture
def folder(tmp_path):
    write_plan(tmp_path, tasks=list(MAPS), arms=list(RATES), seeds=[0, 1])
    for task, ranks in MAPS.items():
        for arm in RATES:
            for seed in (0, 1):
                write_run(tmp_path, task, arm, seed, agreeing(RATES))
                own = ranks if arm == "fisher" else [2, 2, 2, 2]
                place = tmp_path / task / f"{arm}-seed{seed}" / "ranks.json"
                place.write_text(json.dumps({"init_r": 4, "ranks": dict(zip("abcd", own))}))
    return tmp_path


def test_the_mean_over_pairs_of_tasks(folder):
    sweep = read_sweep(folder)
    pairs = [("mrpc", "rte"), ("mrpc", "sst2"), ("rte", "sst2")]
    want = sum(spearmanr(MAPS[a], MAPS[b]).statistic for a, b in pairs) / 3
    assert across_tasks(sweep, "fisher") == (3, pytest.approx(want))
    assert across_tasks(sweep, "random") == (0, None)
    assert f"| fisher | 3 | {want:.2f} |" in rank_across_tasks(sweep)


def test_one_task_has_nothing_to_agree_with(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["fisher"], seeds=[0])
    write_run(tmp_path, "mrpc", "fisher", 0, agreeing(RATES))
    assert rank_across_tasks(read_sweep(tmp_path)) == ""
