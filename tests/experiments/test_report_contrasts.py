"""Contrasts of whole sweeps with known answers, and reading their folders."""

import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import stats

from adalora_fast.experiments.metrics import METRICS
from adalora_fast.experiments.metrics.bootstrap import draw_counts
from adalora_fast.experiments.report import write_report
from adalora_fast.experiments.report.contrasts import AVERAGE, Measured, best_of, compare_all, family
from adalora_fast.experiments.report.replicates import task_replicates
from adalora_fast.experiments.report.sweep import read_sweep
from tests.experiments.sweeps import agreeing, write_json, write_plan, write_run, write_sweep

SEEDS = [0, 1, 2]


def planted(folder, **options):
    """sensitivity, a twin of it, and an arm that is 6 points worse."""
    rates = {"sensitivity": 0.86, "twin": 0.86, "worse": 0.80}
    return write_sweep(folder, rates, tasks=["mrpc", "rte"], seeds=SEEDS, **options)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    sweep = read_sweep(planted(tmp_path_factory.mktemp("planted")))
    return sweep, compare_all(sweep, 1000)


@pytest.mark.parametrize("task", ["mrpc", "rte", AVERAGE])
def test_a_planted_difference_is_found(compared, task):
    contrast = compared[1].between(task, "worse", "sensitivity")
    e = contrast.estimate
    assert e.bounds.low < e.value < e.bounds.high < 0 and e.excludes_zero
    assert e.value == pytest.approx(-6, abs=1.5)
    assert contrast.verdict == "differs" and contrast.holm_p < 0.05 and contrast.seeds == 3


@pytest.mark.parametrize("task", ["mrpc", "rte", AVERAGE])
def test_identical_arms_are_equivalent(compared, task):
    contrast = compared[1].between(task, "twin", "sensitivity")
    assert contrast.estimate.value == contrast.estimate.bounds.low == contrast.estimate.bounds.high == 0
    assert contrast.estimate.bounds.p == 1 and contrast.verdict == "equivalent within ±0.3"


def test_a_contrast_the_other_way_round(compared):
    _, contrasts = compared
    one, other = (contrasts.between("mrpc", *pair) for pair in (("worse", "twin"), ("twin", "worse")))
    assert (one.a, one.b, other.a, other.b) == ("worse", "twin", "twin", "worse")
    assert one.estimate == -other.estimate and one.estimate.bounds.low == -other.estimate.bounds.high
    assert one.holm_p == other.holm_p


def test_holm_is_over_the_pairs_of_one_task(compared):
    for task in ("mrpc", "rte", AVERAGE):
        found = compared[1].of(task)
        assert len(found) == 3
        least = min(found, key=lambda contrast: contrast.estimate.bounds.p)
        assert least.holm_p == pytest.approx(3 * least.estimate.bounds.p)


def test_the_best_and_ties(compared):
    _, contrasts = compared
    means = {"sensitivity": 86.0, "twin": 86.0, "worse": 80.0}
    assert best_of(contrasts, "mrpc", means) == ["sensitivity", "twin"]
    assert best_of(contrasts, "mrpc", {name: means[name] for name in ("twin", "worse")}) == ["twin"]
    assert best_of(contrasts, "mrpc", {}) == []


def literal(sweep, task, arm, replicates):
    """An arm's mean in each replicate with explicit resamples, metric by metric; seeds drawn as the module
    draws them.
    """
    counts = {}
    splits = list(sweep.task_runs(task)[0].result["metrics"])
    for split in splits:
        size = len(load_file(sweep.task_runs(task)[0].folder / "predictions.safetensors")[_any(task, split)])
        generator = np.random.Generator(np.random.PCG64([0, zlib.crc32(f"{task}/{split}".encode())]))
        counts[split] = draw_counts(size, replicates, generator)
    seeds = np.random.Generator(np.random.PCG64([0, zlib.crc32(task.encode())]))
    drawn = seeds.integers(0, len(SEEDS), size=(replicates, len(SEEDS)))
    metric, means = sweep.primary_metric(task), []
    for b in range(replicates):
        own = []
        for place in drawn[b]:
            tensors = load_file(sweep.runs[task, arm, SEEDS[place]].folder / "predictions.safetensors")
            parts = []
            for split in splits:
                rows = np.repeat(np.arange(counts[split].shape[1]), counts[split][b])
                if task.startswith("squad"):
                    parts.append(tensors[f"{split}/{metric}"][rows].astype(float).mean())
                else:
                    labels, predictions = tensors[f"{split}/labels"], tensors[f"{split}/predictions"]
                    parts.append(METRICS[metric](labels[rows], predictions[rows]))
            own.append(100 * np.mean(parts))
        means.append(np.mean(own))
    return np.array(means)


def _any(task, split):
    return f"{split}/f1" if task.startswith("squad") else f"{split}/labels"


def noisy(generator, labels, arm, seed):
    """For any kind of label: the truth with noise that depends on arm and seed."""
    own = np.random.default_rng([seed, len(arm), 9])
    if labels.dtype.kind == "i":
        return np.where(own.random(len(labels)) < 0.2, 1 - labels, labels)
    return np.clip(np.round(labels + own.normal(size=len(labels)) / 3, 1), 0, 1)


@pytest.mark.parametrize("task", ["mrpc", "cola", "stsb", "mnli", "squad"])
def test_the_bootstrap_against_a_loop(tmp_path, task):
    """Every kind of metric, two splits, per-question scores: the quantiles are those of a literal loop."""
    write_plan(tmp_path, tasks=[task], arms=["sensitivity", "fisher"], seeds=SEEDS)
    for arm in ("sensitivity", "fisher"):
        for seed in SEEDS:
            write_run(tmp_path, task, arm, seed, noisy, rows=60)
    sweep = read_sweep(tmp_path)
    contrasts = compare_all(sweep, 25)
    assert contrasts.remarks == ()
    estimate = contrasts.between(task, "fisher", "sensitivity").estimate
    found = estimate.bootstrap
    resampled = {arm: literal(sweep, task, arm, 25) for arm in ("fisher", "sensitivity")}
    expected = resampled["fisher"] - resampled["sensitivity"]
    for arm, own in resampled.items():
        assert contrasts.intervals[task, arm] == pytest.approx(np.quantile(own, [0.025, 0.975]), abs=1e-8)
    assert (found.low, found.low90, found.high90, found.high) == pytest.approx(
        np.quantile(expected, [0.025, 0.05, 0.95, 0.975]), abs=1e-8
    )
    tail = min((expected <= 1e-9).sum(), (expected >= -1e-9).sum())
    assert found.p == min(1, 2 * (tail + 1) / 26)
    means = [np.mean([sweep.runs[task, arm, s].points for s in SEEDS]) for arm in ("fisher", "sensitivity")]
    assert estimate.value == pytest.approx(means[0] - means[1])
    runs = [[sweep.runs[task, arm, s].points for s in SEEDS] for arm in ("fisher", "sensitivity")]
    assert stats.ttest_rel(*runs).pvalue < estimate.student.p < 1  # the examples' chance is in it, too


def test_a_pair_whose_seeds_agree_is_not_taken_for_surer_than_its_family():
    seeds = {
        ("a", "b"): np.array([1.0, 1.0, 1.01]),
        ("a", "c"): np.array([2.0, 0.0, 1.0]),
        ("b", "c"): np.array([1.0, -1.0, -0.01]),
    }
    measured = {
        pair: Measured(seeds=own, replicates=np.full(9999, own.mean()), examples=0.01)
        for pair, own in seeds.items()
    }
    found = {(each.b, each.a): each for each in family("mrpc", measured, 0.3)}
    assert found["a", "b"].estimate.bootstrap.p < 0.001 and found["a", "b"].estimate.student.p > 0.05
    assert found["a", "b"].verdict == "not decided"
    (alone,) = family("mrpc", {("a", "b"): measured["a", "b"]}, 0.3)
    assert alone.verdict == "differs"  # of two arms there is no other spread


def test_one_common_seed_decides_nothing_also_where_other_pairs_have_more():
    measured = {
        ("a", "b"): Measured(seeds=np.array([0.1, -0.1]), replicates=np.zeros(9999), examples=0.01),
        ("a", "c"): Measured(seeds=np.array([9.0]), replicates=np.full(9999, 9.0), examples=0.01),
    }
    found = {(each.b, each.a): each for each in family("mrpc", measured, 0.3)}
    assert found["a", "c"].verdict == "not decided" and not found["a", "c"].estimate.excludes_zero


def test_the_spread_of_a_pair_that_is_wider_than_the_others(compared):
    sweep, contrasts = compared
    points = {
        arm: np.array([sweep.runs["mrpc", arm, s].points for s in SEEDS]) for arm in ("sensitivity", "worse")
    }
    own = np.var(points["worse"] - points["sensitivity"], ddof=1)
    pooled = 2 * own / 3  # twin is sensitivity again, so two pairs are this one and the third has no spread
    assert max(own, pooled) == own
    found = contrasts.between("mrpc", "worse", "sensitivity").estimate
    half = found.student.high - found.value
    error = (own / 3 + measured_examples(sweep)) ** 0.5
    dof = error**4 * 4 / (own / 3) ** 2  # three arms and three seeds: 2 x 2
    assert half == pytest.approx(stats.t.ppf(0.975, dof) * error)


def measured_examples(sweep):
    """Of worse - sensitivity on MRPC: the variance over resamples of the mean over seeds."""
    values = task_replicates(sweep, "mrpc", 1000).values
    differences = [values["worse", s] - values["sensitivity", s] for s in SEEDS]
    return np.var(np.mean(differences, axis=0), ddof=1)


def test_only_seeds_that_both_arms_have_enter(tmp_path):
    write_plan(tmp_path, tasks=["mrpc", "rte"], arms=["sensitivity", "fisher", "gsnr"], seeds=SEEDS)
    rates = {"sensitivity": 0.8, "fisher": 0.8, "gsnr": 0.8}
    for task, arm, seed in ((t, a, s) for t in ("mrpc", "rte") for a in rates for s in SEEDS):
        if (task, arm, seed) not in (("mrpc", "fisher", 1), ("mrpc", "gsnr", 0), ("mrpc", "gsnr", 2)):
            write_run(tmp_path, task, arm, seed, agreeing(rates))
    contrasts = compare_all(read_sweep(tmp_path), 50)
    assert contrasts.between("mrpc", "fisher", "sensitivity").seeds == 2
    assert contrasts.between("mrpc", "gsnr", "sensitivity").seeds == 1
    assert contrasts.between("mrpc", "gsnr", "fisher") is None
    assert contrasts.between("rte", "gsnr", "fisher").seeds == 3
    assert contrasts.of(AVERAGE) == []  # one arm only is complete everywhere


def test_an_interval_is_of_the_runs_that_the_mean_is_of(tmp_path):
    """Not of an arm of which a run has no predictions; of one without a run, of those that there are."""
    write_plan(tmp_path, tasks=["rte"], arms=["sensitivity", "fisher", "gsnr"], seeds=SEEDS)
    rates = dict.fromkeys(("sensitivity", "fisher", "gsnr"), 0.8)
    for arm, seed in ((a, s) for a in rates for s in SEEDS if (a, s) != ("gsnr", 2)):
        write_run(tmp_path, "rte", arm, seed, agreeing(rates), predictions=(arm, seed) != ("fisher", 1))
    sweep = read_sweep(tmp_path)
    found = compare_all(sweep, 200).intervals
    assert found.keys() == {("rte", "sensitivity"), ("rte", "gsnr")}
    for (_, arm), (low, high) in found.items():
        points = [run.points for run in sweep.of("rte", arm).values()]
        assert low < np.mean(points) < high and high - low > 2  # 400 examples: ± 4 points


def test_replicates_are_computed_once(tmp_path, monkeypatch):
    seen = []

    def counted(sweep, task, *arguments):
        seen.append(task)
        return task_replicates(sweep, task, *arguments)

    figures = dict.fromkeys(("contrasts", "curves", "ranks", "agreement"), ())
    monkeypatch.setattr("adalora_fast.experiments.report.write.draw_figures", lambda *_: (figures, []))
    monkeypatch.setattr("adalora_fast.experiments.report.contrasts.task_replicates", counted)
    write_report(planted(tmp_path, rows=50), replicates=50)
    assert seen == ["mrpc", "rte"]


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    sweep = read_sweep(planted(tmp_path, rows=50))
    whole = task_replicates(sweep, "mrpc", 30).values
    monkeypatch.setattr("adalora_fast.experiments.report.replicates.BLOCK", 50 * 7)
    for key, values in task_replicates(sweep, "mrpc", 30).values.items():
        assert np.array_equal(values, whole[key])


def test_a_run_without_predictions_is_said_to_be_left_out(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["sensitivity", "fisher"], seeds=[0])
    rates = {"sensitivity": 0.8, "fisher": 0.8}
    write_run(tmp_path, "mrpc", "sensitivity", 0, agreeing(rates))
    write_run(tmp_path, "mrpc", "fisher", 0, agreeing(rates), predictions=False)
    contrasts = compare_all(read_sweep(tmp_path), 10)
    assert contrasts.all == ()
    assert contrasts.remarks == ("mrpc fisher seed 0 has no predictions: it enters no contrast",)
    assert contrasts.intervals.keys() == {("mrpc", "sensitivity")}


def test_predictions_that_contradict_the_result_are_told(tmp_path):
    folder = planted(tmp_path, rows=50) / "mrpc" / "twin-seed1"
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"primary": result["primary"] - 0.1})
    (remark,) = compare_all(read_sweep(tmp_path), 10).remarks
    assert remark.startswith("mrpc twin seed 1: its predictions give ") and "result.json says" in remark


def test_a_run_that_learned_nothing_is_told(tmp_path):
    write_plan(tmp_path, tasks=["rte"], arms=["sensitivity", "lora"], seeds=[0])
    write_run(tmp_path, "rte", "sensitivity", 0, agreeing({"sensitivity": 0.8}))
    write_run(tmp_path, "rte", "lora", 0, lambda generator, labels, arm, seed: np.ones_like(labels))
    contrasts = compare_all(read_sweep(tmp_path), 10)
    assert contrasts.remarks == ("rte lora seed 0 predicts the same for every example of validation",)


def break_predictions(folder, how):
    path = folder / "predictions.safetensors"
    tensors = load_file(path)
    if how == "other rows":
        tensors = {name: values[:-1].copy() for name, values in tensors.items()}
    elif how == "other labels":
        tensors["validation/labels"] = 1 - tensors["validation/labels"]
    elif how == "no split":
        tensors = {name.replace("validation", "test"): values for name, values in tensors.items()}
    elif how == "not finite":
        tensors["validation/predictions"] = np.full(len(tensors["validation/labels"]), np.nan)
    elif how == "two columns":
        tensors["validation/predictions"] = np.zeros((len(tensors["validation/labels"]), 2))
    save_file(tensors, path)
    if how == "garbage":
        path.write_bytes(b"not tensors at all")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("other rows", "were not evaluated on the same rows of validation; evaluate both on one file"),
        ("other labels", "were not evaluated on the same rows of validation; evaluate both on one file"),
        ("no split", "has no labels and predictions of validation; delete"),
        ("not finite", "a value of validation is not finite"),
        ("two columns", r"has predictions of shape \(50, 2\); one per row is needed"),
        ("garbage", "is not readable safetensors"),
    ],
)
def test_predictions_that_cannot_be_used(tmp_path, how, words):
    break_predictions(planted(tmp_path, rows=50) / "mrpc" / "twin-seed1", how)
    with pytest.raises(ValueError, match=words) as error:
        compare_all(read_sweep(tmp_path), 10)
    assert "\n" not in str(error.value) and "twin-seed1" in str(error.value)


# --- reading the folder


def test_why_a_run_is_missing(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["a", "b", "c", "d"], seeds=[0])
    write_run(tmp_path, "mrpc", "a", 0, agreeing({"a": 0.8}))
    write_run(tmp_path, "mrpc", "z", 7, agreeing({"z": 0.8}))
    write_json(tmp_path / "mrpc" / "b-seed0.failed.json", {"error": "ValueError: it\n diverged"})
    (tmp_path / "mrpc" / ".c-seed0.partial").mkdir()
    sweep = read_sweep(tmp_path)
    assert [(entry.arm, entry.state) for entry in sweep.missing] == [
        ("b", "failed"),
        ("c", "unfinished"),
        ("d", "not started"),
    ]
    assert sweep.missing[0].reason == "ValueError: it diverged"
    assert sweep.unplanned == ("mrpc/z-seed7",)
    assert sweep.is_whole("mrpc", "a") and not sweep.is_whole("mrpc", "b") and sweep.whole_arms() == ("a",)


def test_a_run_that_failed_and_then_worked_is_complete(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["a"], seeds=[0])
    write_run(tmp_path, "mrpc", "a", 0, agreeing({"a": 0.8}))
    write_json(tmp_path / "mrpc" / "a-seed0.failed.json", {"error": "earlier"})
    assert read_sweep(tmp_path).missing == ()


def change(folder, name, **changes):
    content = json.loads((folder / name).read_text())
    write_json(folder / name, content | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, r"plan.json: tasks is \[\], not a list of str"),
        ({"seeds": ["0"]}, r"plan.json: seeds is \['0'\], not a list of int"),
        ({"seeds": [True]}, "not a list of int"),
        ({"arms": ["a", "a"]}, "arms names something twice"),
        ({"model": None}, "has no name and model"),
        ({"equivalence_margin": -1}, "equivalence_margin is -1; give points above 0"),
    ],
)
def test_a_plan_that_is_none(tmp_path, changes, words):
    write_plan(tmp_path, **({"tasks": ["mrpc"], "arms": ["a"], "seeds": [0]} | changes))
    with pytest.raises(ValueError, match=words):
        read_sweep(tmp_path)


def test_no_plan(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no plan.json in .*; give the output folder of a sweep"):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("plan.json", "{", "plan.json is not readable JSON"),
        ("plan.json", "[]", "plan.json holds a list, not an object"),
        ("mrpc/a-seed0/result.json", "\x00", "result.json is not readable JSON"),
        ("mrpc/a-seed0/result.json", "{}", "result.json has no 'task': it is no result of a run"),
        ("mrpc/a-seed0/config.json", "7", "config.json holds a int, not an object"),
        ("mrpc/b-seed0.failed.json", "oops", "failed.json is not readable JSON"),
        ("tuned.json", "[1]", "tuned.json holds a list"),
    ],
)
def test_foreign_files_are_named_in_one_line(tmp_path, name, content, words):
    write_plan(tmp_path, tasks=["mrpc"], arms=["a", "b"], seeds=[0])
    write_run(tmp_path, "mrpc", "a", 0, agreeing({"a": 0.8}))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_sweep(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 5}, "is of mrpc a seed 5, which its folder does not say"),
        ({"primary": 81.2}, "primary is 81.2, not a fraction"),
        ({"primary": float("nan")}, "primary is nan, not a fraction"),
        ({"primary_metric": "f1"}, "has runs compared by accuracy and by f1"),
    ],
)
def test_results_that_do_not_fit(tmp_path, changes, words):
    write_sweep(tmp_path, {"a": 0.8, "b": 0.8}, tasks=["mrpc"], seeds=[0])
    change(tmp_path / "mrpc" / "a-seed0", "result.json", **changes)
    with pytest.raises(ValueError, match=words):
        read_sweep(tmp_path)
