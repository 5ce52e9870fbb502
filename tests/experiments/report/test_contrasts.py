"""Contrasts of whole sweeps with known answers, and reading their folders."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adalora_fast.experiments.metrics.bootstrap import draw_counts, statistic
from adalora_fast.experiments.report import write_report
from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.contrasts import AVERAGE, best_of, compare_all
from adalora_fast.experiments.report.examples import task_examples
from tests.helpers.sweeps import agreeing, write_json, write_plan, write_run, write_sweep

SEEDS = [0, 1, 2]


def planted(folder, **options):
    """sensitivity, a twin of it, and an arm that is 6 points worse."""
    rates = {"sensitivity": 0.86, "twin": 0.86, "worse": 0.80}
    return write_sweep(folder, rates, tasks=["mrpc", "rte"], seeds=SEEDS, **options)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    sweep = read_sweep(planted(tmp_path_factory.mktemp("planted")))
    return sweep, compare_all(sweep)


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
    for arms in (("worse", "twin"), ("worse", "sensitivity")):
        one, other = (contrasts.between("mrpc", *pair) for pair in (arms, arms[::-1]))
        assert (one.a, one.b, other.a, other.b) == (*arms, *arms[::-1])
        assert one.estimate == -other.estimate and one.estimate.bounds.low == -other.estimate.bounds.high
        assert one.holm_p == other.holm_p
    assert contrasts.between("mrpc", "worse", "twin").verdict == "exploratory, 95 % interval below 0"
    assert contrasts.between("mrpc", "twin", "worse").verdict == "exploratory, 95 % interval above 0"


def test_holm_is_over_the_declared_contrasts_of_one_task(compared):
    """Without a declaration: every other arm against the baseline."""
    for task in ("mrpc", "rte", AVERAGE):
        found = compared[1].of(task)
        assert [(each.a, each.b, each.is_declared) for each in found] == [
            ("twin", "sensitivity", True),
            ("worse", "sensitivity", True),
            ("worse", "twin", False),
        ]
        assert found[1].holm_p == pytest.approx(2 * found[1].estimate.bounds.p)
        assert found[2].holm_p is None and found[:2] == compared[1].declared(task)


def test_a_plan_declares_its_contrasts(tmp_path, compared):
    """As it writes them, over which alone Holm corrects; the others are exploratory, the baseline's too."""
    folder = planted(tmp_path, plan={"contrasts": [["twin", "worse"]]})
    contrasts = compare_all(read_sweep(folder))
    (own,) = contrasts.declared("mrpc")
    assert (own.a, own.b, own.verdict) == ("twin", "worse", "differs")
    assert own.holm_p == own.estimate.bounds.p
    assert own.estimate == compared[1].between("mrpc", "twin", "worse").estimate
    other = contrasts.between("mrpc", "worse", "sensitivity")
    assert other.verdict == "exploratory, 95 % interval below 0" and not other.is_declared
    assert contrasts.between("mrpc", "twin", "sensitivity").verdict == "exploratory"


def test_without_its_baseline_a_plan_is_about_its_first_arm(tmp_path):
    write_plan(tmp_path, tasks=["rte"], arms=["lora-r1", "lora-r4", "full"], seeds=[0])
    assert read_sweep(tmp_path).plan.declared == (("lora-r4", "lora-r1"), ("full", "lora-r1"))


def test_the_best_and_ties(compared):
    _, contrasts = compared
    means = {"sensitivity": 86.0, "twin": 86.0, "worse": 80.0}
    assert best_of(contrasts, "mrpc", means) == ["sensitivity", "twin"]
    assert best_of(contrasts, "mrpc", {name: means[name] for name in ("twin", "worse")}) == ["twin"]
    assert best_of(contrasts, "mrpc", {}) == []


def noisy(generator, labels, arm, seed):
    """For any kind of label: the truth with noise that depends on arm and seed."""
    own = np.random.default_rng([seed, len(arm), 9])
    if labels.dtype.kind == "i":
        return np.where(own.random(len(labels)) < 0.2, 1 - labels, labels)
    return np.clip(np.round(labels + own.normal(size=len(labels)) / 3, 1), 0, 1)


@pytest.mark.parametrize("task", ["mrpc", "cola", "stsb", "mnli", "squad"])
def test_a_contrast_from_the_files_by_hand(tmp_path, task):
    """Every kind of metric, two splits, per-question scores: the difference is that of the runs' results, and
    its chance over the examples that of the bootstrap of the mean over seeds.
    """
    write_plan(tmp_path, tasks=[task], arms=["sensitivity", "fisher"], seeds=SEEDS)
    for arm in ("sensitivity", "fisher"):
        for seed in SEEDS:
            write_run(tmp_path, task, arm, seed, noisy, rows=200)
    sweep = read_sweep(tmp_path)
    contrasts = compare_all(sweep)
    assert contrasts.remarks == ()
    found = contrasts.between(task, "fisher", "sensitivity").estimate
    means = [np.mean([sweep.runs[task, arm, s].points for s in SEEDS]) for arm in ("fisher", "sensitivity")]
    assert found.value == pytest.approx(means[0] - means[1], abs=1e-4)
    assert found.bounds.low < found.value < found.bounds.high
    assert found.spread.examples == (400 if task == "mnli" else 200) and found.spread.seeds == 3
    resampled = bootstrap_of_the_difference(sweep, task, 1500)
    examples = (found.spread.of_examples / (3 * found.spread.examples)) ** 0.5
    assert examples == pytest.approx(resampled.std(), rel=0.12)
    points = [sweep.runs[task, "fisher", s].points for s in SEEDS]
    low, high = contrasts.intervals[task, "fisher"]
    assert (low + high) / 2 == pytest.approx(np.mean(points), abs=1e-4)


def bootstrap_of_the_difference(sweep, task, replicates):
    """Mean over seeds of fisher minus sensitivity on resamples of the examples, literally."""
    generator, metric = np.random.default_rng(1), sweep.primary_metric(task)
    runs = {
        (arm, seed): load_file(sweep.runs[task, arm, seed].folder / "predictions.safetensors")
        for arm in ("fisher", "sensitivity")
        for seed in SEEDS
    }
    total = np.zeros(replicates)
    splits = list(sweep.task_runs(task)[0].result["metrics"])
    for split in splits:
        counts = draw_counts(200, replicates, generator)
        for (arm, _), tensors in runs.items():
            if task == "squad":
                labels, predictions = None, tensors[f"{split}/{metric}"].astype(float)
            else:
                labels, predictions = (tensors[f"{split}/{name}"] for name in ("labels", "predictions"))
            own = statistic("mean" if labels is None else metric)(labels, predictions, counts)
            total += (100 if arm == "fisher" else -100) * own / len(splits) / len(SEEDS)
    return total


def test_the_spread_of_another_arm_does_not_enter(tmp_path):
    """A contrast is the same whichever other arms the plan has."""
    folder = planted(tmp_path / "three", rows=100)
    alone = compare_all(read_sweep(folder)).between("mrpc", "worse", "sensitivity")
    plan = json.loads((folder / "plan.json").read_text())
    write_json(folder / "plan.json", plan | {"arms": ["sensitivity", "worse"]})
    assert compare_all(read_sweep(folder)).between("mrpc", "worse", "sensitivity").estimate == alone.estimate


def test_the_average_over_tasks(compared):
    """A seed counts with its average over the tasks, the examples are those of both."""
    sweep, contrasts = compared
    found = contrasts.between(AVERAGE, "worse", "sensitivity").estimate
    by_seed = [
        np.mean(
            [
                sweep.runs[t, "worse", s].points - sweep.runs[t, "sensitivity", s].points
                for t in ("mrpc", "rte")
            ]
        )
        for s in SEEDS
    ]
    assert found.value == pytest.approx(np.mean(by_seed), abs=1e-4)
    assert found.spread.examples == 800
    assert found.spread.of_seeds == pytest.approx(800 * np.var(by_seed, ddof=1), abs=1e-3)
    parts = [contrasts.between(task, "worse", "sensitivity").estimate.spread for task in ("mrpc", "rte")]
    own = sum(part.of_examples / (3 * part.examples) for part in parts) / 4
    assert found.spread.of_examples / (3 * 800) == pytest.approx(own, rel=0.01)


def test_one_common_seed_decides_nothing_also_where_other_pairs_have_more(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["sensitivity", "fisher", "worse"], seeds=SEEDS)
    rates = {"sensitivity": 0.86, "fisher": 0.86, "worse": 0.6}
    for arm, seed in ((a, s) for a in rates for s in SEEDS if (a, s) not in (("worse", 1), ("worse", 2))):
        write_run(tmp_path, "mrpc", arm, seed, agreeing(rates))
    contrasts = compare_all(read_sweep(tmp_path))
    found = contrasts.between("mrpc", "worse", "sensitivity")
    assert found.holm_p < 0.001 and found.verdict == "not decided" and not found.estimate.excludes_zero
    assert contrasts.between("mrpc", "worse", "fisher").verdict == "exploratory"


def test_only_seeds_that_both_arms_have_enter(tmp_path):
    write_plan(tmp_path, tasks=["mrpc", "rte"], arms=["sensitivity", "fisher", "gsnr"], seeds=SEEDS)
    rates = {"sensitivity": 0.8, "fisher": 0.8, "gsnr": 0.8}
    for task, arm, seed in ((t, a, s) for t in ("mrpc", "rte") for a in rates for s in SEEDS):
        if (task, arm, seed) not in (("mrpc", "fisher", 1), ("mrpc", "gsnr", 0), ("mrpc", "gsnr", 2)):
            write_run(tmp_path, task, arm, seed, agreeing(rates))
    contrasts = compare_all(read_sweep(tmp_path))
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
    found = compare_all(sweep).intervals
    assert found.keys() == {("rte", "sensitivity"), ("rte", "gsnr")}
    for (_, arm), (low, high) in found.items():
        points = [run.points for run in sweep.of("rte", arm).values()]
        assert low < np.mean(points) < high and high - low > 2  # 400 examples: ± 4 points


def test_examples_are_read_once(tmp_path, monkeypatch):
    seen = []

    def counted(sweep, task):
        seen.append(task)
        return task_examples(sweep, task)

    figures = dict.fromkeys(("contrasts", "curves", "ranks", "agreement"), ())
    monkeypatch.setattr("adalora_fast.experiments.report.write.draw_figures", lambda *_: (figures, []))
    monkeypatch.setattr("adalora_fast.experiments.report.contrasts.task_examples", counted)
    write_report(planted(tmp_path, rows=50))
    assert seen == ["mrpc", "rte"]


def test_a_run_without_predictions_is_said_to_be_left_out(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["sensitivity", "fisher"], seeds=[0])
    rates = {"sensitivity": 0.8, "fisher": 0.8}
    write_run(tmp_path, "mrpc", "sensitivity", 0, agreeing(rates))
    write_run(tmp_path, "mrpc", "fisher", 0, agreeing(rates), predictions=False)
    contrasts = compare_all(read_sweep(tmp_path))
    assert contrasts.all == ()
    assert contrasts.remarks == ("mrpc fisher seed 0 has no predictions: it enters no contrast",)
    assert contrasts.intervals.keys() == {("mrpc", "sensitivity")}


def test_predictions_that_contradict_the_result_are_told(tmp_path):
    folder = planted(tmp_path, rows=50) / "mrpc" / "twin-seed1"
    result = json.loads((folder / "result.json").read_text())
    write_json(folder / "result.json", result | {"primary": result["primary"] - 0.1})
    (remark,) = compare_all(read_sweep(tmp_path)).remarks
    assert remark.startswith("mrpc twin seed 1: its predictions give ") and "result.json says" in remark


def test_a_run_that_learned_nothing_is_told(tmp_path):
    write_plan(tmp_path, tasks=["rte"], arms=["sensitivity", "lora"], seeds=[0])
    write_run(tmp_path, "rte", "sensitivity", 0, agreeing({"sensitivity": 0.8}))
    write_run(tmp_path, "rte", "lora", 0, lambda generator, labels, arm, seed: np.ones_like(labels))
    contrasts = compare_all(read_sweep(tmp_path))
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
        compare_all(read_sweep(tmp_path))
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
        ({"contrasts": []}, r"plan.json: contrasts is \[\]; give a list of pairs of arms"),
        (
            {"arms": ["a", "b"], "contrasts": [["a", "c"]]},
            "the contrast a:c names c, no arm of the plan: a, b",
        ),
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
