"""``export_folder`` and ``adalora-fast export``: files in, files out, the same as by the model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_fast import cli, to_lora
from adalora_fast.integrations.export import export_folder
from tests.helpers.checkpoints import ADAPTER, checkpoints, loaded_by_peft
from tests.helpers.peft_models import logits, no_warning, one_line
from tests.integrations.exporting import off, rules


@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
@pytest.mark.parametrize("by", ["fused", "peft"])
def test_files_alone_give_what_the_model_gives(by, uniform, tmp_path):
    saved = checkpoints()
    to_lora(saved.finished, uniform=uniform).save_pretrained(tmp_path / "model")
    folder = saved.end
    if by == "peft":
        folder = tmp_path / "saved by peft"
        loaded_by_peft(saved.end).save_pretrained(folder)
    with no_warning():
        plain = export_folder(folder, tmp_path / "files", uniform=uniform)
    configs, tensors = zip(*(rules(tmp_path / name) for name in ("model", "files")), strict=True)
    assert {**configs[0], "target_modules": None} == {**configs[1], "target_modules": None}
    assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])
    assert tensors[0].keys() == tensors[1].keys() and plain.ranks == saved.ranks
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == [
        "README.md",
        "adapter_config.json",
        ADAPTER,
    ]
    assert off(logits(loaded_by_peft(tmp_path / "files")), saved.end_logits) <= 1e-5


def test_files_from_before_the_final_mask_warn(tmp_path):
    with pytest.warns(UserWarning, match="final budget of 26"):
        export_folder(checkpoints().middle, tmp_path / "out")
    assert off(logits(loaded_by_peft(tmp_path / "out")), checkpoints().middle_logits) <= 1e-5


def changed_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_tensors(folder, change):
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
DAMAGES = {
    "truncated": (
        lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:999]),
        ADAPTER,
        "restore it",
    ),
    "missing factor": (
        lambda f: changed_tensors(f, lambda t: t.pop(f"{QUERY}.lora_B")),
        "lacks",
        "query.lora_B",
    ),
    "other rank": (
        lambda f: changed_tensors(f, lambda t: t.update({f"{QUERY}.lora_B": torch.ones(16, 3)})),
        "query",
        "(16, 3)",
    ),
    "nothing of AdaLoRA": (
        lambda f: changed_tensors(f, lambda t: t.clear() or t.update(x=torch.ones(1))),
        "lora_E",
    ),
    "NaN": (
        lambda f: changed_tensors(f, lambda t: t[f"{QUERY}.lora_A"].fill_(float("nan"))),
        "lora_A",
        "NaN",
    ),
    "integers": (
        lambda f: changed_tensors(f, lambda t: t.update({f"{QUERY}.lora_A": t[f"{QUERY}.lora_A"].long()})),
        "int64",
    ),
    "pickle": (
        lambda f: (f / ADAPTER).rename(f / "adapter_model.bin"),
        "adapter_model.bin",
        "only safetensors",
    ),
    "plain LoRA": (lambda f: changed_config(f, peft_type="LORA"), "'LORA'", "ADALORA"),
    "no alpha": (lambda f: changed_config(f, lora_alpha=None), "lora_alpha", "None"),
    "infinite alpha": (lambda f: changed_config(f, lora_alpha=float("inf")), "lora_alpha", "inf"),
    "init_r as text": (lambda f: changed_config(f, init_r="4"), "init_r", "'4'"),
    "strange setting": (lambda f: changed_config(f, layers_pattern="x"), "settings", "layers_to_transform"),
    "list for a config": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        "adapter_config.json",
        "list",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_and_nothing_is_written(damage, tmp_path):
    spoil, *pieces = DAMAGES[damage]
    shutil.copytree(checkpoints().middle, tmp_path / "in")
    spoil(tmp_path / "in")
    with one_line(ValueError, *pieces):
        export_folder(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with one_line(ValueError, tmp_path / "out", "choose another"):
        export_folder(checkpoints().end, tmp_path / "out")
    with one_line(ValueError, "no folder", tmp_path / "nowhere"):
        export_folder(tmp_path / "nowhere", tmp_path / "new")


def test_the_command(tmp_path, capsys):
    folder, out = str(checkpoints().end), str(tmp_path / "out")
    assert cli.main(["export", folder, out, "--uniform", "--base", "some/base"]) == 0
    shown = capsys.readouterr().out
    assert "26 triplets in 13 matrices, r = 4" in shown and "vllm: it has whole trained modules" in shown
    config, _ = rules(tmp_path / "out")
    assert config["base_model_name_or_path"] == "some/base" and config["rank_pattern"] == {}
    assert "Base model: some/base" in (tmp_path / "out" / "README.md").read_text()
    assert cli.main(["export", folder, out]) == 2
    assert capsys.readouterr().err.startswith(f"adalora-fast: {out} is not an empty folder")
