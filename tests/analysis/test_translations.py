"""Translation runs compared with each other: the loss by hand, representations, paths, soups, and BLEU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from adalora_fast.analysis import analyze_cka, analyze_connectivity, make_soup
from adalora_fast.analysis.rows import read_rows
from adalora_fast.analysis.saved import open_run, open_runs
from adalora_fast.analysis.shared import SharedModel
from adalora_fast.analysis.translations import ACCURACY, PairSet, mean_decoder_states
from adalora_fast.experiments.data.tasks import TASKS
from adalora_fast.experiments.data.translation import set_languages
from adalora_fast.experiments.settings.recipes import Recipe
from adalora_fast.experiments.settings.settings import RunSettings
from tests.helpers.mbart import needs_sentencepiece, pairs, save_mbart, write_pairs
from tests.helpers.training_runs import train

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (the experiments extra)")
pytestmark = needs_sentencepiece

TASK = TASKS["wmt16_ro_en"]
RECIPE = Recipe(
    epochs=1, learning_rate=5e-3, batch_size=8, max_length=20, beams=2, init_r=2, target_r=2, scale=4.0,
    warmup=0, matrices=("query", "value", "cross query", "cross value"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two LoRA runs and a full one, on 16 pairs and eight others."""
    place = tmp_path_factory.mktemp("translations")
    english, romanian = pairs(24)
    data = write_pairs(
        place / "data", train=(english[:16], romanian[:16]), validation=(english[16:], romanian[16:])
    )
    model, found = save_mbart(place / "mbart"), []
    for method, seed in (("lora", 0), ("lora", 1), ("full", 0)):
        recipe = RECIPE if method == "lora" else replace(RECIPE, matrices=None, learning_rate=1e-3)
        values = {"task": TASK.name, "model": str(model), "data_dir": str(data), "recipe": recipe}
        found.append(place / f"{method}-{seed}")
        train(RunSettings(method=method, seed=seed, **values), found[-1], resumable=False)
    return found


@pytest.fixture(scope="module")
def opened(folders):
    """(runs, model with the first run's weights in it, what it changed)."""
    runs = open_runs(folders)
    shared = SharedModel.load(runs[0].settings, device="cpu")
    return runs, shared, shared.read(runs)


def test_the_loss_is_that_of_every_row_by_itself(opened):
    """In float64, without batches and without padding."""
    runs, shared, changes = opened
    rows = read_rows(runs[0].settings)
    set_languages(shared.tokenizer, TASK)
    total, right, count = 0.0, 0, 0
    with shared.mixed(changes[:1], [1.0]) as model, torch.inference_mode():
        for source, target in zip(rows.sources, rows.targets, strict=True):
            given = shared.tokenizer(
                source, text_target=target, truncation=True, max_length=20, return_tensors="pt"
            )
            logits = model(**given).logits[0].double().log_softmax(-1)
            labels = given["labels"][0]
            total -= float(logits[range(len(labels)), labels].sum())
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
        for tokens in (40, 10_000):
            data = PairSet(
                runs[0].settings, {"rows": rows}, shared.tokenizer, torch.device("cpu"), tokens=tokens
            )
            found = data.evaluate(model, "rows")
            assert found.loss == pytest.approx(total / count, rel=1e-5)
            assert found.metrics == {ACCURACY: pytest.approx(right / count)}


def test_generated_texts_are_judged_as_the_run_judged_them(opened):
    runs, shared, changes = opened
    rows = read_rows(runs[0].settings)
    device = torch.device("cpu")
    data = PairSet(runs[0].settings, {"rows": rows}, shared.tokenizer, device, generates=True)
    assert data.primary_metric == "bleu"
    with shared.mixed(changes[:1], [1.0]) as model:
        found = data.evaluate(model, "rows").metrics
    own = runs[0].result["metrics"]["validation"]
    assert found["bleu"] == pytest.approx(own["bleu"], abs=1e-6)
    assert found["chrf"] == pytest.approx(own["chrf"], abs=1e-6)


def test_states_are_means_over_the_targets_own_tokens(opened):
    runs, shared, changes = opened
    rows = read_rows(runs[0].settings)
    with shared.mixed(changes[:1], [1.0]) as model:
        states = [
            mean_decoder_states(model, shared.tokenizer, TASK, rows, max_length=20, tokens=tokens)
            for tokens in (40, 10_000)
        ]
        np.testing.assert_allclose(states[0], states[1], atol=1e-5)
        assert states[0].shape[:2] == (model.config.decoder_layers + 1, len(rows))
        given = shared.tokenizer(
            rows.sources[3], text_target=rows.targets[3], truncation=True, max_length=20, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**given, output_hidden_states=True).decoder_hidden_states[-1][0]
    words = given["labels"].shape[1] - 2  # without the end and the language; the decoder reads one place on
    np.testing.assert_allclose(states[0][-1, 3], hidden[1 : 1 + words].mean(0).numpy(), atol=1e-5)
    empty = replace(rows, targets=["", *rows.targets[1:]])
    with pytest.raises(ValueError, match="row 0 of the data has a translation without a token"):
        mean_decoder_states(shared.model, shared.tokenizer, TASK, empty, max_length=20)


def test_cka_and_paths_with_a_full_run(folders, tmp_path):
    result = analyze_cka(folders, output=tmp_path / "cka", cache=tmp_path / "cache")
    matrix = np.array(result["cka"])
    assert matrix.shape == (3, 3) and np.allclose(np.diag(matrix), 1) and matrix.min() < 0.9999
    assert "of the decoder under the given translation" in (tmp_path / "cka" / "cka.md").read_text()
    again = analyze_cka(folders, cache=tmp_path / "cache")
    assert again["cka"] == result["cka"]
    paths = analyze_connectivity(folders, output=tmp_path / "paths", points=3)
    assert paths["primary_metric"] == ACCURACY and len(paths["paths"]) == 3
    assert (tmp_path / "paths" / "connectivity.md").is_file() and (tmp_path / "paths" / "paths.png").is_file()
    scored = analyze_connectivity(folders[:2], points=3, rows=4, generate=True)
    assert scored["primary_metric"] == "bleu" and set(scored["paths"][0]["metrics"]) == {
        ACCURACY, "bleu", "chrf",
    }  # fmt: skip


def test_a_soup_of_translations(folders, tmp_path):
    result = make_soup(folders[:2], tmp_path / "soup", generate=True)
    assert result["ensemble"] is None and result["saved"]["error"] == 0
    assert result["greedy"]["loss"] <= min(each["selection"]["loss"] for each in result["members"])
    text = (tmp_path / "soup" / "soup.md").read_text()
    assert "BLEU" in text and "| ensemble of logits |" not in text
    full = make_soup(folders, tmp_path / "full", save="full", recipe="averaging")
    assert full["saved"] == {"soup": "averaging", "form": "full"}


def test_generate_is_for_translations(runs, tmp_path):
    with pytest.raises(ValueError, match="generate is for translations, and these runs are on sst2"):
        make_soup([runs["lora-2"], runs["lora-4"]], tmp_path / "soup", generate=True)


def test_an_opened_run_is_the_translator(folders):
    assert open_run(folders[0]).task.kind == "translation"
