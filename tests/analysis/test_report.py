"""Reports against the numbers they are made of."""

import copy
import json
import re

import pytest

from adalora_fast.analysis.report import cka_report, connectivity_report, soup_report, study
from tests.analysis.synthetic import made_up

CKA, PATHS = made_up(("lora-r4", "full", "fis|her"), 2)


def cells(text, first):
    """The first row of a table that begins with `first`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def soup():
    def judged(loss, accuracy):
        return {"loss": loss, "metrics": {"accuracy": accuracy}}

    members = [
        {"selection": judged(0.5, 0.8), "report": judged(0.6, 0.7)},
        {"selection": judged(0.4, 0.9), "report": judged(0.5, 0.75)},
    ]
    parts = {"selection": judged(0.3, 0.95), "report": judged(0.45, 0.78)}
    return {
        "task": "mrpc", "model": "minilm", "precision": "fp32", "selection": "halves",
        "runs": [{"name": "lora-r4-seed0"}, {"name": "full-seed0"}],
        "rows": {"selection": {"rows": 200, "sample": False}, "report": {"rows": 208, "sample": True}},
        "members": members, "best_member": 1,
        "greedy": {"weights": [0.25, 0.75], **parts}, "uniform": {"weights": [0.5, 0.5], **parts},
        "ensemble": parts,
        "saved": {"soup": "greedy", "form": "lora", "ranks": {"q": 4, "k": 12}, "error": 0.02},
    }  # fmt: skip


def test_groups_of_cka():
    text = cka_report(CKA)
    row = cells(text, "lora-r4")
    assert row[:4] == ["lora-r4", "2", "0.450 ± 0.071", "80.50 ± 0.71"]
    assert row[4] == f"{CKA['cka'][0][1]:.4f} (1)"
    others = [CKA["cka"][a][b] for a in (0, 1) for b in (2, 3, 4, 5)]
    assert row[5] == f"{sum(others) / 8:.4f} (8)"
    pairs = [(a, b) for a in range(6) for b in range(a)]
    for kind, chosen in (
        ("same group, other seed", [CKA["cka"][a][b] for a, b in pairs if a // 2 == b // 2]),
        ("other group, same seed", [CKA["cka"][a][b] for a, b in pairs if a % 2 == b % 2]),
        (
            "other group, other seed",
            [CKA["cka"][a][b] for a, b in pairs if a // 2 != b // 2 and a % 2 != b % 2],
        ),
    ):
        assert cells(text, kind)[1:] == [f"{len(chosen)}", f"{sum(chosen) / len(chosen):.4f}"]
    assert "MRPC" in text and "bfloat16" in text and "fis\\|her" in text


def test_means_over_groups_count_pairs():
    """Of 3 pairs with a mean of 0.5 and 1 pair of 0.9, not of two means."""
    result = CKA | {
        "group_means": [[0.7, 0.5, 0.9], [0.5, None, None], [0.9, None, None]],
        "group_pairs": [[1, 3, 1], [3, 0, 0], [1, 0, 0]],
    }
    text = cka_report(result)
    assert cells(text, "lora-r4")[-2:] == ["0.7000 (1)", "0.6000 (4)"]
    assert cells(text, "full")[-2:] == ["–", "0.5000 (3)"]


def test_groups_of_paths():
    text = connectivity_report(PATHS)
    gaps = PATHS["convexity_gap"]
    assert cells(text, "full")[4:] == [
        f"{gaps[2][3]:.4f} (1)",
        f"{sum(gaps[a][b] for a in (2, 3) for b in (0, 1, 4, 5)) / 8:.4f} (8)",
    ]
    assert [cells(text, name)[1] for name in ("same group, other seed", "other group, same seed")] == [
        "3",
        "6",
    ]


def test_the_largest_gap():
    def with_gaps(first):
        gaps = [first, *[0.0] * (len(PATHS["paths"]) - 1)]
        paths = [path | {"convexity_gap": gap} for path, gap in zip(PATHS["paths"], gaps, strict=True)]
        return connectivity_report(PATHS | {"paths": paths})

    assert "Largest convexity gap: 0.25, between lora-r4-seed0 and lora-r4-seed1." in with_gaps(0.25)
    assert "No path has a convexity gap" in with_gaps(0.0) and "Largest" not in with_gaps(0.0)


def test_a_local_model_is_shown_without_its_folder():
    for text in (
        cka_report(CKA | {"model": "/home/me/models/tiny"}),
        connectivity_report(PATHS | {"model": "/home/me/models/tiny"}),
        soup_report(soup() | {"model": "/home/me/models/tiny"}),
    ):
        assert "Model tiny (a local folder)" in text and "/home/me" not in text


def test_pairs_that_were_not_computed():
    text = connectivity_report(made_up(("lora-r4", "full"), 2, within=True)[1])
    assert cells(text, "full")[-1] == "–" and cells(text, "other group, same seed")[1:3] == ["0", "–"]
    assert "pairs of runs: of one group" in text


def test_a_soup():
    text = soup_report(soup())
    assert cells(text, "best member (full-seed0)")[1:] == ["0.4000", "90.00", "0.5000", "75.00"]
    assert cells(text, "greedy soup")[1:5] == ["0.3000", "95.00", "0.4500", "78.00"]
    assert cells(text, "full-seed0")[1] == "0.75" and cells(text, "lora-r4-seed0")[1] == "0.25"
    assert "on 200 rows, reported on 208 others (a sample of the official data) (sel" in text
    assert "ranks 4 to 12" in text and "2.00 %" in text and "float32" in text
    assert "Saved" not in soup_report(soup() | {"saved": None})
    assert "full model" in soup_report(soup() | {"saved": {"soup": "greedy", "form": "full"}})


@pytest.mark.parametrize(
    ("report", "result"), [(cka_report, CKA), (connectivity_report, PATHS), (soup_report, soup())]
)
def test_the_same_json_gives_the_same_words_beside_the_study(report, result):
    before = copy.deepcopy(result)
    text = report(result)
    assert result == before and report(json.loads(json.dumps(result))) == text
    after = text[text.index("## For comparison: another model and another task") :]
    assert "QQP with BERT-base" in after and study()["source"] in after
    if report is soup_report:
        assert "| 0.239 | 89.4 | 86.4 |" in after
    else:
        assert "| LoRA, rank 8 | 0.256 | 89.1 | 85.6 |" in after
    assert ("| 0.695 |" in after) == (report is cka_report)


def test_the_three_pages_show_the_same_figures_of_the_same_runs():
    """What each run wrote of itself, with its rows, whatever rows and precision the comparison has."""
    runs = copy.deepcopy(CKA["runs"])
    for run in runs:
        run["rows"] = {"train": 3668, "validation": 408}
    part = {"split": "train", "rows": 100, "sample": False}
    judged = {"loss": 0.9, "metrics": {"accuracy": 0.1}}
    members = [{"selection": judged, "report": judged}] * len(runs)
    mixed = {"weights": [1.0] + [0.0] * (len(runs) - 1), "selection": judged, "report": judged}
    pages = [
        cka_report(CKA | {"runs": runs, "rows": part}),
        connectivity_report(PATHS | {"runs": runs, "rows": part, "precision": "bf16"}),
        soup_report(
            soup()
            | {"runs": runs, "rows": {"selection": part, "report": part}, "members": members, "saved": None}
            | {"greedy": mixed, "uniform": mixed, "best_member": 0}
        ),
    ]
    for group in ("lora-r4", "full", "fis\\|her"):
        assert {tuple(cells(text, group)[:4]) for text in pages} == {
            (group, "2", "0.450 ± 0.071", "80.50 ± 0.71")
        }
    for text in pages:
        assert "those that each of them wrote of itself (result.json), on 408 rows of validation" in text
        assert "100 rows of train" in text
    assert "ends of the paths, computed again on 100 rows of train in bfloat16 matrix products" in pages[1]
    assert "Chosen by the loss on 100 rows of train, reported on 100 others of train" in pages[2]


def test_a_task_with_two_splits_and_runs_on_different_numbers_of_rows():
    runs = copy.deepcopy(CKA["runs"])
    for place, run in enumerate(runs):
        both = {"matched": {"accuracy": 0.8, "loss": 0.4}, "mismatched": {"accuracy": 0.7, "loss": 0.5}}
        run |= {"metrics": both, "rows": {"matched": 100 + 100 * (place % 2), "mismatched": 50}}
    text = cka_report(CKA | {"runs": runs})
    assert "| group | runs | loss (matched) | accuracy (matched) | loss (mismatched) | accuracy (mism" in text
    assert cells(text, "full")[2:6] == ["0.400 ± 0.000", "80.00 ± 0.00", "0.500 ± 0.000", "70.00 ± 0.00"]
    assert "on 100 or 200 rows of matched and 50 rows of mismatched" in text
