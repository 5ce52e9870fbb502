"""A text classification corpus that every CPython carries: the docstrings of its standard library.

The question asked of a model: given the first paragraph of a function's or class's docstring, which of the
ten best-documented modules does it come from? A module here is the top-level name one imports (`tkinter`,
`asyncio`, ...). Sources are read and parsed with `ast`; nothing is imported and nothing is executed.
"""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .tasks import Split

# Tests, what pip puts beside the standard library, and an application that many distributions leave out.
EXCLUDED_DIRECTORIES = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "__pycache__"}
)
MINIMUM_CHARACTERS = 20  # "See above." says nothing about where it comes from


@dataclass(frozen=True, kw_only=True)
class DocstringCorpus:
    """Texts and labels (indices into `modules`), already split.

    `counts` says how many docstrings were found and why some were left out.
    """

    modules: tuple[str, ...]
    train_texts: tuple[str, ...]
    train_labels: tuple[int, ...]
    test_texts: tuple[str, ...]
    test_labels: tuple[int, ...]
    counts: dict[str, int]
    python_version: str

    @property
    def majority(self) -> float:
        """Test accuracy of always answering with the module that is most common in the training texts."""
        answer = Counter(self.train_labels).most_common(1)[0][0]
        return self.test_labels.count(answer) / len(self.test_labels)


def build_corpus(
    root: Path | None = None,
    *,
    n_modules: int = 10,
    minimum_texts: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> DocstringCorpus:
    """Read, deduplicate and split the docstrings below `root` (default: the running Python's standard
    library).

    Texts that are equal after normalisation are kept once, and dropped altogether where two modules share
    them (the same question would have two answers). The split is by a hash of the normalised text, one fifth
    for testing, so it depends on nothing but the text. `progress(done, total)` is called per source file.

    Raises FileNotFoundError where the sources are missing (some minimal Pythons ship only byte code).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    modules_of: dict[str, set[str]] = {}
    original: dict[str, str] = {}
    found = too_short = 0
    for module, paragraph in _first_paragraphs(root, progress):
        found += 1
        if len(paragraph) < MINIMUM_CHARACTERS:
            too_short += 1
            continue
        key = normalise(paragraph)
        modules_of.setdefault(key, set()).add(module)
        original.setdefault(key, paragraph)

    unambiguous = {key: next(iter(names)) for key, names in modules_of.items() if len(names) == 1}
    per_module = Counter(unambiguous.values())
    best = sorted(per_module, key=lambda name: (-per_module[name], name))[:n_modules]
    texts = [(key, best.index(module)) for key, module in sorted(unambiguous.items()) if module in set(best)]
    if len(best) < n_modules or len(texts) < minimum_texts:
        raise FileNotFoundError(
            f"only {len(texts)} usable docstrings in {len(best)} modules below {root}; "
            "use a Python that ships the sources of its standard library"
        )
    train = [(original[key], label) for key, label in texts if not is_test_text(key)]
    test = [(original[key], label) for key, label in texts if is_test_text(key)]
    return DocstringCorpus(
        modules=tuple(best),
        train_texts=tuple(text for text, _ in train),
        train_labels=tuple(label for _, label in train),
        test_texts=tuple(text for text, _ in test),
        test_labels=tuple(label for _, label in test),
        counts={
            "docstrings": found,
            "too_short": too_short,
            "duplicates": found - too_short - len(modules_of),
            "shared_between_modules": len(modules_of) - len(unambiguous),
            "in_other_modules": len(unambiguous) - len(texts),
            "train": len(train),
            "test": len(test),
        },
        python_version=".".join(map(str, sys.version_info[:3])),
    )


def normalise(text: str) -> str:
    """The form in which two texts are compared: lower case, single spaces."""
    return " ".join(text.lower().split())


def is_test_text(normalised: str) -> bool:
    """One fifth of all texts, chosen by hash: the same text is on the same side on every machine."""
    return int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8], "big") % 5 == 0


def _first_paragraphs(root: Path, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, str]]:
    """(top-level module, first paragraph on one line) for every documented function and class below
    `root`.
    """
    files = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    files = [path for path in files if not EXCLUDED_DIRECTORIES.intersection(path.parts)]
    for done, path in enumerate(files, start=1):
        if progress is not None:
            progress(done, len(files))
        module = path.parts[0].removesuffix(".py")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's strings
                tree = ast.parse((root / path).read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                docstring = ast.get_docstring(node)
                if docstring and docstring.strip():
                    yield module, " ".join(docstring.strip().split("\n\n")[0].split())


def corpus_splits(corpus: DocstringCorpus) -> dict[str, Split]:
    source = f"standard library of Python {corpus.python_version}"
    return {
        "train": Split(
            texts=(list(corpus.train_texts),), labels=list(corpus.train_labels), source=source, sample=False
        ),
        "test": Split(
            texts=(list(corpus.test_texts),), labels=list(corpus.test_labels), source=source, sample=False
        ),
    }
