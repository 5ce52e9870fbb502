"""The files of a sweep's report: what stands in them, and that nothing is dropped in silence."""

import csv
import json
import re

import numpy as np
import pytest

from adalora_fast.experiments.report import write_report
from adalora_fast.experiments.report.cells import averages
from adalora_fast.experiments.report.collect import read_sweep
from adalora_fast.experiments.report.contrasts import compare_all
from adalora_fast.experiments.report.rank_maps import agreement, rank_maps, spearman
from adalora_fast.experiments.report.sections_contrasts import (
    against_nulls,
    how_compared,
    pairwise,
    what_could_be_seen,
)
from adalora_fast.experiments.report.sections_results import beside_published, results
from adalora_fast.experiments.report.sections_run import what_was_run
from adalora_fast.experiments.report.tables import (
    as_csv,
    escape_latex,
    escape_markdown,
    latex,
    published_rows,
    result_rows,
    winners,
)
from tests.helpers.sweeps import agreeing, write_json, write_plan, write_run, write_sweep

RATES = {"sensitivity": 0.86, "fisher": 0.86, "lora": 0.8, "uniform": 0.8, "head": 0.7}
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """MRPC with a failed run, RTE on a sample, and CoLA of which only the head is done; the files by name."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    write_plan(folder, tasks=["mrpc", "rte", "cola"], arms=list(RATES), seeds=SEEDS)
    for seed in SEEDS:
        for arm in RATES:
            if (arm, seed) != ("uniform", 2):
                write_run(folder, "mrpc", arm, seed, agreeing(RATES))
            write_run(folder, "rte", arm, seed, agreeing(RATES), sample=True, rows=200)
        write_run(folder, "cola", "head", seed, agreeing(RATES))
    write_json(folder / "mrpc" / "uniform-seed2.failed.json", {"error": "ValueError: diverged | at 0.001"})
    (folder / "cola" / ".lora-seed1.partial").mkdir()
    files = write_report(folder)
    return folder, {path.name: path for path in files}


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files(reported):
    folder, files = reported
    assert next(iter(files)) == "report.md" and all(
        path.parent == folder / "report" for path in files.values()
    )
    figures = {
        "contrasts",
        "curves-mrpc",
        "curves-rte",
        "curves-cola",
        "ranks-mrpc",
        "ranks-rte",
        "agreement",
    }
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    texts = {"report.md", "results.csv", "table.csv", "contrasts.csv", "table.tex", "published.csv"}
    assert set(files) == expected | texts == {path.name for path in (folder / "report").iterdir()}
    linked = re.findall(r"\]\(([^)]+\.png)\)", files["report.md"].read_text())
    assert set(linked) == {name for name in expected if name.endswith("png")}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_same_files_give_the_same_bytes(reported):
    folder, files = reported
    before = {name: path.read_bytes() for name, path in files.items()}
    again = write_report(folder)
    assert [path.name for path in again] == list(files)
    assert {path.name: path.read_bytes() for path in again} == before


def test_what_was_run(reported):
    text = section(reported[1]["report.md"].read_text(), "What was run")
    for words in (
        "A sweep for tests.", "| model | minilm |", "MRPC, RTE*, CoLA", "| runs | 32 of 45 complete |",
        "0123456789abcdef", "A Processor, 1 thread(s)", "2026-01-02T03:04:05+00:00",
        "RTE | validation | a sample | 200",
        "| epochs | 3 | 3 | 3 |", "| learning_rate | 0.001 | 0.001 | 0.001 |",
        "\\* Trained or evaluated on a sample",
    ):  # fmt: skip
        assert words in text


def test_missing_runs_are_shown_with_their_reason(reported):
    text = section(reported[1]["report.md"].read_text(), "Missing runs and remarks")
    assert "13 planned run(s) are missing" in text
    assert "| MRPC | uniform | 2 | failed | ValueError: diverged \\| at 0.001 |" in text
    assert (
        "| CoLA | lora | 1 | unfinished |" in text and "| CoLA | fisher | 0, 1, 2 | not started | – |" in text
    )


def test_results(reported):
    text = section(reported[1]["report.md"].read_text(), "Results")
    head = text.splitlines()[1]
    assert "MRPC accuracy" in head and "RTE accuracy*" in head and "CoLA Matthews" in head
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert (
        "(2 of 3 seeds)" in lines["uniform"] and lines["sensitivity"].count("–") == 2
    )  # CoLA and the average
    assert "MRPC: sensitivity, and fisher." in text and "**" not in text  # equal arms: neither in bold
    folded = text.partition("<details>")[2].partition("</details>")[0]
    assert "with the same standard error as the contrasts below" in folded
    assert "a single seed" not in folded
    assert re.search(r"\| fisher \| (\d\d\.\d\d to \d\d\.\d\d \| ){2}– \|", folded)
    assert "average over the 3 tasks here (3 of GLUE's 8)" in head and "GLUE averages" not in text


def test_contrasts_and_nulls(reported):
    text = reported[1]["report.md"].read_text()
    contrasts = section(text, "Pairwise contrasts")
    assert "degrees of freedom" in contrasts and "**Two seeds have one degree of freedom" in contrasts
    assert (
        "The plan declares no contrasts of its own, so they are every other arm against sensitivity"
        in contrasts
    )
    declared, _, others = contrasts.partition("<summary>12 exploratory pairs</summary>")
    assert "| MRPC | head − lora | exploratory, 95 % interval below 0 | 3 |" in others
    assert "exploratory," not in declared and "head − sensitivity | differs" in declared
    seen = section(text, "What this sweep could have seen")
    assert re.search(r"\| MRPC \| 400 \| 2, 3 \| \d.* to .* \|", seen) and "CoLA" not in seen
    assert "Verdicts that changed" not in text
    assert re.search(
        r"\| MRPC \| fisher − sensitivity \| equivalent within ±0.3 \(90 %: 0.00 to 0.00\) \| 3 \| 0.00 \|",
        contrasts,
    )
    nulls = section(text, "Scores against uniform, random and plain LoRA")
    assert "Not in the plan: random." in nulls and "| MRPC | fisher |" in nulls


def test_ranks_and_costs(reported):
    text = reported[1]["report.md"].read_text()
    stability = section(text, "Where rank goes: stability over seeds")
    assert "| MRPC | sensitivity | 3 |" in stability and "uniform" not in stability.partition("![")[0]
    agreement = section(text, "Where rank goes: agreement between arms")
    assert "|  | sensitivity | fisher |" in agreement and "CoLA" not in agreement
    assert "| CoLA | head | 12,345 | – | 40 | 10 | 12 |" in section(text, "Parameters and time")
    again = section(text, "How to make it again")
    assert "adalora-fast sweep --recipe tiny\nadalora-fast report runs/tiny\n" in again


def test_csv_files(reported):
    _, files = reported
    runs = rows_of(files["results.csv"])
    assert len(runs) == 45 and sum(row["state"] == "complete" for row in runs) == 32
    (failed,) = (row for row in runs if row["state"] == "failed")
    assert failed["reason"] == "ValueError: diverged | at 0.001" and failed["primary"] == ""
    result = json.loads((reported[0] / "mrpc" / "fisher-seed1" / "result.json").read_text())
    (row,) = (row for row in runs if (row["task"], row["arm"], row["seed"]) == ("mrpc", "fisher", "1"))
    assert float(row["primary"]) == result["primary"] and row["learning_rate"] == "0.001"
    assert float(row["validation/f1"]) == result["metrics"]["validation"]["f1"]
    table = rows_of(files["table.csv"])
    (cell,) = (row for row in table if (row["arm"], row["task"]) == ("uniform", "mrpc"))
    assert (cell["seeds"], cell["planned_seeds"]) == ("2", "3")
    assert [row["mean"] for row in table if row["task"] == "average" and row["arm"] != "head"] == [""] * 4
    for row in table:
        if row["task"] == "average" or not row["mean"]:
            assert row["low_95"] == row["high_95"] == ""
        else:
            assert float(row["low_95"]) < float(row["mean"]) < float(row["high_95"])
    contrasts = rows_of(files["contrasts.csv"])
    assert len(contrasts) == 20  # ten pairs on MRPC and on RTE; one arm on CoLA, so no average
    assert sum(row["declared"] == "1" for row in contrasts) == 8
    assert all((row["holm_p"] == "") == (row["declared"] == "0") for row in contrasts)
    assert all(float(row["standard_error"]) >= 0 and row["examples"] in ("200", "400") for row in contrasts)
    assert all(float(row["low_95"]) <= float(row["low_90"]) <= float(row["high_90"]) for row in contrasts)


def test_published_csv(reported):
    folder, files = reported
    rows = rows_of(files["published.csv"])
    found = {(row["table"], row["method"], row["task"]): row for row in rows}
    assert {row["task"] for row in rows} == {"mrpc", "rte", "cola"}  # and no average over the whole of GLUE
    runs = [json.loads((folder / "mrpc" / f"fisher-seed{s}" / "result.json").read_text()) for s in SEEDS]
    points = [100 * run["metrics"]["validation"]["accuracy"] for run in runs]
    fisher = found["study-glue", "Fisher", "mrpc"]
    assert fisher["source"].endswith("Table 1") and fisher["model"] == "deberta-v3-base"
    assert (fisher["split"], fisher["metric"], fisher["published"]) == ("validation", "accuracy", "89.46")
    assert (fisher["our_arm"], fisher["our_seeds"], fisher["caveat"]) == ("fisher", "3", "other model")
    assert float(fisher["our_mean"]) == pytest.approx(np.mean(points), abs=1e-4)
    assert float(fisher["our_std"]) == pytest.approx(np.std(points, ddof=1), abs=1e-4)
    assert found["study-glue", "Fisher", "rte"]["caveat"] == "other model, sample"
    ours = ("our_mean", "our_std", "our_seeds", "caveat")
    absent, incomplete = found["study-glue", "GSNR", "mrpc"], found["study-glue", "Fisher", "cola"]
    assert absent["our_arm"] == "" and incomplete["our_arm"] == "fisher"
    assert all(row[name] == "" for row in (absent, incomplete) for name in ours)


def test_latex(reported):
    text = reported[1]["table.tex"].read_text()
    body, *published = text.partition("\\bottomrule")[0].split("\\midrule")[1:]
    lines = [line for line in body.strip().splitlines()]
    assert len(lines) == len(RATES) and {line.count("&") for line in lines} == {4}
    assert "{lrrrr}" in text and "\\toprule" in text and "$\\pm$" in body and "±" not in body
    assert text.count("{") == text.count("}") and text.startswith("% tiny")
    study, paper, ablation = published
    rows = [line for line in study.splitlines() if "&" in line]
    assert "Fisher & 89.46 & 85.56 & 69.69 & -- \\\\" in rows and len(rows) == 4
    assert "\\multicolumn{5}{l}{\\emph{Score study, Table 1, published; ours: other model, sample}}" in study
    assert "% RTE: trained or evaluated on a sample here" in study
    assert "% The published numbers that follow are of deberta-v3-base, these are of minilm" in study
    assert "AdaLoRA, 1.27M & 90.69 & 88.09" in paper and "$\\lambda$" in ablation and "|" not in ablation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        ("a\\b{c}", r"a\textbackslash{}b\{c\}"),
        ("x~^", r"x\textasciitilde{}\textasciicircum{}"),
        ("|λ|", r"\textbar{}$\lambda$\textbar{}"),
    ],
)
def test_latex_escapes(text, expected):
    assert escape_latex(text) == expected


def test_markdown_escapes():
    assert escape_markdown("a|b\nc <script>") == "a\\|b c &lt;script>"


def test_csv_keeps_commas_quotes_and_lines():
    text = as_csv([{"a": 'x, "y"\nz', "b": None}])
    assert list(csv.DictReader(text.splitlines(keepends=True))) == [{"a": 'x, "y"\nz', "b": ""}]
    assert as_csv([]) == "\n"


def test_a_clear_winner_is_bold_and_a_lone_arm_is_not(tmp_path):
    sweep = read_sweep(
        write_sweep(tmp_path / "a", {"sensitivity": 0.7, "fisher": 0.85}, tasks=["rte"], seeds=SEEDS)
    )
    contrasts = compare_all(sweep)
    assert re.search(r"\| fisher \| \*\*8.+\*\* \|", results(sweep, contrasts))
    assert results(sweep, contrasts).count("**") == 2 and latex(sweep, contrasts).count("textbf") == 1
    alone = read_sweep(write_sweep(tmp_path / "b", {"fisher": 0.85}, tasks=["rte"], seeds=SEEDS))
    assert "**" not in results(alone, compare_all(alone))
    assert "There is nothing to compare yet" in pairwise(alone, compare_all(alone))


def test_an_arm_without_a_seed_is_not_the_best(tmp_path):
    rates = {"sensitivity": 0.7, "fisher": 0.71, "gsnr": 0.9}
    write_plan(tmp_path, tasks=["rte"], arms=list(rates), seeds=SEEDS)
    for arm in rates:
        for seed in SEEDS[: 2 if arm == "gsnr" else 3]:
            write_run(tmp_path, "rte", arm, seed, agreeing(rates), rows=100)
    sweep = read_sweep(tmp_path)
    found = winners(sweep, compare_all(sweep))["rte"]
    assert found == ["sensitivity", "fisher"]  # alike on these rows; gsnr, far ahead, lacks a seed


def test_verdicts_beside_those_of_an_earlier_method(tmp_path):
    rates = {"sensitivity": 0.7, "fisher": 0.85, "lora": 0.85}
    folder = write_sweep(tmp_path / "a", rates, tasks=["rte"], seeds=SEEDS)
    pairs = {("fisher", "sensitivity"): "not decided", ("lora", "sensitivity"): "differs",
             ("lora", "fisher"): "differs", ("sensitivity", "gone"): "differs"}  # fmt: skip
    entries = [
        {"task": "rte", "a": a, "b": b, "holm_p": 0.2, "verdict": words} for (a, b), words in pairs.items()
    ]
    write_json(folder / "verdicts-before.json", {"method": "Another one.", "verdicts": entries})
    text = section(write_report(folder)[0].read_text(), "Verdicts that changed")
    assert "Before: Another one." in text
    assert (
        "| RTE | fisher − sensitivity | +14" in text
        and "| not decided | 0.200 | differs | &lt; 0.001 |" in text
    )
    assert (
        "| differs | 0.200 | exploratory | – | 1.000 |" in text
        and "over all pairs" in text
        and "lora − sensitivity" not in text
    )
    write_json(folder / "verdicts-before.json", {"method": "Another one.", "verdicts": entries[1:2]})
    assert "No verdict changed." in write_report(folder)[0].read_text()
    write_json(folder / "verdicts-before.json", {"verdicts": [{}]})
    with pytest.raises(ValueError, match=r"verdicts-before\.json holds no method and verdicts of an earlier"):
        write_report(folder)


def test_contrasts_that_were_declared_late_are_marked(tmp_path):
    rates = {"sensitivity": 0.7, "fisher": 0.85, "lora": 0.85}
    pairs = [["fisher", "sensitivity"], ["lora", "fisher"], ["lora", "sensitivity"]]
    note = {"at": "2026-05-06", "contrasts": pairs[1:], "seen": pairs[1:2]}
    plan = {"contrasts": pairs, "amended": [note]}
    sweep = read_sweep(write_sweep(tmp_path / "a", rates, tasks=["rte"], seeds=SEEDS, plan=plan))
    text = pairwise(sweep, compare_all(sweep))
    assert "Declared in the plan: fisher − sensitivity, lora − fisher, lora − sensitivity." in text
    assert (
        "Added on 2026-05-06, when runs of both arms were complete, so perhaps after a look at them (†): "
        "lora − fisher. Added on 2026-05-06, before both arms had a complete run of one task and seed: "
        "lora − sensitivity." in text
    )
    assert "| RTE | lora − fisher † |" in text and text.count("†") == 2
    assert "contrasts lora − fisher, lora − sensitivity" in what_was_run(sweep)


def test_a_development_set_that_is_too_small_is_named(tmp_path):
    """The examples' own taste for one arm is all that there is: no number of seeds averages it away."""
    rates = {"sensitivity": 0.7, "fisher": 0.85}
    sweep = read_sweep(write_sweep(tmp_path, rates, tasks=["rte"], seeds=SEEDS, rows=100))
    text = what_could_be_seen(sweep, compare_all(sweep))
    assert "| none | none | none |" in text
    assert "**Half a point cannot be decided on RTE (100 rows) for most declared contrasts" in text


GLUE = ["mrpc", "sst2", "cola", "qqp", "qnli", "rte", "mnli", "stsb"]


def predict(generator, labels, arm, seed):
    if labels.dtype.kind == "f":
        return labels + (generator.random(len(labels)) - 0.5) / 3
    return agreeing({"sensitivity": 0.85, "magnitude": 0.8})(generator, labels, arm, seed)


def test_both_glue_averages_by_hand(tmp_path):
    write_plan(tmp_path, tasks=GLUE, arms=["sensitivity", "magnitude"], seeds=[0])
    for task in GLUE:
        for arm in ("sensitivity", "magnitude"):
            write_run(tmp_path, task, arm, 0, predict, rows=50, model="microsoft/deberta-v3-base")
    sweep = read_sweep(tmp_path)
    runs = {task: sweep.runs[task, "sensitivity", 0].result for task in GLUE}
    first = {task: 100 * result["primary"] for task, result in runs.items()}
    m, mm = (100 * values["accuracy"] for values in runs["mnli"]["metrics"].values())
    f1 = 100 * runs["qqp"]["metrics"]["validation"]["f1"]
    six = sum(first[task] for task in ("mrpc", "sst2", "cola", "qnli", "rte", "stsb"))
    found = averages(sweep, "sensitivity")
    assert found.glue["nine"] == pytest.approx((six + first["qqp"] + m + mm) / 9)
    assert found.glue["eight"] == pytest.approx((six + (first["qqp"] + f1) / 2 + (m + mm) / 2) / 8)
    assert found.here.mean == pytest.approx(sum(first.values()) / 8)
    text = beside_published(sweep)
    assert "do not measure the same thing" not in text and "average (nine columns)" in text
    assert f"{found.glue['nine']:.2f}" in text and "89.31" in text and "| Fisher | published |" in text
    contrasts = compare_all(sweep)
    assert "One seed: the intervals" in how_compared(sweep, contrasts)
    assert "Of a single seed the interval holds the chance of the examples alone" in results(sweep, contrasts)
    assert "nothing can be planned" in what_could_be_seen(sweep, contrasts)
    assert "no uniform, random or lora arm" in against_nulls(sweep, contrasts)
    rows = {(row["table"], row["method"], row["task"]): row for row in published_rows(sweep)}
    for table, name, average in (("study-glue", "nine", 87.84), ("adalora-glue", "eight", 88.86)):
        method = "AdaLoRA (sensitivity)" if name == "nine" else "AdaLoRA, 0.32M"
        row = rows[table, method, f"glue_{name}_columns"]
        assert (row["published"], row["our_mean"]) == (average, round(found.glue[name], 4))
        assert (row["our_seeds"], row["our_std"], row["caveat"]) == (1, None, "")
    table = latex(sweep, contrasts)
    of_mnli = (90.76 + 90.79) / 2  # as our primary metric
    assert (
        f"AdaLoRA, 1.27M & 90.69 & 96.10 & 71.45 & 92.23 & 94.55 & 88.09 & {of_mnli:.2f} & 91.84 & --"
        in table
    )
    assert "emph{Score study, Table 1, published}" in table and "do not measure" not in table


def test_published_averages_stay_away_from_part_of_glue(reported):
    text = section(reported[1]["report.md"].read_text(), "Beside published numbers")
    assert "The published numbers that follow are of deberta-v3-base, these are of minilm" in text
    assert "RTE: trained or evaluated on a sample here" in text
    assert (
        "88.67" not in text
        and "89.31" not in text
        and "90.44" not in text.partition("AdaLoRA's paper")[0].partition("| fisher")[2]
    )
    assert "| fisher | here |" in text and "| Fisher | published | 89.46 |" in text


def test_no_published_numbers_without_an_arm_of_theirs(tmp_path):
    folder = write_sweep(tmp_path, {"lora": 0.8, "peft": 0.8}, tasks=["rte"], seeds=[0], rows=50)
    files = {path.name: path for path in write_report(folder)}
    assert "published.csv" in files
    (folder / "rte" / "lora-seed0").rename(tmp_path / "away")
    again = {path.name: path for path in write_report(folder)}
    assert "published.csv" not in again and not files["published.csv"].exists()
    assert again["table.tex"].read_text().count("\\midrule") == 1


QQP_ARMS = ["lora-r1", "lora-r32", "full", "sensitivity"]


@pytest.mark.parametrize(
    ("model", "is_bert"), [("google-bert/bert-base-uncased", True), ("distilbert-base-uncased", False)]
)
def test_published_numbers_of_the_same_model_come_first(tmp_path, model, is_bert):
    rates = dict.fromkeys(QQP_ARMS, 0.8)
    sweep = read_sweep(write_sweep(tmp_path, rates, tasks=["qqp"], seeds=[0], rows=50, model=model))
    text = beside_published(sweep)
    first, _, rest = text.partition("The published numbers that follow are of deberta-v3-base, these are of")
    for row in ("| LoRA r 1 | published | 87.90 | 83.80 |", "| LoRA r 32 | published | 88.00 | 84.00 |",
                "| full fine-tuning | published | 90.60 | 87.50 |"):  # fmt: skip
        assert row in text and (row in first) == is_bert
    assert "| lora-r32 | here |" in text and "Score study" not in first and "Score study" in rest
    assert ("follow are of bert-base, these are of distilbert" in rest) == (not is_bert)


def test_arms_may_adapt_different_matrices(tmp_path):
    """Their maps have different lengths: each arm is compared with itself, and with those like it."""
    rates = {"sensitivity": 0.8, "fisher": 0.8, "movement": 0.8, "gsnr": 0.7}
    write_sweep(tmp_path, rates, tasks=["mrpc"], seeds=[0, 1], rows=50)
    for arm in ("sensitivity", "gsnr"):  # the first arm of the task, and one more
        for seed in (0, 1):
            path = tmp_path / "mrpc" / f"{arm}-seed{seed}" / "ranks.json"
            saved = json.loads(path.read_text())
            ranks = {name: rank for name, rank in saved["ranks"].items() if "attention" in name}
            write_json(path, saved | {"ranks": dict(reversed(ranks.items())) if arm == "gsnr" else ranks})
    text = write_report(tmp_path)[0].read_text()
    lines = [line for line in text.splitlines() if line.startswith("| MRPC | ")]
    assert all(any(f"| MRPC | {arm} | 2 |" in line for line in lines) for arm in rates)
    arms, table = agreement(read_sweep(tmp_path), "mrpc")
    assert arms == list(rates)
    compared = [["sensitivity", "gsnr"], ["fisher", "movement"]]
    for i, a in enumerate(arms):
        for j, b in enumerate(arms):
            assert np.isnan(table[i, j]) == (not any({a, b} <= set(pair) for pair in compared))
    means = {arm: rank_maps(read_sweep(tmp_path), "mrpc", arm).mean(axis=0) for arm in arms}
    assert len(means["gsnr"]) < len(means["fisher"])
    assert table[0, 3] == pytest.approx(spearman(means["sensitivity"], means["gsnr"]))
    where = section(text, "Where rank goes: agreement between arms")
    assert "–: the arms adapt different matrices" in where and "ranks-mrpc.png" in text


def test_seeds_of_an_arm_adapt_the_same_matrices(tmp_path):
    write_sweep(tmp_path, {"fisher": 0.8}, tasks=["mrpc"], seeds=[0, 1], rows=50)
    path = tmp_path / "mrpc" / "fisher-seed1" / "ranks.json"
    saved = json.loads(path.read_text())
    saved["ranks"].popitem()
    write_json(path, saved)
    with pytest.raises(ValueError, match=r"seed1/ranks\.json adapts other matrices than the arm's other"):
        rank_maps(read_sweep(tmp_path), "mrpc", "fisher")


def test_a_task_that_was_not_learnt(tmp_path):
    """RTE is no better than the majority class, MRPC is; CoLA's majority has a Matthews correlation of 0."""
    rates = {"sensitivity": 0.8, "lora": 0.78}
    folder = write_sweep(tmp_path, rates, tasks=["mrpc", "rte", "cola"], seeds=[0])
    for task, counts in (("mrpc", {"0": 130, "1": 270}), ("rte", {"0": 308, "1": 92})):
        for arm in rates:
            path = folder / task / f"{arm}-seed0" / "result.json"
            result = json.loads(path.read_text())
            result["splits"]["validation"]["label_counts"] = counts
            write_json(path, result)
    sweep = read_sweep(folder)
    text = results(sweep, compare_all(sweep))
    assert "The majority class alone gives MRPC 67.50, RTE 77.00, CoLA 0.00." in text
    assert "No arm is 5 points above it on RTE: near chance" in text
    assert "Collapsed" not in text
    path = folder / "mrpc" / "lora-seed0" / "result.json"
    write_json(path, json.loads(path.read_text()) | {"primary": 0.675})
    sweep = read_sweep(folder)
    text = results(sweep, compare_all(sweep))
    assert "Collapsed to it where other arms learnt the task: lora on MRPC (1 of 1 runs);" in text
    untold = read_sweep(write_sweep(tmp_path / "b", rates, tasks=["mrpc"], seeds=[0]))
    assert "majority" not in results(untold, compare_all(untold))


def test_a_sweep_in_which_nothing_has_run(tmp_path):
    write_plan(tmp_path, tasks=["mrpc", "rte"], arms=["sensitivity", "lora"], seeds=[0, 1])
    files = write_report(tmp_path, tmp_path / "elsewhere")
    text = files[0].read_text()
    assert "0 of 4 complete" not in text and "| runs | 0 of 8 complete |" in text
    assert "8 planned run(s) are missing" in text and {path.suffix for path in files} == {
        ".md",
        ".csv",
        ".tex",
    }
    assert len(result_rows(read_sweep(tmp_path))) == 8


def test_what_an_earlier_report_left_is_replaced_and_the_rest_stays(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["sensitivity"], seeds=[0])
    report = tmp_path / "report"
    report.mkdir()
    for name in ("ranks-gone.png", "mine.png", "notes.txt", "report.md"):
        (report / name).write_text("x")
    write_report(tmp_path)
    assert (report / "ranks-gone.png").is_file()  # that report.md did not say that we had made it
    write_report(tmp_path)
    assert not (report / "ranks-gone.png").exists()
    assert (report / "mine.png").is_file() and (report / "notes.txt").is_file()


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_plan(tmp_path, tasks=["mrpc"], arms=["sensitivity"], seeds=[0])
    (first, *_) = write_report(tmp_path)
    before = first.read_text()

    def broken(*arguments):
        raise ValueError("no")

    monkeypatch.setattr("adalora_fast.experiments.report.write.latex", broken)
    with pytest.raises(ValueError, match="no"):
        write_report(tmp_path)
    assert first.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "report"]


def test_a_file_in_the_way(tmp_path):
    write_plan(tmp_path, tasks=["mrpc"], arms=["sensitivity"], seeds=[0])
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match="taken is a file; give a folder for the report"):
        write_report(tmp_path, tmp_path / "taken")
    with pytest.raises(ValueError, match="cannot write to"):
        write_report(tmp_path, tmp_path / "taken" / "below")
