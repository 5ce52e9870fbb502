"""How commands are called, and what they said."""

from pathlib import Path

from adalora_fast import cli

ROOT = Path(__file__).parents[2]
SETTINGS = {"epochs": 2, "learning_rate": 5e-3, "batch_size": 8, "max_length": 16, "init_r": 4, "target_r": 2}
SETTINGS |= {"tinit": 2, "tfinal": 4, "deltaT": 2}


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


def sweep(*more, **changes):
    options = {"recipe": "recipe.json", "model": "./bert", "data-dir": "data", "output": "out"} | changes
    given = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return ["sweep", *(word for pair in given for word in pair), *more]
