"""The command of a base installation: one line says what is missing, and `export` runs without any extra."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from adalora_fast import cli, exits
from adalora_fast.entry import parse_plainly
from adalora_fast.export_command import Export
from adalora_fast.extras import EXTRAS, PARSING, RUNS, missing, needed, remedy
from tests.commands.calling import ROOT
from tests.helpers.checkpoints import checkpoints

BASE = {"numpy", "accelerate", "filelock", "rich"}  # what torch, transformers and PEFT bring by themselves
BLOCKED = """
import sys
class Hides:  # as if they were not installed: libraries that ask for them get the same answer
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {names!r}
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Hides(finder) for finder in sys.meta_path]
from adalora_fast.entry import main
sys.exit(main({arguments!r}))
"""


def without(names, *arguments):
    """The command in a process where these packages cannot be imported: its exit status and what it said."""
    code = BLOCKED.format(names=set(names), arguments=list(map(str, arguments)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


WITH_EXTRAS = [[name] for name in cli.COMMANDS if name != "export"]


@pytest.mark.parametrize("command", [[], ["--help"], ["nonsense"], *WITH_EXTRAS], ids=" ".join)
def test_every_command_says_what_to_install(command):
    code, out, err = without(set(EXTRAS) - BASE, *command)
    assert code == 2 and out == ""
    assert re.fullmatch(r"adalora-fast: [^\n]*\n", err), err
    who = "the command line" if command in ([], ["--help"]) else command[0]
    assert err.startswith(f"adalora-fast: {who} needs tyro")
    assert re.search(r"install (it|them) with: pip install 'adalora-fast\[demo\]'\n$", err)


def test_all_that_is_missing_is_named_at_once_and_before_anything_runs(tmp_path):
    code, out, err = without(["datasets", "matplotlib"], "sweep", "--recipe", "no such recipe")
    assert (code, out) == (2, "")
    assert err == (
        "adalora-fast: sweep needs datasets and matplotlib, which are not installed; "
        "install them with: pip install 'adalora-fast[demo]'\n"
    )
    code, out, err = without(["datasets", "matplotlib"], "sweep", "--help")
    assert code == 0 and "--recipe" in out and err == ""


def test_export_needs_no_extra(tmp_path):
    saved = checkpoints()
    code, out, err = without(set(EXTRAS) - BASE, "export", saved.end, tmp_path / "plain", "--uniform")
    assert code == 0 and err == "", err
    assert re.match(rf"{tmp_path}/plain: \d+ triplets in \d+ matrices, r = \d+\n", out) and "vllm: " in out
    assert cli.main(["export", str(saved.end), str(tmp_path / "full"), "--uniform"]) == 0
    plain, full = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "full")
    )
    configs = [json.loads(files.pop("adapter_config.json")) for files in (plain, full)]
    for config in configs:
        config["target_modules"].sort()  # a set, in PEFT
    assert plain == full and configs[0] == configs[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "b"],
        ["a", "b", "--uniform"],
        ["--no-uniform", "a", "b"],
        ["a", "--base", "some/model", "b"],
    ],
    ids=" ".join,
)
def test_both_parsers_read_the_same(arguments, monkeypatch):
    read = []
    monkeypatch.setattr(Export, "run", lambda self, console=None: read.append(self))
    assert cli.main(["export", *arguments]) == 0
    assert read == [parse_plainly(Export, "export", arguments)]


@pytest.mark.parametrize("arguments", [["a"], [], ["a", "b", "c"], ["a", "b", "--rank", "3"]], ids=" ".join)
def test_wrong_flags(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_plainly(Export, "export", arguments)
    assert stop.value.code == 2 and "usage: adalora-fast export" in capsys.readouterr().err


def test_a_package_that_is_missed_in_the_middle(monkeypatch, capsys):
    """Of a package without which most commands run, the error is a line; of any other, a traceback."""
    monkeypatch.setattr(exits, "missing", list)

    def run(name):
        def stops():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return stops

    assert exits.carry_out(run("sacrebleu.metrics")) == 2
    line = "this command needs sacrebleu, which is not installed; install it with: pip install"
    assert capsys.readouterr().err == f"adalora-fast: {line} 'adalora-fast[experiments]'\n"
    with pytest.raises(ModuleNotFoundError):
        exits.carry_out(run("adalora_fast.no_such_part"))
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError):  # it is installed: a part of it is missing
        exits.carry_out(run("numpy.no_such_part"))


def test_needed():
    assert needed([]) == needed(["--help"]) == needed(["train", "-h"]) == needed(["bench", "x"]) == PARSING
    assert needed(["train", "--task", "sst2"]) == needed(["whatever"]) == RUNS
    assert set(RUNS) <= set(EXTRAS) and missing(["json", "no_such_package"]) == ["no_such_package"]
    assert remedy("it", ["ray", "tyro", "sklearn"]) == (
        "it needs ray, tyro and scikit-learn, which are not installed; install them with: "
        "pip install 'adalora-fast[cluster,demo]'"
    )


def test_every_package_is_in_the_extra_that_is_named():
    """And every package of these extras is known here, so that a new one is not forgotten."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        extra: {re.match(r"[\w-]+", line).group() for line in lines if not line.startswith("adalora-fast")}
        for extra, lines in project["optional-dependencies"].items()
        if extra not in ("dev", "docs")  # which no command of the package needs
    }
    assert {(name, extra) for extra, names in extras.items() for name in names} == set(EXTRAS.values())


def test_imports_belong_to_the_packages_that_are_named():
    known = packages_distributions()
    for imported, (name, _) in EXTRAS.items():
        assert name in {found.lower().replace("_", "-") for found in known[imported]}, imported


def test_the_installed_command_starts_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"adalora-fast": "adalora_fast.entry:main"}
