"""The command line: whole commands, their flags, help, silence, and defects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_fast import cli
from adalora_fast.experiments.run import single
from tests.commands.calling import ROOT, SETTINGS, refused, run, sweep, train
from tests.helpers.tiny import write_parquet


def test_train_again_and_report(capsys, here):
    code, out, err = run(capsys, train(score="fisher"))
    assert code == 0
    assert "fisher: accuracy " in out and "total rank 24" in out and f"run  {here / 'out'}" in out
    assert "validation: accuracy " in out
    result = json.loads((here / "out" / "result.json").read_text())
    before = (here / "out" / "result.json").stat().st_mtime_ns
    code, out, err = run(capsys, train(score="fisher"))
    assert code == 0 and "already complete in" in out and err == ""
    assert (here / "out" / "result.json").stat().st_mtime_ns == before
    code, out, err = run(capsys, ["report", "."])
    assert code == 0 and "fisher" in out and f"{result['primary']:.3f}" in out and err == ""
    code, out, err = run(capsys, ["report", "out", "--html"])
    assert code == 0 and "out/report/report.html" in out.replace("\n", "") and err == ""
    assert f'"seed":{result["seed"]}' in (here / "out" / "report" / "report.html").read_text()


def test_evaluate(capsys, here):
    """A run of `train` on a file of labelled rows: the table, the folder; and the same again from there."""
    assert cli.main(train("--method", "lora")) == 0
    capsys.readouterr()
    rows = write_parquet(here / "rows.parquet", sentence=["old moon", "warm soup"], label=[0, 1])
    code, out, err = run(capsys, ["evaluate", "out", "--file", "rows.parquet"])
    assert code == 0 and err == ""
    assert "rows.parquet" in out and "accuracy" in out and "95% interval" in out
    found = json.loads((here / "out" / "evaluations" / "rows" / "evaluation.json").read_text())
    assert found["splits"]["file"]["source"] == rows.name and found["splits"]["file"]["rows"] == 2
    code, again, err = run(capsys, ["evaluate", "out", "--file", "rows.parquet"])
    assert (
        code == 0 and "evaluated before, in" in again and f"{found['metrics']['file']['loss']:.4f}" in again
    )
    code, out, _ = run(capsys, ["evaluate", "out", "--split", "train"])
    assert code == 0 and "training" in out
    assert cli.main(train("--method", "lora")) == 0  # the run is still the complete one


def test_the_recipes_model_unless_another_is_named(here, capsys, monkeypatch):
    """`train --recipe` is of the model that the recipe is for; without either it is DeBERTa-v3-base."""
    seen = []
    monkeypatch.setattr(single, "open_run", lambda output, settings: seen.append(settings) or 1 / 0)
    content = json.loads((here / "recipe.json").read_text()) | {"model": "roberta-base"}
    (here / "other.json").write_text(json.dumps(content))
    for flags in (["--recipe", "other.json"], ["--recipe", "other.json", "--model", "minilm"], []):
        with pytest.raises(ZeroDivisionError):
            cli.main(["train", "--task", "sst2", "--data-dir", "data", *flags])
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--task", "wmt16_ro_en", "--data-dir", "data", "--method", "lora"])
    models = ["roberta-base", "minilm", "microsoft/deberta-v3-base", "facebook/mbart-large-cc25"]
    assert [settings.model for settings in seen] == models
    (here / "none.json").write_text(json.dumps({"defaults": {}}))
    line = refused(capsys, ["train", "--task", "sst2", "--data-dir", "data", "--recipe", "none.json"])
    assert "recipe none.json names no model; give --model" in line


def test_flags_reach_the_run(here, capsys):
    flags = ["--set", "init_r=6", "target_r=3", "learning_rate=0.002", "epochs=3", "train_rows=20"]
    flags += ["--seed", "5", "--dtype", "bfloat16", "--attention", "eager"]
    flags += ["--score", "movement+sum+task"]
    assert cli.main(train(*flags, output=None)) == 0
    (folder,) = (here / "runs" / "sst2").iterdir()
    assert folder.name == "bert-movement+sum+task-seed5"  # runs/<task>/<model>-<method>-seed<seed>
    settings = json.loads((folder / "config.json").read_text())["settings"]
    expected = {
        "score": "movement",
        "smoothing": "sum",
        "score_gradient": "task",
        "seed": 5,
        "method": "adalora",
        "dtype": "bfloat16",
        "attention": "eager",
    }
    assert {name: settings[name] for name in expected} == expected
    recipe = SETTINGS | {"init_r": 6, "target_r": 3, "learning_rate": 0.002, "epochs": 3, "train_rows": 20}
    assert {name: settings["recipe"][name] for name in recipe} == recipe


def test_the_data_folder_from_the_environment(capsys, here, monkeypatch):
    monkeypatch.setenv("ADALORA_FAST_DATA", str(here / "data"))
    assert cli.main(train("--method", "head", data_dir=None)) == 0
    monkeypatch.setenv("ADALORA_FAST_DATA", "/no/such/folder")
    assert cli.main(train("--method", "head", output="other")) == 0  # the flag goes before it


def test_another_spelling_of_the_same_folders_is_the_same_run(capsys, here):
    assert cli.main(train("--method", "head")) == 0
    capsys.readouterr()
    again = train("--method", "head", data_dir=here / "data", model=here / "bert")
    code, out, err = run(capsys, again)
    assert code == 0 and "already complete" in out, err


def test_brackets_in_a_path_are_shown(capsys, here):
    code, out, _ = run(capsys, train("--method", "head", output="a[b]/c"))
    assert code == 0 and f"run  {here}/a[b]/c" in out


def test_a_sweep_and_its_report(capsys, here):
    arguments = sweep("--tasks", "sst2", "--arms", "uniform", "head", "--seeds", "3")
    code, out, err = run(capsys, arguments)
    assert code == 0 and err == "", err
    assert "sweep: 2 runs, 0 of them complete already" in out and "adalora-fast report out" in out
    code, out, _ = run(capsys, arguments)
    assert code == 0 and "2 of them complete already" in out
    code, out, err = run(capsys, ["report", "out"])
    assert code == 0 and err == "" and "out/report/report.md" in out.replace("\n", "")
    text = (here / "out" / "report" / "report.md").read_text()
    assert "uniform" in text and "head" in text
    code, out, _ = run(capsys, ["report", "out", "--output", "there"])
    assert code == 0 and (here / "there" / "report.md").is_file()
    assert not list(here.rglob("report.html"))
    code, out, err = run(capsys, ["report", "out", "--html"])
    assert code == 0 and err == "" and "out/report/report.html" in out.replace("\n", "")
    assert (here / "out" / "report" / "report.html").is_file()


def test_a_sweep_with_a_failure_says_so_with_its_exit_code(capsys, here):
    common = ["--tasks", "sst2", "--arms", "head", "--seeds", "0"]
    blocked = here / "out" / "sst2" / ".head-seed0.partial"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be")
    code, out, _ = run(capsys, sweep(*common))
    assert code == 1 and "failed: sst2/head-seed0: FileExistsError: cannot write to" in out
    assert (here / "out" / "sst2" / "head-seed0.failed.json").is_file()


def test_demo_passes_its_flags_on(monkeypatch, here):
    from adalora_fast.experiments import demo

    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: seen.append(options))
    for arguments in ([], ["--fast"], ["--fast", "--seed", "3", "--output", "there"]):
        assert cli.main(["demo", *arguments]) == 0
    assert [(o["output"], o["fast"], o["seed"]) for o in seen] == [
        (Path("runs/demo"), False, 0),
        (Path("runs/demo-fast"), True, 0),
        (Path("there"), True, 3),
    ]


def test_analyze_and_soup_pass_their_flags_on(monkeypatch, here, capsys):
    from adalora_fast import analysis

    seen = {}
    for name in ("analyze_cka", "analyze_connectivity", "make_soup"):
        monkeypatch.setattr(
            analysis, name, lambda *given, name=name, **more: seen.update({name: (given, more)})
        )
    assert cli.main(["analyze", "cka", "a", "b", "--rows", "64", "--layers", "--cache", "c"]) == 0
    assert cli.main(["analyze", "connectivity", "a", "b", "--points", "5", "--output", "there"]) == 0
    assert cli.main(["soup", "a", "b", "--rank", "8", "--recipe", "uniform"]) == 0
    given, more = seen["analyze_cka"]
    assert given == ((Path("a"), Path("b")),) and (more["rows"], more["layers"], more["cache"]) == (
        64,
        True,
        Path("c"),
    )
    given, more = seen["analyze_connectivity"]
    assert (more["points"], more["output"]) == (5, Path("there")) and "cache" not in more
    given, more = seen["make_soup"]
    assert given == ((Path("a"), Path("b")), Path("runs/soup"))
    assert (more["rank"], more["recipe"], more["save"], more["selection"]) == (8, "uniform", "lora", "halves")


def test_a_defect_keeps_its_traceback(monkeypatch):
    """Only what this package says itself is shown as one line."""

    def fail(*arguments, **options):
        return int("three")

    monkeypatch.setattr("adalora_fast.experiments.demo.run_demo", fail)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["demo"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # torch.save
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk_is_no_defect(monkeypatch, capsys, error):
    def fail(**options):
        raise error

    monkeypatch.setattr("adalora_fast.experiments.demo.run_demo", fail)
    code, _, err = run(capsys, ["demo"])
    assert (
        code == 2
        and err.startswith("adalora-fast: there is no room left to write (")
        and "\n" not in err[:-1]
    )
    assert err.endswith("); make some, and the same command goes on\n")


def test_an_interruption(monkeypatch, capsys):
    def stop(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("adalora_fast.experiments.demo.run_demo", stop)
    code, _, err = run(capsys, ["demo"])
    assert code == 130 and err == "adalora-fast: interrupted; the same command goes on\n"


@pytest.mark.parametrize(
    "arguments", [[], ["nope"], ["train"], ["train", "--task", "sst2", "--seed", "many"]]
)
def test_wrong_usage(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS if name != "bench")])
def test_help_names_every_flag_and_there_are_fewer_than_fifteen(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    if not command:
        assert all(name in shown for name in cli.COMMANDS)
        return
    fields = [
        name
        for name in cli.COMMANDS[command[0]].__dataclass_fields__
        if name not in ("folder", "folders", "measure", "out")
    ]
    assert len(fields) < 15
    assert all(f"--{name.replace('_', '-')}" in shown for name in fields)


def in_a_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, done.stderr


def test_help_answers_at_once():
    """Nothing heavy is imported to print it."""
    code = (
        "import sys\n"
        "from adalora_fast.cli import main\n"
        "try:\n    main(['train', '--help'])\n"
        "except SystemExit as stop:\n    print('code', stop.code)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'matplotlib', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    returned, out, err = in_a_process(code)
    assert returned == 0, err
    assert out.splitlines()[-2:] == ["code 0", "[]"]


def test_a_run_is_silent_on_stderr(here):
    """As a user runs it, with no library loaded before: neither bars nor reports nor warnings of others."""
    done = subprocess.run(
        [sys.executable, "-m", "adalora_fast", *train("--method", "lora")],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            k: v
            for k, v in os.environ.items()
            if k not in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY")
        }
        | {"PYTHONPATH": str(ROOT)},
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("lora-r2: accuracy ")
