"""Representations against a text at a time, what is kept of them, and CKA of runs."""

import numpy as np
import pytest
import torch

from adalora_fast.analysis import features
from adalora_fast.analysis.analyses import analyze_cka
from adalora_fast.analysis.cka import linear_cka
from adalora_fast.analysis.features import FeatureReader, hash_of_base, mean_states
from adalora_fast.analysis.rows import read_rows
from adalora_fast.analysis.saved import open_run
from adalora_fast.analysis.shared import SharedModel
from tests.helpers.tiny import LAYERS, WIDTH, changed_encoder
from tests.helpers.training_runs import read

TEXTS = (["near far warm cold soup " * 6, "the moon", "zebra bread and a comet"], ["star"] * 3)


@pytest.fixture(scope="module")
def shared(runs):
    return SharedModel.load(open_run(runs["head"]).settings, device="cpu")


@pytest.mark.parametrize("side", ["right", "left"])
def test_means_over_own_tokens(runs, side):
    shared = SharedModel.load(open_run(runs["head"]).settings, device="cpu")
    shared.tokenizer.padding_side = side
    shared.model.bert.embeddings.position_embeddings.weight.zero_()  # else padding on the left moves values
    found = mean_states(shared.model, shared.tokenizer, TEXTS, max_length=16, tokens=32)
    assert found.shape == (LAYERS + 1, 3, WIDTH) and found.dtype == np.float32
    for row, (first, second) in enumerate(zip(*TEXTS)):
        inputs = shared.tokenizer(first, second, truncation=True, max_length=16, return_tensors="pt")
        tokens = shared.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        own = [i for i, token in enumerate(tokens) if token not in ("[CLS]", "[SEP]")]  # [UNK] is one
        with torch.no_grad():
            states = shared.model(**inputs, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            np.testing.assert_allclose(found[layer, row], state[0, own].mean(0).numpy(), atol=2e-6)


def test_a_text_without_tokens(shared):
    with pytest.raises(ValueError, match="row 1"):
        mean_states(shared.model, shared.tokenizer, (["moon", " "],), max_length=16, tokens=32)


def reader(shared, run, cache, **options):
    rows = read_rows(run.settings).take(options.pop("rows", 9))
    return FeatureReader(shared, rows, **({"max_length": 16, "cache": cache} | options))


def test_the_cache(runs, shared, tmp_path, monkeypatch):
    run, other = open_run(runs["lora-4"]), open_run(runs["lora-2"])
    change, second = shared.read([run, other])
    computed = []
    original = features.mean_states
    monkeypatch.setattr(
        features, "mean_states", lambda *args, **kw: computed.append(1) or original(*args, **kw)
    )
    first = reader(shared, run, tmp_path).read(run, change, [-1, 0])
    again = reader(shared, run, tmp_path).read(run, change, [-1, 0])
    assert len(computed) == 1 and all(np.array_equal(a, b) for a, b in zip(first, again))
    assert first[0].shape == (9, WIDTH) and not np.array_equal(*first)
    reader(shared, run, tmp_path).read(other, second, [0])  # another run
    reader(shared, run, tmp_path, rows=8).read(run, change, [0])  # other rows
    reader(shared, run, tmp_path, max_length=12).read(run, change, [0])
    assert len(computed) == 4
    reader(shared, run, None).read(run, change, [0])
    assert len(computed) == 5 and len(list(tmp_path.iterdir())) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    repaired = reader(shared, run, tmp_path).read(run, change, [-1, 0])
    assert len(computed) == 6 and np.array_equal(repaired[0], first[0])


def test_another_base_is_another_key(shared, runs):
    settings = open_run(runs["head"]).settings
    assert hash_of_base(SharedModel.load(settings, device="cpu").model) == hash_of_base(shared.model)
    changed = SharedModel.load(settings, device="cpu").model
    changed.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
    assert hash_of_base(changed) != hash_of_base(shared.model)


def test_layers(shared, runs):
    read_layers = reader(shared, open_run(runs["head"]), None)
    assert [read_layers.place(layer) for layer in (0, -1, LAYERS, -LAYERS - 1)] == [0, LAYERS, LAYERS, 0]
    with pytest.raises(ValueError, match=f"no layer 3; choose 0 .* to {LAYERS}"):
        read_layers.place(3)


def test_runs_with_runs(runs, tmp_path):
    folders = [runs[name] for name in ("lora-2", "lora-2", "adalora-1", "full")]
    result = analyze_cka(folders, output=tmp_path / "out", cache=tmp_path / "cache", layers=True)
    matrix = np.array(result["cka"])
    assert read(tmp_path / "out", "cka.json") == result
    assert matrix[0, 1] == pytest.approx(1.0, abs=1e-12) and 0 < matrix[0, 2] < 0.999
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert result["layer"] == LAYERS and result["rows"]["rows"] == 24
    assert len(result["layers"]) == 6
    layers = {(pair["a"], pair["b"]): np.array(pair["cka"]) for pair in result["layers"]}
    assert layers[0, 3].shape == (LAYERS + 1, LAYERS + 1)
    assert layers[0, 3][-1, -1] == pytest.approx(matrix[0, 3]) and layers[0, 3][0, 0] == pytest.approx(1)
    groups = result["groups"]
    assert groups == ["lora-r2", "full", "fisher"]
    means = result["group_means"]
    assert means[0][0] == pytest.approx(1.0) and means[1][1] is None
    assert means[0][2] == pytest.approx(matrix[:2, 3].mean())
    assert result["group_pairs"] == [[1, 2, 2], [2, 0, 1], [2, 1, 0]]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {f"{name}.{kind}" for name in ("cka", "cka-layers") for kind in ("png", "svg")}
    assert names == figures | {"cka.json", "cka.md"}


def test_runs_with_runs_against_plain_models(runs):
    """Two opened models, their states by hand, and the formula."""
    from adalora_fast.analysis.shared import open_model

    folders = [runs["full"], runs["adalora-0"]]
    found = analyze_cka(folders, rows=10, layer=1)["cka"][0][1]
    states = []
    for folder in folders:
        model, tokenizer, run = open_model(folder, device="cpu")
        texts = read_rows(run.settings).take(10).texts
        states.append(mean_states(model, tokenizer, texts, max_length=16, tokens=1)[1])
    assert found == pytest.approx(linear_cka(*states), abs=1e-6)


def test_batches_and_other_bases(runs, encoder, tmp_path):
    folders = [runs["lora-2"], runs["lora-4"]]
    whole = analyze_cka(folders)["cka"][0][1]
    batches = analyze_cka(folders, batch_size=8)
    assert batches["batch_size"] == 8 and batches["cka"][0][1] == pytest.approx(whole, abs=0.2)
    assert batches["cka"][0][1] != whole
    moved = changed_encoder(encoder, tmp_path / "moved")
    assert analyze_cka(folders, model=str(moved))["cka"][0][1] == pytest.approx(whole, abs=1e-9)
    with pytest.raises(ValueError, match="no split 'test'"):
        analyze_cka(folders, split="test")
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        analyze_cka(folders, data_dir=tmp_path)
