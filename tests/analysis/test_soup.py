"""Greedy soups against explicit vectors, what make_soup writes, and what others load of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from adalora_fast.analysis import soup_files
from adalora_fast.analysis.changes import mixture
from adalora_fast.analysis.rows import RowSet, halves, read_rows, selection_and_report
from adalora_fast.analysis.saved import open_run, open_runs
from adalora_fast.analysis.shared import SharedModel
from adalora_fast.analysis.soup import averaging_soup, ensemble_logits, greedy_soup, uniform_soup
from adalora_fast.analysis.soup_files import save_lora
from adalora_fast.analysis.soups import make_soup
from adalora_fast.experiments.data.tasks import Split
from adalora_fast.integrations.files import CONFIG, WEIGHTS
from tests.helpers.training_runs import read


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_the_recipe_on_points_of_a_plane(seed, count):
    """Losses of points in a bumpy bowl: the recipe is followed with the points themselves."""
    points = np.random.default_rng(seed).normal(size=(count, 2))

    def loss(point):
        return float(np.sum(np.square(point)) + np.sin(5 * point[0]))

    losses = [loss(point) for point in points]
    soup = greedy_soup(losses, lambda weights: loss(np.array(weights) @ points))
    order = sorted(range(count), key=losses.__getitem__)
    current = points[order[0]]
    for run in order[1:]:
        best = min(((a * current + (5 - a) * points[run]) / 5 for a in (1, 2, 3, 4)), key=loss)
        current = best if loss(best) < loss(current) else current
    np.testing.assert_allclose(np.array(soup.weights) @ points, current, atol=1e-12)
    assert soup.order == order and soup.loss <= min(losses) and sum(soup.weights) == pytest.approx(1)
    assert soup.members[0] == order[0]
    assert [trial.run for trial in soup.trials] == order[1:]
    assert {trial.run for trial in soup.trials if trial.taken} == set(soup.members[1:])


@given(st.integers(0, 10_000), st.integers(1, 7))
def test_the_averaging_soup_on_points_of_a_plane(seed, count):
    points = np.random.default_rng(seed).normal(size=(count, 2))

    def loss(point):
        return float(np.sum(np.square(point)) + np.sin(5 * point[0]))

    losses = [loss(point) for point in points]
    soup = averaging_soup(losses, lambda weights: loss(np.array(weights) @ points))
    order = sorted(range(count), key=losses.__getitem__)
    members = [order[0]]
    for run in order[1:]:
        if loss(points[[*members, run]].mean(0)) < loss(points[members].mean(0)):
            members.append(run)
    np.testing.assert_allclose(np.array(soup.weights) @ points, points[members].mean(0), atol=1e-12)
    assert soup.members == members and soup.loss <= min(losses)
    assert all(trial.alpha is None and len(trial.losses) == 1 for trial in soup.trials)


def split_of(texts, labels):
    return Split(texts=(list(texts),), labels=list(labels), source="x", sample=False)


def test_halves_have_equally_many_rows_of_a_class():
    rows = split_of([f"text {i}" for i in range(60)], [int(i % 10 == 0) for i in range(60)])  # 6 of class 1
    first, second = halves(rows)
    assert (len(first), sum(first.labels), len(second), sum(second.labels)) == (30, 3, 30, 3)
    assert halves(rows)[0].texts == first.texts, "not always the same rows"
    assert rows.hold_out(0.5)[1].texts != first.texts or sum(rows.hold_out(0.5)[1].labels) == 3


def test_halves_share_no_text_whatever_its_labels():
    texts = [f"text {i // 2}" for i in range(40)]
    first, second = halves(split_of(texts, [i % 2 for i in range(40)]))
    assert not set(first.texts[0]) & set(second.texts[0]) and len(first) + len(second) == 40
    regression = halves(split_of([f"{i}" for i in range(10)], [i / 10 for i in range(10)]))
    assert [len(half) for half in regression] == [5, 5]
    with pytest.raises(ValueError, match="every class has one text only"):
        halves(split_of(["a", "b"], [0, 1]))


def test_ties_and_refusals():
    soup = greedy_soup([2.0, 1.0, 1.0], lambda weights: 1.0)
    assert soup.weights == [0, 1, 0] and not any(trial.taken for trial in soup.trials)
    for losses in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            greedy_soup(losses, lambda weights: 0.0)


def test_ensemble():
    outputs = [(np.array([[1.0, 3.0]], np.float32),), (np.array([[2.0, -1.0]], np.float32),)]
    assert ensemble_logits(outputs)[0].tolist() == [[1.5, 1.0]]


def test_rows_are_on_one_side(runs, held_out_runs):
    settings = open_run(runs["lora-2"]).settings
    first, second = selection_and_report(settings, "halves")
    assert len(first) + len(second) == 24 and not set(first.texts[0]) & set(second.texts[0])
    with pytest.raises(ValueError, match="choose halves"):
        selection_and_report(settings, "held_out")
    with pytest.raises(ValueError, match="'all'; choose halves or held_out"):
        selection_and_report(settings, "all")
    held = open_run(held_out_runs[0])
    chosen, reported = selection_and_report(held.settings, "held_out")
    assert len(chosen) == held.result["splits"]["held_out"]["rows"] and len(reported) == 24


def lora_folders(runs):
    return [runs[name] for name in ("lora-2", "adalora-0", "lora-4", "peft", "head")]


def test_a_soup(runs, tmp_path):
    folders = lora_folders(runs)
    result = make_soup(folders, tmp_path / "soup", precision="bf16")
    assert read(tmp_path / "soup", "soup.json") == result and result["precision"] == "bf16"
    assert "bfloat16" in (tmp_path / "soup" / "soup.md").read_text()
    best = result["members"][result["best_member"]]
    greedy = result["greedy"]
    assert greedy["selection"]["loss"] == greedy["loss"] <= best["selection"]["loss"]
    assert best["selection"]["loss"] == min(each["selection"]["loss"] for each in result["members"])
    assert result["uniform"]["weights"] == [0.2] * 5
    averaging = result["averaging"]
    assert averaging["selection"]["loss"] == averaging["loss"] <= best["selection"]["loss"]
    assert "| averaging soup |" in (tmp_path / "soup" / "soup.md").read_text()
    assert set(result["ensemble"]) == {"selection", "report"}
    assert result["rows"]["selection"]["rows"] + result["rows"]["report"]["rows"] == 24
    assert result["saved"]["form"] == "lora" and result["saved"]["error"] == 0
    with pytest.raises(ValueError, match="not an empty folder"):
        make_soup(folders, tmp_path / "soup")


def test_a_saved_soup_is_plain_lora(runs, tmp_path):
    """PEFT loads it onto the base, and it computes what the mixture computes."""
    opened = open_runs(lora_folders(runs))
    shared = SharedModel.load(opened[0].settings, device="cpu")
    changes, weights = shared.read(opened), [0.1, 0.2, 0.3, 0.15, 0.25]
    saved = save_lora(shared, changes, weights, opened[0].settings, tmp_path / "lora")
    name = "bert.encoder.layer.1.output.dense"
    assert saved.ranks[name] == sum(c.factors[name].rank for c in changes if name in c.factors)
    rows = RowSet(opened[0].settings, {"all": read_rows(opened[0].settings)}, shared.tokenizer, shared.device)
    with shared.mixed(changes, weights) as model:
        expected = rows.logits(model, "all")[0]
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "lora").eval()
    assert isinstance(loaded, PeftModel) and loaded.peft_config["default"].peft_type == "LORA"
    np.testing.assert_allclose(rows.logits(loaded, "all")[0], expected, atol=3e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("adalora-biases", "lora-2", "bitfit", "lora-biases"),
        ("query-value-biases", "bitfit"),
        ("query-value-biases", "adalora-0", "lora-biases"),
    ],
)
def test_a_saved_soup_with_biases(runs, tmp_path, names):
    """Where only some matrices are adapted, PEFT wraps only those, and loads the biases of the others too."""
    opened = open_runs([runs[name] for name in names])
    shared = SharedModel.load(opened[0].settings, device="cpu")
    changes, weights = shared.read(opened), uniform_soup(len(names))
    saved = save_lora(shared, changes, weights, opened[0].settings, tmp_path / "lora")
    rows = RowSet(opened[0].settings, {"all": read_rows(opened[0].settings)}, shared.tokenizer, shared.device)
    with shared.mixed(changes, weights) as model:
        expected = rows.logits(model, "all")[0]
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "lora").eval()
    wrapped = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == set(saved.ranks) and len(wrapped) == (4 if names[1:] == ("bitfit",) else 12)
    np.testing.assert_allclose(rows.logits(loaded, "all")[0], expected, atol=3e-6)


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_cut_to_a_rank(runs, tmp_path, rank):
    opened = open_runs([runs["lora-2"], runs["adalora-0"], runs["lora-4"]])
    shared = SharedModel.load(opened[0].settings, device="cpu")
    changes, weights = shared.read(opened), [0.5, 0.2, 0.3]
    saved = save_lora(shared, changes, weights, opened[0].settings, tmp_path / "cut", rank=rank)
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    lost = total = 0.0
    for name, found in saved.errors.items():
        W = torch.zeros_like(shared.model.get_submodule(name).weight)
        whole = mixture(f"{name}.weight", W, changes, weights).double()
        key = f"base_model.model.{name}.lora_"
        kept = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        assert saved.ranks[name] <= rank
        S = torch.linalg.svdvals(whole)
        expected = float(S[rank:].norm() / S.norm())
        assert float((whole - kept).norm() / whole.norm()) == pytest.approx(expected, abs=1e-6)
        assert found == pytest.approx(expected, abs=1e-6)
        lost, total = lost + float(S[rank:].square().sum()), total + float(S.square().sum())
    assert saved.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)


def test_merged_into_a_full_model(runs, tmp_path):
    folders = [runs["full"], runs["adalora-0"]]
    with pytest.raises(ValueError, match="trained fully"):
        make_soup(folders, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    result = make_soup(folders, tmp_path / "soup", save="full", recipe="uniform")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "soup" / "model").eval()
    assert model.config.id2label == {0: "negative", 1: "positive"}
    settings = open_run(runs["full"]).settings
    shared = SharedModel.load(settings, device="cpu")
    rows = RowSet(
        settings, {"report": selection_and_report(settings, "halves")[1]}, shared.tokenizer, shared.device
    )
    assert rows.evaluate(model, "report").loss == pytest.approx(result["uniform"]["report"]["loss"], abs=1e-6)
    assert uniform_soup(2) == result["uniform"]["weights"]


def test_an_interrupted_one_is_begun_anew(runs, tmp_path, monkeypatch):
    """In the middle of saving: a model that lacks a file, and the draft that a killed process leaves."""
    folders, output = [runs["lora-2"], runs["lora-4"]], tmp_path / "soup"

    def interrupted(source, target):
        (source / WEIGHTS).rename(target / WEIGHTS)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(soup_files, "move_files", interrupted)
        make_soup(folders, output)
    (output / "model" / ".saving-1").mkdir()
    (output / "model" / ".saving-1" / CONFIG).touch()
    assert read(output, "soup.json")["finished"] is False and not (output / "soup.md").exists()
    result = make_soup(folders, output)
    assert result["finished"] and read(output, "soup.json") == result
    assert {path.name for path in output.iterdir()} == {"soup.json", "soup.md", "model"}
    assert {path.name for path in (output / "model").iterdir()} == {WEIGHTS, CONFIG}


def test_a_form_that_fails_leaves_the_folder_to_another(runs, tmp_path):
    folders = [runs["head"], runs["bitfit"]]
    with pytest.raises(ValueError, match="give --save full"):
        make_soup(folders, tmp_path / "soup")
    assert make_soup(folders, tmp_path / "soup", save="full")["saved"]["form"] == "full"
    with pytest.raises(ValueError, match="not an empty folder"):
        make_soup(folders, tmp_path / "soup", save="none")


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"saved": null}', '{"finished": true}'])
def test_a_file_of_that_name_is_no_unfinished_soup(runs, tmp_path, content):
    (tmp_path / "soup.json").write_text(content)
    with pytest.raises(ValueError, match="not an empty folder"):
        make_soup([runs["lora-2"], runs["lora-4"]], tmp_path)
    assert (tmp_path / "soup.json").read_text() == content


def test_selection_on_held_out_rows(held_out_runs, tmp_path):
    result = make_soup(held_out_runs, tmp_path / "soup", selection="held_out", save="none")
    assert result["rows"]["report"]["rows"] == 24 and result["saved"] is None
    kept = open_run(held_out_runs[0]).result["metrics"]["held_out"]
    assert result["members"][0]["selection"]["loss"] == pytest.approx(kept["loss"], abs=1e-6)
    assert {path.name for path in (tmp_path / "soup").iterdir()} == {"soup.json", "soup.md"}


def test_refused(runs, tmp_path):
    folders = lora_folders(runs)
    for options, match in (
        ({"recipe": "stone"}, "unknown soup 'stone'"),
        ({"save": "onnx"}, "unknown form 'onnx'"),
        ({"save": "full", "rank": 2}, "rank of 2"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            make_soup(folders, tmp_path / "soup", **options)
        assert not (tmp_path / "soup").exists(), options
    with pytest.raises(ValueError, match="none of these runs has adapted a matrix"):
        make_soup([runs["head"]] * 2, tmp_path / "heads")
