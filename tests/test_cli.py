"""The command line: whole commands, and one line and exit code 2 for every mistake of the user."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_fast import cli
from adalora_fast.experiments import single
from tests.experiments.tiny import save_encoder, write_parquet, write_sst2

ROOT = Path(__file__).parents[1]
SETTINGS = {"epochs": 2, "learning_rate": 5e-3, "batch_size": 8, "max_length": 16, "init_r": 4, "target_r": 2}
SETTINGS |= {"tinit": 2, "tfinal": 4, "deltaT": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model (bert), data (data) and a recipe (recipe.json)."""
    root = tmp_path_factory.mktemp("place")
    save_encoder(root / "bert")
    write_sst2(root / "data")
    (root / "recipe.json").write_text(json.dumps({"defaults": SETTINGS}))
    return root


@pytest.fixture(autouse=True)
def here(place, tmp_path, monkeypatch):
    """Commands run in a folder of their own, without a network."""
    for name in ("bert", "data", "recipe.json"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    if "huggingface_hub" in sys.modules:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if "transformers" in sys.modules:  # imported by an earlier test, so that the variables come too late
        monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.delenv("ADALORA_FAST_DATA", raising=False)
    monkeypatch.setattr(cli.warnings, "filterwarnings", lambda *arguments, **options: None)
    return tmp_path


def train(*more, **changes):
    """Arguments of a run that works, changed; None leaves one out."""
    options = {
        "task": "sst2",
        "model": "./bert",
        "data-dir": "data",
        "recipe": "recipe.json",
        "output": "out",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return ["train", *(word for pair in given for word in pair), *map(str, more)]


def run(capsys, arguments):
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, arguments):
    """The one line that says what is wrong."""
    code, _, err = run(capsys, arguments)
    assert code == 2, err
    line = err.splitlines()[-1]
    assert err == line + "\n" and line.startswith("adalora-fast: ")
    assert "Traceback" not in err
    return line


def left_behind(folder):
    return sorted({path.name for path in folder.iterdir()} - {"bert", "data", "recipe.json"})


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "squid"}, "unknown task 'squid'; choose one of mrpc"),
        ({"task": "mrpc"}, "no train.parquet or train_sample.parquet in {here}/data/mrpc; check --data-dir"),
        ({"data_dir": "/no/such/folder"}, "no train.parquet or train_sample.parquet in /no/such/folder/sst2"),
        (
            {"data_dir": None},
            "nyu-mll/glue (sst2, train) is not reachable; give a local folder with --data-dir",
        ),
        ({"model": "./nowhere"}, "no model folder at nowhere; check --model"),
        ({"model": "/no/such/model"}, "no model folder at /no/such/model; check --model"),
        ({"model": "data/"}, "has no config.json; give a folder written by save_pretrained"),
        ({"recipe": "nope"}, "no recipe 'nope'; choose adalora-glue, "),
        ({"data_dir": "two\nlines"}, "no train.parquet or train_sample.parquet in {here}/two lines/sst2"),
        ({"method": "prefixes"}, "unknown method 'prefixes'; choose one of adalora, peft, lora, full, head"),
        ({"score": "luck"}, "unknown arm 'luck'; choose one of sensitivity, "),
        ({"score": "fisher+much"}, "unknown part 'much' of the arm 'fisher+much'; choose ema_uncertainty, "),
        ({"score": "lora"}, "lora is no score but a method; give --method lora"),
        ({"set": "target_r=9"}, "target_r (9) is larger than init_r (4); raise init_r"),
        ({"set": "epochs=0"}, "epochs is 0; it must be greater than 0"),
        ({"set": "learning_rate=-1"}, "learning_rate is -1; it must be greater than 0"),
    ],
)
def test_mistakes_before_anything_is_written(capsys, here, changes, words):
    assert words.format(here=here) in refused(capsys, train(**changes))
    assert left_behind(here) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "nobody/nothing"}, "the model 'nobody/nothing' is not reachable; give --model minilm"),
        ({"set": "epochs=0.2"}, "tinit (2) + tfinal (4) must be smaller than total_step (1)"),
    ],
)
def test_mistakes_found_while_a_run_is_set_up(capsys, here, changes, words):
    assert words in refused(capsys, train(**changes))
    assert left_behind(here) == []  # nothing was trained, so there is nothing to go on with


def test_corrected_after_a_mistake(capsys, here):
    """What was asked for wrongly does not stand in the way of the right command."""
    refused(capsys, train(model="nobody/nothing"))
    assert cli.main(train("--method", "head")) == 0


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"defaults": {"epochz": 1}}', '{"defaults": {"epochs": "3"}}']
)
def test_wrong_recipes(capsys, here, content):
    (here / "mine.json").write_text(content)
    assert "mine.json" in refused(capsys, train(recipe="mine.json")) or "epochs" in content
    (here / "mine.json").unlink()
    assert left_behind(here) == []


def test_wrong_data(capsys, here):
    write_parquet(here / "other" / "sst2" / "train.parquet", text=["a"], label=[0])
    line = refused(capsys, train(data_dir="other"))
    assert (
        "train.parquet has no column 'sentence' (it has text, label); rename its columns to sentence, label"
        in line
    )
    write_parquet(here / "other" / "sst2" / "train.parquet", sentence=["a", "b"], label=[0, 2])
    assert "train.parquet row 1: label 2 is not an integer from 0 to 1" in refused(
        capsys, train(data_dir="other")
    )
    (here / "other" / "sst2" / "train.parquet").write_bytes(b"no parquet")
    assert "is not readable parquet" in refused(capsys, train(data_dir="other"))
    assert left_behind(here) == ["other"]


@pytest.mark.parametrize("kind", ["file", "folder", "model"])
def test_something_in_the_way(capsys, here, kind):
    if kind == "file":
        (here / "out").write_text("mine")
    else:
        (here / "out").mkdir()
        (here / "out" / ("config.json" if kind == "model" else "letter.txt")).write_text("{}")
    assert "not a run; choose another --output" in refused(capsys, train())
    assert left_behind(here) == ["out"]


def test_another_run_in_the_way(capsys, here):
    assert cli.main(train("--method", "head")) == 0
    capsys.readouterr()
    assert "holds a run with seed = 0, and 1 was asked for" in refused(
        capsys, train("--seed", "1", method="head")
    )


def test_another_spelling_of_the_same_folders_is_the_same_run(capsys, here):
    assert cli.main(train("--method", "head")) == 0
    capsys.readouterr()
    again = train("--method", "head", data_dir=here / "data", model=here / "bert")
    code, out, err = run(capsys, again)
    assert code == 0 and "already complete" in out, err


def test_a_place_that_cannot_be_written(capsys, here, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("adalora_fast.experiments.runs.Path.mkdir", refuse)
    line = refused(capsys, train())
    assert f"cannot write to {here} (Permission denied); choose another --output" in line


@pytest.mark.parametrize("folder", [".", "nowhere", "data"])
def test_report_without_runs(capsys, here, folder):
    assert f"no complete run below {folder}; give the folder that holds them" in refused(
        capsys, ["report", folder]
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"loss": 0.1}'])
def test_report_of_a_foreign_result(capsys, here, content):
    (here / "theirs").mkdir()
    (here / "theirs" / "result.json").write_text(content)
    assert "result.json" in refused(capsys, ["report", "theirs"])


def test_brackets_in_a_path_are_shown(capsys, here):
    code, out, _ = run(capsys, train("--method", "head", output="a[b]/c"))
    assert code == 0 and f"run  {here}/a[b]/c" in out


def sweep(*more, **changes):
    options = {"recipe": "recipe.json", "model": "./bert", "data-dir": "data", "output": "out"} | changes
    given = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return ["sweep", *(word for pair in given for word in pair), *more]


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


def test_a_sweep_with_a_failure_says_so_with_its_exit_code(capsys, here):
    common = ["--tasks", "sst2", "--arms", "head", "--seeds", "0"]
    blocked = here / "out" / "sst2" / ".head-seed0.partial"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be")
    code, out, _ = run(capsys, sweep(*common))
    assert code == 1 and "failed: sst2/head-seed0: FileExistsError: cannot write to" in out
    assert (here / "out" / "sst2" / "head-seed0.failed.json").is_file()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "squid"], "unknown task 'squid'"),
        (["--arms", "fischer"], "unknown arm 'fischer'"),
        (["--set", "epoch=3"], "cannot set 'epoch=3'; write <setting>=<value> with one of adapter_dropout"),
        (["--set", "epochs"], "cannot set 'epochs'"),
        (["--set", "epochs=many"], "epochs is 'many'; it must be a finite number"),
        (["--set", "precision=fp8"], "unknown precision 'fp8'; choose one of fp32, bf16, fp16"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--attention", "fast"], "attention"),
    ],
)
def test_mistakes_in_a_sweep(capsys, here, more, words):
    arguments = sweep(*more)
    for name, value in (("--tasks", "sst2"), ("--arms", "head"), ("--seeds", "0")):
        if name not in more:
            arguments += [name, value]
    if words == "attention":  # found when the model is loaded, and recorded as that run's error
        code, out, _ = run(capsys, arguments)
        assert code == 1 and "failed: sst2/head-seed0: ValueError:" in out and "fast" in out
        return
    assert words in refused(capsys, arguments)
    assert left_behind(here) == []


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


def test_runs_that_cannot_be_compared(capsys, here):
    assert "nowhere" in refused(capsys, ["analyze", "cka", "nowhere", "data"])
    assert "nowhere" in refused(capsys, ["soup", "nowhere", "data"])


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


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["sweep"], ["report"], ["analyze"], ["soup"]])
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
        if name not in ("folder", "folders", "measure")
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
