"""Whole runs of a tiny encoder on a tiny task: what they compute and what lies in the folder afterwards."""

import ctypes
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from adalora_fast.experiments.methods.adapters import adapt
from adalora_fast.experiments.models.loading import load_encoder
from adalora_fast.experiments.run import trainer, training
from tests.helpers.tiny import LAYERS, RECIPE, WIDTH, printed, quiet_console, write_parquet, write_sst2
from tests.helpers.training_runs import (
    TASK,
    files,
    lines,
    read,
    settings,
    strict_json,
    train,
    without_times,
)

MATRICES = 6 * LAYERS
HEAD = WIDTH * WIDTH + WIDTH + 2 * WIDTH + 2  # pooler and classifier
FACTORS = LAYERS * (4 * 2 * WIDTH + 2 * 3 * WIDTH)  # rows of A plus rows of B per unit of rank
RUNS = {
    "sensitivity": {"score": "sensitivity"},
    "gsnr": {"score": "gsnr"},
    "lora-r2": {"method": "lora"},
    "head-only": {"method": "head"},
    "full": {"method": "full"},
}
ADAPTIVE = ["sensitivity", "gsnr"]


@pytest.fixture(scope="module")
def folders(encoder, data_dir, tmp_path_factory):
    """One complete folder per method."""
    root = tmp_path_factory.mktemp("runs")
    for label, options in RUNS.items():
        train(settings(encoder, data_dir, **options), root / label)
    return root


def test_a_text_that_is_longer_than_the_model_reaches(encoder, tmp_path):
    """Said before the first batch, not in the middle of training."""
    write_sst2(tmp_path / "data", train=8, validation=4)
    write_parquet(tmp_path / "data" / "sst2" / "validation.parquet", sentence=["a " * 60], label=[1])
    run = settings(encoder, tmp_path / "data", method="head", recipe=replace(RECIPE, max_length=64))
    with pytest.raises(
        ValueError, match=r"max_length 64 lets through a text of \d+ tokens in validation, and .*"
    ):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_scales_of_ia3_do_not_decay(encoder, data_dir, tmp_path):
    recipe = replace(RECIPE, weight_decay=100.0, learning_rate=1e-3)
    train(settings(encoder, data_dir, method="ia3", recipe=recipe), tmp_path / "run")
    scales = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    scales = torch.cat([value.flatten() for name, value in scales.items() if "ia3_l" in name])
    assert (scales - 1).abs().max() < 0.05  # with decay they would be near (1 - 0.1)^10


@pytest.mark.parametrize("label", RUNS)
def test_files(folders, label):
    adapter = {
        "head-only": {"trained.safetensors"},
        "full": {"config.json", "model.safetensors"},
        "lora-r2": {"adapter_config.json", "adapter_model.safetensors", "README.md"},
    }.get(
        label,
        {"adapter_config.json", "adapter_model.safetensors", "README.md", "adalora_allocator.safetensors"},
    )
    expected = {"config.json", "metrics.jsonl", "ranks.json", "result.json", "predictions.safetensors"} | {
        f"adapter/{f}" for f in adapter
    }
    if label in ADAPTIVE:
        expected.add("allocation.jsonl")
    assert files(folders / label) == expected
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("label", RUNS)
def test_result(folders, data_dir, label):
    result = read(folders / label, "result.json")
    assert result["method"] == label and result["task"] == "sst2" and result["seed"] == 0
    assert result["steps"] == 10 and result["resumed"] is False and result["sample"] is False
    assert result["primary_metric"] == "accuracy"
    assert result["primary"] == result["metrics"]["validation"]["accuracy"]
    assert set(result["metrics"]["validation"]) == {"accuracy", "loss"}
    train_split = result["splits"]["train"]
    assert train_split["rows"] == sum(train_split["label_counts"].values()) == 40
    assert train_split["source"] == str(data_dir / "sst2" / "train.parquet")
    assert result["splits"]["validation"]["rows"] == 24
    assert result["seconds"] >= result["train_seconds"] > 0


@pytest.mark.parametrize("label", RUNS)
def test_parameters_and_ranks(folders, label):
    result, saved = read(folders / label, "result.json"), read(folders / label, "ranks.json")
    counts = {
        "lora-r2": HEAD + 2 * FACTORS,
        "head-only": HEAD,
        "full": sum(
            t.numel() for t in load_file(folders / "full" / "adapter" / "model.safetensors").values()
        ),
    }
    assert result["trainable_parameters"] == counts.get(label, HEAD + 4 * FACTORS + 4 * MATRICES)
    assert saved["init_r"] == 4
    assert sum(saved["ranks"].values()) == result["total_rank"]
    assert result["total_rank"] == (
        0 if label in ("head-only", "full") else 2 * MATRICES
    )  # exactly the budget
    assert len(saved["ranks"]) == (0 if label in ("head-only", "full") else MATRICES)
    assert all(0 <= rank <= 4 for rank in saved["ranks"].values())


def test_the_budget_is_spread_by_the_score(folders):
    ranks = {label: read(folders / label, "ranks.json")["ranks"] for label in (*ADAPTIVE, "lora-r2")}
    assert set(ranks["lora-r2"].values()) == {2}
    assert len(set(ranks["sensitivity"].values())) > 1
    assert ranks["sensitivity"] != ranks["gsnr"]


@pytest.mark.parametrize("label", RUNS)
def test_config(folders, encoder, data_dir, label):
    config = read(folders / label, "config.json")
    asked = asdict(settings(encoder, data_dir, **RUNS[label]))
    assert config["settings"] == {**asked, "adapters": list(asked["adapters"])}  # JSON knows no tuples
    assert {"python", "torch", "transformers", "peft"} <= set(config["environment"]["versions"])


@pytest.mark.parametrize("label", RUNS)
def test_measurements(folders, label):
    log = lines(folders / label)
    losses = [line for line in log if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 11))
    evaluations = [line["step"] for line in log if "eval_validation_accuracy" in line]
    assert evaluations == [5, 10, 10]  # every epoch, and at the end
    assert log[-1]["eval_validation_accuracy"] == read(folders / label, "result.json")["primary"]
    if label in ADAPTIVE:
        budgets = [line["adalora/budget"] for line in losses]
        assert budgets[0] == 4 * MATRICES and budgets[-1] == 2 * MATRICES
        assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 2
    else:
        assert not any("adalora/budget" in line for line in log)


def test_the_best_epoch_is_that_of_the_evaluations(folders):
    values = [(line["eval_validation_accuracy"], line["epoch"]) for line in lines(folders / "full") if
              "eval_validation_accuracy" in line]  # fmt: skip
    best = read(folders / "full", "result.json")["best_epoch"]
    assert best["primary"] == max(values)[0]
    assert best["epoch"] == min(epoch for value, epoch in values if value == max(values)[0])


@pytest.mark.parametrize("label", [*ADAPTIVE, "lora-r2"])
def test_plain_peft_loads_the_adapter(folders, encoder, data_dir, label):
    """The same logits without a line of this package, so that the accuracy is the one that was written."""
    from peft import PeftModel

    base, tokenizer = load_encoder(settings(encoder, data_dir), TASK)
    model = PeftModel.from_pretrained(base, folders / label / "adapter").eval()
    assert not type(model.base_model).__module__.startswith("adalora_fast")
    from adalora_fast.experiments.data.tasks import load_split

    split = load_split(TASK, "validation", data_dir)
    with torch.no_grad():
        logits = model(**tokenizer(*split.texts, padding=True, return_tensors="pt")).logits
    right = (logits.argmax(1) == torch.tensor(split.labels)).float().mean().item()
    assert right == pytest.approx(read(folders / label, "result.json")["primary"], abs=1e-6)
    if label in ADAPTIVE:
        ranks = read(folders / label, "ranks.json")["ranks"]
        sizes = {
            name: model.base_model.model.get_submodule(name).lora_E["default"].shape[0] for name in ranks
        }
        assert sizes == ranks


def test_the_head_file_holds_the_trained_head(folders):
    tensors = load_file(folders / "head-only" / "adapter" / "trained.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == HEAD


def test_what_is_frozen_stays_and_what_is_trained_moves(folders, encoder):
    before = load_file(encoder / "model.safetensors")
    head = load_file(folders / "head-only" / "adapter" / "trained.safetensors")
    full = load_file(folders / "full" / "adapter" / "model.safetensors")
    assert not torch.equal(head["bert.pooler.dense.weight"], before["pooler.dense.weight"])
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(full[f"bert.{name}"], before[name])


def test_it_learns(encoder, tmp_path):
    data = write_sst2(tmp_path / "data", train=120, validation=60)
    recipe = replace(RECIPE, epochs=8)
    result = train(settings(encoder, data, "full", recipe=recipe), tmp_path / "run")
    assert result["primary"] > 0.9


@pytest.mark.parametrize("label", ["sensitivity", "lora-r2"])
def test_the_same_settings_give_the_same_run(folders, encoder, data_dir, tmp_path, label):
    train(settings(encoder, data_dir, **RUNS[label]), tmp_path / "again")
    for name in ("ranks.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folders / label / name).read_bytes()
    first, second = (
        [without_times(line) for line in lines(path)] for path in (folders / label, tmp_path / "again")
    )
    assert first == second


def test_the_seed_decides_the_new_head_and_the_order_of_the_data(
    folders, encoder, data_dir, tmp_path, monkeypatch
):
    heads = {}

    def watch(model, run, task, found):
        heads[run.seed, len(heads)] = model.classifier.weight.detach().clone()
        return adapt(model, run, task, found)

    monkeypatch.setattr(training, "adapt", watch)
    for place, seed in enumerate((0, 1, 0)):
        train(settings(encoder, data_dir, seed=seed), tmp_path / f"run{place}")
    assert torch.equal(heads[0, 0], heads[0, 2]) and not torch.equal(heads[0, 0], heads[1, 1])
    assert [line.get("loss") for line in lines(tmp_path / "run1")] != [
        line.get("loss") for line in lines(folders / "sensitivity")
    ]


def test_a_complete_run_is_not_run_again(folders, encoder, data_dir, monkeypatch):
    monkeypatch.setattr(training, "load_encoder", lambda *arguments: pytest.fail("the model was loaded"))
    path = folders / "sensitivity"
    before = {name: (path / name).stat().st_mtime_ns for name in files(path)}
    console = quiet_console()
    result = train(settings(encoder, data_dir), path, progress=training.TrainingProgress(console=console))
    assert result == read(path, "result.json")
    assert "sensitivity: already complete in " in printed(console)
    assert {name: (path / name).stat().st_mtime_ns for name in files(path)} == before


def test_other_settings_are_refused(folders, encoder, data_dir):
    changed = replace(RECIPE, learning_rate=1e-4)
    with pytest.raises(
        ValueError, match=r"holds a run with recipe\.learning_rate = 0\.005, and 0\.0001 was asked"
    ):
        train(settings(encoder, data_dir, recipe=changed), folders / "sensitivity")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="tunes glibc's malloc"
)
def test_large_tensors_do_not_cost_new_pages_in_every_step():
    """In a process of its own, as what other tests leave in the heap decides where a tensor finds room; the
    median, as a use or two may find the room of the last one taken by something small.
    """
    code = (
        "import resource, torch; from adalora_fast.experiments.run.training import keep_freed_memory\n"
        "def use():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    kept = [torch.zeros(50 << 20, dtype=torch.uint8) for _ in range(2)]\n"
        "    del kept\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "keep_freed_memory(); use(); print(sorted(use() for _ in range(9))[4])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 25,600 pages


def test_a_sample_is_marked(encoder, tmp_path):
    data = write_sst2(tmp_path / "data", suffix="_sample")
    result = train(settings(encoder, data, "head"), tmp_path / "run")
    assert result["sample"] is True
    assert result["splits"]["train"]["sample"] is True and result["splits"]["validation"]["sample"] is False


def test_regression_and_two_evaluation_splits(encoder, tmp_path):
    texts = ["the moon", "a star", "old bread", "new soup"] * 2
    for split in ("train", "validation"):
        columns = {"sentence1": texts, "sentence2": texts, "label": [0.0, 1.5, 4.0, 5.0] * 2}
        write_parquet(tmp_path / "stsb" / f"{split}.parquet", **columns)
    for split, labels in (("train", [0, 1, 2, 0]), ("validation_matched", [0, 1, 2, 2]),
                          ("validation_mismatched", [1, 1, 1, 1])):  # fmt: skip
        columns = {"premise": texts, "hypothesis": texts, "label": labels * 2}
        write_parquet(tmp_path / "mnli" / f"{split}.parquet", **columns)
    recipe = replace(RECIPE, epochs=8)
    scores = train(settings(encoder, tmp_path, "lora", task="stsb", recipe=recipe), tmp_path / "a")
    assert set(scores["metrics"]["validation"]) == {"pearson_spearman", "pearson", "spearman", "loss"}
    both = scores["metrics"]["validation"]
    assert scores["primary"] == pytest.approx((both["pearson"] + both["spearman"]) / 2)
    pairs = train(settings(encoder, tmp_path, task="mnli", recipe=recipe), tmp_path / "b")
    values = [pairs["metrics"][f"validation_{name}"]["accuracy"] for name in ("matched", "mismatched")]
    assert pairs["primary"] == pytest.approx(sum(values) / 2)
    assert pairs["best_epoch"]["primary"] >= pairs["primary"]


def test_texts_are_cut_to_the_recipe_length(encoder, data_dir):
    from adalora_fast.experiments.data.rows import tokenize
    from adalora_fast.experiments.data.tasks import load_split

    _, tokenizer = load_encoder(settings(encoder, data_dir), TASK)
    split = load_split(TASK, "train", data_dir)
    lengths = [len(row) for row in tokenize(split, tokenizer, 6)["input_ids"]]
    assert max(lengths) == 6 and min(lengths) >= 4
    assert list(tokenize(split, tokenizer, 6)["labels"]) == split.labels


def test_every_arm_sees_the_same_batches(encoder, data_dir, tmp_path, monkeypatch):
    """Whatever random numbers an arm draws for its adapters: the seed and the epoch decide the order."""
    orders = []
    iterate = trainer.PairedOrder.__iter__

    def watch(self):
        order = list(iterate(self))
        orders.append((self.epoch, order))
        return iter(order)

    monkeypatch.setattr(trainer.PairedOrder, "__iter__", watch)
    for number, options in enumerate(({"method": "lora"}, {"method": "head"}, {"method": "head", "seed": 1})):
        train(settings(encoder, data_dir, **options), tmp_path / str(number), resumable=False)
    lora, head, other = orders[:2], orders[2:4], orders[4:]
    assert lora == head and [epoch for epoch, _ in lora] == [0, 1]
    assert lora[0][1] != lora[1][1] and lora[0][1] != other[0][1]
    assert sorted(lora[0][1]) == list(range(40))


def test_predictions_are_those_of_the_result(folders):
    for label in RUNS:
        result, arrays = (
            read(folders / label, "result.json"),
            load_file(folders / label / "predictions.safetensors"),
        )
        same = arrays["validation/labels"] == arrays["validation/predictions"]
        assert same.double().mean().item() == pytest.approx(result["primary"])
        assert arrays["validation/logits"].shape == (24, 2)
        assert torch.equal(arrays["validation/logits"].argmax(1), arrays["validation/predictions"])


@pytest.mark.parametrize("label", ADAPTIVE)
def test_where_the_budget_went(folders, label):
    saved, every = read(folders / label, "ranks.json")["ranks"], lines(folders / label, "allocation.jsonl")
    log, masks = ([line for line in every if key in line] for key in ("ranks", "mask"))
    assert len(log) + len(masks) == len(every)
    assert [line["step"] for line in log] == list(range(1, 11))
    assert all(sum(line["ranks"]) <= 4 * MATRICES for line in log)
    assert log[-1]["ranks"] == list(saved.values()) and log[-1]["budget"] == 2 * MATRICES
    scores = log[-1]["scores"]
    assert scores["p10"] <= scores["p50"] <= scores["p90"] and scores["lowest_kept"] >= scores["p10"]
    assert log[0]["scores"] is None  # no mask yet
    steps = [line["step"] for line in masks]
    assert steps == sorted(set(steps)) and set(steps) < set(range(1, 11))
    for line in masks:  # the log line of the same step has the same mask
        assert line["mask"]["kept"] == sum(log[line["step"] - 1]["ranks"])
        assert sum(line["terms"]["share"].values()) == pytest.approx(1)
    changed = [line["mask"]["revived"] - line["mask"]["dropped"] for line in masks]
    assert 4 * MATRICES + sum(changed) == 2 * MATRICES


def test_pefts_own_allocation_decides_the_same(encoder, data_dir, folders, tmp_path):
    """The control differs from `sensitivity` in speed alone, here too."""
    result = train(settings(encoder, data_dir, "peft"), tmp_path / "run")
    assert read(tmp_path / "run", "ranks.json") == read(folders / "sensitivity", "ranks.json")
    ours = read(folders / "sensitivity", "result.json")
    assert result["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-5)
    assert (
        result["best_epoch"] is not None and result["arm"] == "peft" and result["total_rank"] == 2 * MATRICES
    )


def test_a_run_that_diverges_is_not_written_as_if_it_were_a_result(encoder, data_dir, tmp_path):
    """Its loss is NaN, which is no JSON: an error that says so, or files that other programs can read."""
    recipe = replace(RECIPE, learning_rate=1e30, max_grad_norm=1e30)
    try:
        train(settings(encoder, data_dir, "full", recipe=recipe), tmp_path / "run")
    except (ValueError, RuntimeError, ArithmeticError) as error:
        assert "learning_rate" in str(error)
        assert not (tmp_path / "run").exists()
    else:
        strict_json((tmp_path / "run" / "result.json").read_text())
