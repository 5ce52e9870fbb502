"""Stored plans: what a tuner measures, how it is kept, what is refused. The times are made up."""

import json

import pytest
import torch

from adalora_fast.ops.adapter import plans, tuned, tuning
from adalora_fast.ops.adapter.costs import MACHINES, OuterPlan, Plan, Problem, Tile

GPU = "NVIDIA H200"
PROBLEM = Problem(backward=False, rows=4096, inner=768, outer=3072, rank=16, size=2, product_size=2)
PLAN = Plan(way="epilogue", matmul=Tile(64, 128, 64, 4, 3), project=Tile(16, 256, 0, 4, 3))
OUTER = OuterPlan(tile=Tile(64, 64, 0, 4, 3), parts=4)
DEVICE = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of one's own, and a GPU with a name."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "_gpu_name", lambda device: GPU)
    tuned._choices.cache_clear()
    yield tmp_path
    tuned._choices.cache_clear()


def store(folder, *entries):
    tuned.write(folder / tuned.file_name(GPU), list(entries), {"made": "here"})
    tuned._choices.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "nvidia-h200.json"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4-40gb.json"),
        ("NVIDIA GeForce RTX 4090 / D", "nvidia-geforce-rtx-4090-d.json"),
    ],
)
def test_one_file_for_each_kind_of_gpu(gpu, name):
    assert tuned.file_name(gpu) == name


def test_what_is_stored_is_found_again(folder):
    entries = tuned.encode("change", PROBLEM, PLAN, 1e-5), tuned.encode("factors", PROBLEM, OUTER, 2e-5)
    store(folder, *entries)
    assert tuned.plan_of(PROBLEM, DEVICE) == PLAN
    assert tuned.outer_plan_of(PROBLEM, DEVICE) == OUTER
    other = Problem(backward=True, rows=4096, inner=768, outer=3072, rank=16, size=2, product_size=2)
    assert tuned.plan_of(other, DEVICE) is None and tuned.outer_plan_of(other, DEVICE) is None


def test_nothing_stored(folder):
    assert tuned.plan_of(PROBLEM, DEVICE) is None


def test_a_new_measurement_replaces_the_old_one_and_nothing_else(folder):
    other = Problem(backward=True, rows=512, inner=768, outer=768, rank=16, size=2, product_size=2)
    store(folder, tuned.encode("change", PROBLEM, PLAN, 1e-5), tuned.encode("change", other, PLAN, 1e-5))
    better = Plan(way="inline", matmul=Tile(128, 128, 64, 8, 3))
    store(folder, tuned.encode("change", PROBLEM, better, 5e-6))
    assert tuned.plan_of(PROBLEM, DEVICE) == better and tuned.plan_of(other, DEVICE) == PLAN
    content = json.loads((folder / tuned.file_name(GPU)).read_text())
    assert len(content["choices"]) == 2 and content["environment"] == {"made": "here"}


def test_ones_own_folder_wins_over_what_is_shipped(folder, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tuned, "SHIPPED", shipped)
    store(shipped, tuned.encode("change", PROBLEM, PLAN, 1e-5), tuned.encode("factors", PROBLEM, OUTER, 1e-5))
    own = Plan(way="inline", matmul=Tile(128, 128, 64, 8, 3))
    store(folder, tuned.encode("change", PROBLEM, own, 1e-5))
    assert tuned.plan_of(PROBLEM, DEVICE) == own
    assert tuned.outer_plan_of(PROBLEM, DEVICE) == OUTER


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        json.dumps({"format": 2, "choices": []}),
        json.dumps({"format": 1}),
        json.dumps({"format": 1, "choices": [{"kind": "change"}]}),
        json.dumps({"format": 1, "choices": [tuned.encode("change", PROBLEM, PLAN, 1.0) | {"kind": "else"}]}),
        json.dumps(
            {"format": 1, "choices": [tuned.encode("change", PROBLEM, PLAN, 1.0) | {"plan": {"way": "x"}}]}
        ),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else(folder, content):
    path = folder / tuned.file_name(GPU)
    path.write_text(content)
    with pytest.raises(
        ValueError, match=r"nvidia-h200.json holds no tuned plans \(.*; delete it or tune"
    ) as error:
        tuned.plan_of(PROBLEM, DEVICE)
    assert "\n" not in str(error.value)


def test_the_tuner_measures_every_candidate_once_and_keeps_the_fastest():
    timed = []

    def timer(calls):
        timed.append((plans._forced, len(calls)))
        return 1.0 if len(timed) != 3 else 0.5  # the third is the fastest of the first problem

    with plans.assuming(MACHINES[80]):
        entries = tuning.tune_layer(256, 96, 64, 16, torch.float16, DEVICE, timer)
    assert [entry["kind"] for entry in entries] == ["change", "change", "change", "factors"]
    assert [entry["problem"]["backward"] for entry in entries] == [False, False, True, True]
    assert [entry["problem"]["inline"] for entry in entries] == [True, False, True, True]
    assert tuned._decode(entries[0])[1] == timed[2][0] and entries[0]["seconds"] == 0.5
    by_problem = [plan for plan, _ in timed]
    assert len(by_problem) > 30 and all(count == timed[0][1] for _, count in timed)
    assert {plan.way for plan in by_problem if isinstance(plan, Plan)} == {"inline", "epilogue", "library"}
    dropped = tuned._decode(entries[1])[0][1]
    assert not dropped.inline


def test_what_the_tuner_stores_is_what_training_asks_for(monkeypatch):
    """The problems of the tuner are the problems of the launchers, to the last field."""
    asked = []
    choose, choose_outer = plans.choose, plans.choose_outer
    monkeypatch.setattr(plans, "choose", lambda p, d: asked.append(("change", p)) or choose(p, d))
    monkeypatch.setattr(
        plans, "choose_outer", lambda p, d: asked.append(("factors", p)) or choose_outer(p, d)
    )
    with plans.assuming(MACHINES[90]):
        entries = tuning.tune_layer(40, 32, 48, 12, torch.float16, DEVICE, lambda calls: 1.0)
        layer = tuning.Layer(40, 32, 48, 12, torch.float16, DEVICE, 1)
        asked.clear()
        layer.forward(dropped=False)[0]()
        layer.forward(dropped=True)[0]()
        layer.backward([True, False, True, True, True])[0]()
    assert asked == [tuned._decode(entry)[0] for entry in entries]


def test_every_offered_plan_computes_the_same(monkeypatch):
    """A tuner may choose any of them, so each must be right."""
    layer = tuning.Layer(48, 64, 32, 4, torch.float16, DEVICE, 1)
    call = layer.forward(dropped=False)[0]
    problem = tuning.launchers.problem_of(layer.x[0], outer=32, rank=4, dtype=torch.float16, backward=False)
    results = []
    for plan in dict.fromkeys(tuning.candidates(problem, MACHINES[80])):
        with plans.forced(plan):
            results.append(call()[0])
    assert len(results) > 8
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=2e-3, atol=2e-3)


def test_tuning_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(tuning.launch, "refusal", lambda device_type: "no CUDA device is visible")
    assert tuning.main(["--shapes", "768x768"]) == 2
    assert "tuning: no CUDA device is visible" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["768", "768x", "x768", "0x5", "768x768x3", "axb"])
def test_shapes_that_are_none(capsys, shape):
    with pytest.raises(SystemExit):
        tuning.main(["--shapes", shape])
    assert f"{shape!r} is not IN x OUT, such as 768x3072" in capsys.readouterr().err
