"""What would fail in every run of a sweep is one line before the first of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adalora_fast.experiments.data.tasks import TASKS, get_task
from adalora_fast.experiments.settings.recipes import load_recipe
from adalora_fast.experiments.settings.settings import METHODS, RunSettings
from adalora_fast.experiments.sweep import preflight
from adalora_fast.experiments.sweep.preflight import count_trained
from tests.helpers.planning import DEFAULTS, GRID, carry_out
from tests.helpers.tiny import RECIPE, changed_encoder, write_parquet, write_sst2
from tests.helpers.training_runs import settings


@pytest.fixture
def refused(plan, tmp_path, pretend):
    """The line that a sweep is refused with; nothing has run and nothing is written."""

    def get(error=ValueError, **options):
        with pytest.raises(error) as caught:
            carry_out(plan(**options), tmp_path / "out")
        assert pretend.ran == [] and not (tmp_path / "out").exists()
        return str(caught.value)

    return get


def changed(**defaults):
    return {"content": {"defaults": DEFAULTS | defaults}}


def test_a_model_that_is_not_reachable(refused):
    line = refused(FileNotFoundError, model="nobody/nothing")
    assert line == (
        "the model 'nobody/nothing' is not reachable; give --model minilm or the path of a local folder"
    )


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_folder_that_lacks_a_file(refused, encoder, tmp_path, damage):
    folder = changed_encoder(encoder, tmp_path / "damaged")
    (folder / damage).unlink()
    if damage == "tokenizer.json":
        for file in [*folder.glob("*token*"), *folder.glob("vocab*")]:
            file.unlink()
    line = refused((FileNotFoundError, ValueError), model=str(folder))
    assert "damaged" in line


def test_a_damaged_checkpoint(refused, encoder, tmp_path):
    folder = changed_encoder(encoder, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in refused(model=str(folder))


def test_data_that_are_not_there(refused, tmp_path):
    line = refused(FileNotFoundError, data_dir=tmp_path / "nowhere")
    assert "no train.parquet or train_sample.parquet in" in line


@pytest.mark.parametrize(
    ("arm", "options", "words"),
    [
        ("lora", changed(matrices=["query", "keys"]), "sst2/lora: a bert encoder has no matrix 'keys'"),
        ("prompt", changed(virtual_tokens=39), "sst2/prompt: prompt: max_length 16 and 39 virtual tokens"),
        ("sensitivity", changed(tinit=50), r"sst2/sensitivity: tinit (50) + tfinal (4) must be smaller"),
        ("peft", changed(precision="fp16"), "sst2/peft: PEFT's own AdaLoRA keeps an fp16 overflow"),
        (
            "lora",
            {"options": {"attention": "fast"}},
            "of type 'bert' cannot use attention 'fast' here; choose eager or sdpa",
        ),
        ("lora", {"options": {"attention": "flash_attention_2"}}, "cannot use attention 'flash_attention_2'"),
        ("bitfit", {"options": {"dtype": "bfloat16"}}, "biases of bfloat16 weights cannot be trained"),
    ],
)
def test_an_arm_that_cannot_run_on_this_model(refused, arm, options, words):
    assert words in refused(arms=[arm], **options)


def test_four_bits_without_bitsandbytes(refused, monkeypatch):
    monkeypatch.setattr("adalora_fast.experiments.models.encoders._is_installed", lambda name: False)
    line = refused(arms=["lora"], options={"dtype": "nf4"})
    assert "dtype nf4 needs bitsandbytes; install it with: pip install 'adalora_fast[quantized]'" in line


def test_texts_longer_than_the_model(refused, tmp_path):
    """40 positions, and a text of more tokens among many short ones."""
    data = write_sst2(tmp_path / "long", train=30, validation=20)
    write_parquet(data / "sst2" / "validation.parquet", sentence=["old"] * 9 + ["a " * 60], label=[0] * 10)
    line = refused(data_dir=data, **changed(max_length=64))
    assert "max_length 64 lets through a text of 62 tokens in validation" in line


def test_a_compiler_that_does_not_work(refused, monkeypatch):
    def broken(module):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(preflight.torch, "compile", broken)
    line = refused(options={"compile": True})
    assert line == "--compile does not work here (no C++ compiler); leave it out"


def test_a_disk_without_room(refused, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=50_000))
    line = refused(arms=["full"])
    assert (
        "the 2 runs that are left write at least 0.7 MB to" in line and "0.1 MB are free; make room" in line
    )


def test_a_cache_that_cannot_be_written(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "CACHED_ROWS", 10)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("ADALORA_FAST_CACHE", str(tmp_path / "cache"))
    assert "set ADALORA_FAST_CACHE to another folder" in refused(OSError)


def test_what_is_complete_needs_neither_model_nor_room(plan, tmp_path, pretend, monkeypatch):
    """Only the runs that are left are looked at: a sweep that is complete says so at once."""
    assert carry_out(plan(), tmp_path / "out")[0] == 0
    monkeypatch.setattr(preflight, "load_encoder", lambda *arguments: pytest.fail("the model was loaded"))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    failed, said = carry_out(plan(), tmp_path / "out")
    assert failed == 0 and said == "sweep: 4 runs, 4 of them complete already\n"


def test_every_method_is_looked_at_without_its_numbers(encoder, data_dir):
    """On the meta device, as many numbers as the run itself trains."""
    from adalora_fast.experiments.methods.adapters import adapt
    from adalora_fast.experiments.models.loading import load_encoder, outline_encoder

    task = get_task("sst2")
    for method in METHODS:
        if method == "fusion":
            continue
        run = settings(encoder, data_dir, method, recipe=replace(RECIPE, bottleneck=4, virtual_tokens=3))
        model = adapt(load_encoder(run, task)[0], run, task)
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        assert preflight.count_trained(outline_encoder(run, task), run, task) == trained, method


def test_a_sweep_that_is_in_order_goes_on(plan, tmp_path, pretend):
    failed, said = carry_out(plan(), tmp_path / "out")
    assert failed == 0 and len(pretend.ran) == len(GRID["arms"]) * len(GRID["seeds"])
    assert said.splitlines()[0] == "checking the model, the data and the arms"


@pytest.mark.parametrize(("rank", "share"), [(1, 0.024), (4, 0.097), (16, 0.386), (64, 1.545), (256, 6.180)])
def test_the_uniformity_studys_shares_of_parameters(rank, share):
    """Published in per cent for mBART-large-CC25; query and value of all 36 attention modules have them."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    with torch.device("meta"):
        model = MBartForConditionalGeneration(
            MBartConfig(
                vocab_size=250027,
                d_model=1024,
                encoder_layers=12,
                decoder_layers=12,
                encoder_attention_heads=16,
                decoder_attention_heads=16,
                encoder_ffn_dim=4096,
                decoder_ffn_dim=4096,
            )
        )
    base = sum(parameter.numel() for parameter in model.parameters())
    recipe = load_recipe("thesis-enro", "wmt16_ro_en", f"lora-r{rank}")
    run = RunSettings(task="wmt16_ro_en", model="mbart", method="lora", recipe=recipe)
    assert round(100 * count_trained(model, run, TASKS["wmt16_ro_en"]) / base, 3) == share
