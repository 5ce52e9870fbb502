"""The docstring corpus: what is read, what is left out, and that the split leaks nothing."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adalora_fast.experiments.data.docstrings import build_corpus, is_test_text, normalise

ALPHA = '''
"""The docstring of a module is not a text."""

def one():
    """Return the first thing that
    was ever asked for.

    This second paragraph is left out.
    """

async def two():
    """  Wait for the second thing to arrive.  """

class Three:
    """A class that holds three things together."""

    def method(self):
        """Return   THE first thing that was ever ASKED for."""

    def short(self):
        """See above."""

    def nineteen(self):
        """Nineteen characters"""

    def twenty(self):
        """Twenty characters ok"""

    def without(self):
        return "not a docstring at all, but long enough"

def outer():
    def inner():
        """The docstring of a nested function counts."""

def shared():
    """This text stands in two modules at once."""

def blank():
    """   """
'''
BETA = '''
def shared():
    """this text stands in two modules AT once."""

class Own:
    """Only the module beta says this sentence."""
'''
GAMMA = '''
def far():
    """Only the module gamma has this one docstring."""
'''


@pytest.fixture
def library(tmp_path):
    """Three modules, one of them a package, and things that must not be read."""
    files = {
        "alpha.py": ALPHA,
        "beta/__init__.py": BETA,
        "beta/deep/gamma.py": GAMMA.replace("gamma", "beta again"),
        "gamma.py": GAMMA,
        "test/test_alpha.py": 'def f():\n    """A test is not part of the library."""\n',
        "alpha_tests/tests/x.py": 'def f():\n    """Nor is a folder of tests somewhere below."""\n',
        "site-packages/other.py": 'def f():\n    """Nor is what pip has installed beside it."""\n',
        "idlelib/editor.py": 'def f():\n    """Nor is an application that some lack."""\n',
        "broken.py": 'def f(:\n    """This file is broken and cannot be parsed."""\n',
        "notes.txt": 'def f():\n    """This is no Python file, so it is not read."""\n',
        "empty.py": "",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "zeros.py").write_bytes(b'def f():\n    """Null bytes are no Python source."""\n\0')
    (tmp_path / "latin.py").write_bytes(
        '# coding: latin-1\ndef f():\n    """Über Sprache in älterer Kodierung."""\n'.encode("latin-1")
    )
    return tmp_path


def build(root, **options):
    return build_corpus(root, **{"n_modules": 4, "minimum_texts": 1, **options})


def all_texts(corpus):
    texts, labels = (*corpus.train_texts, *corpus.test_texts), (*corpus.train_labels, *corpus.test_labels)
    return {text: corpus.modules[label] for text, label in zip(texts, labels, strict=True)}


def test_texts_and_labels(library):
    corpus = build(library)
    assert corpus.modules == ("alpha", "beta", "gamma", "latin")  # by number of texts, then by name
    assert all_texts(corpus) == {
        "Return the first thing that was ever asked for.": "alpha",
        "Wait for the second thing to arrive.": "alpha",
        "A class that holds three things together.": "alpha",
        "Twenty characters ok": "alpha",
        "The docstring of a nested function counts.": "alpha",
        "Only the module beta says this sentence.": "beta",
        "Only the module beta again has this one docstring.": "beta",
        "Only the module gamma has this one docstring.": "gamma",
        "Über Sprache in älterer Kodierung.": "latin",
    }


def test_counts_by_hand(library):
    counts = build(library).counts
    assert counts["docstrings"] == 14
    assert counts["too_short"] == 2  # "See above." and the one of nineteen characters
    assert counts["duplicates"] == 2  # alpha's repetition, and the second of the two shared ones
    assert counts["shared_between_modules"] == 1
    assert counts["in_other_modules"] == 0
    assert counts["train"] + counts["test"] == 9


def test_modules_beyond_the_best_are_left_out_and_counted(library):
    corpus = build(library, n_modules=2)
    assert corpus.modules == ("alpha", "beta")
    assert set(all_texts(corpus).values()) == {"alpha", "beta"}
    assert corpus.counts["in_other_modules"] == 2


def test_split_is_by_the_hash_of_the_text_alone(library):
    corpus = build(library)
    assert all(is_test_text(normalise(text)) for text in corpus.test_texts)
    assert not any(is_test_text(normalise(text)) for text in corpus.train_texts)
    for path in (library / "gamma.py", library / "latin.py"):
        path.unlink()
    fewer = build(library, n_modules=2)
    assert set(fewer.test_texts) <= set(corpus.test_texts)
    assert set(fewer.train_texts) <= set(corpus.train_texts)


@pytest.mark.parametrize(("n_modules", "minimum_texts"), [(5, 1), (4, 10)])
def test_too_little_is_refused(library, n_modules, minimum_texts):
    with pytest.raises(
        FileNotFoundError, match=r"only 9 usable docstrings in 4 modules below .*; use a Pyth"
    ):
        build(library, n_modules=n_modules, minimum_texts=minimum_texts)


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="only 0 usable docstrings in 0 modules"):
        build_corpus(tmp_path / "none")


def test_nothing_is_executed(tmp_path):
    witness = tmp_path / "witness"
    (tmp_path / "trap.py").write_text(
        f'open({str(witness)!r}, "w")\nraise SystemExit\n\ndef f():\n    """A docstring behind a trap."""\n'
    )
    corpus = build(tmp_path, n_modules=1)
    assert list(all_texts(corpus).values()) == ["trap"]
    assert not witness.exists()
    assert "trap" not in sys.modules


PROGRESS: list[tuple[int, int]] = []


@pytest.fixture(scope="module")
def standard():
    """The corpus of the running Python, read with a progress function."""
    PROGRESS.clear()
    return build_corpus(progress=lambda done, total: PROGRESS.append((done, total)))


def digest(corpus) -> str:
    return hashlib.sha256(repr(corpus).encode()).hexdigest()


class TestStandardLibrary:
    def test_ten_modules_all_in_both_splits(self, standard):
        assert len(standard.modules) == len(set(standard.modules)) == 10
        assert set(standard.train_labels) == set(standard.test_labels) == set(range(10))
        assert "test" not in standard.modules and "idlelib" not in standard.modules

    def test_modules_are_ordered_by_their_number_of_texts(self, standard):
        counts = Counter((*standard.train_labels, *standard.test_labels))
        assert [counts[label] for label in range(10)] == sorted(counts.values(), reverse=True)

    def test_counts_add_up(self, standard):
        counts = standard.counts
        assert counts["train"] == len(standard.train_texts) == len(standard.train_labels)
        assert counts["test"] == len(standard.test_texts) == len(standard.test_labels)
        left_out = ("too_short", "duplicates", "in_other_modules")
        # A shared text is left out once more than its repetitions.
        used = counts["train"] + counts["test"] + counts["shared_between_modules"]
        assert counts["docstrings"] == used + sum(counts[name] for name in left_out)
        assert counts["train"] + counts["test"] > 1500

    def test_no_text_twice_and_none_in_both_splits(self, standard):
        train, test = ({normalise(t) for t in texts} for texts in (standard.train_texts, standard.test_texts))
        assert len(train) == len(standard.train_texts) and len(test) == len(standard.test_texts)
        assert not train & test

    def test_about_one_fifth_is_for_testing(self, standard):
        share = standard.counts["test"] / (standard.counts["test"] + standard.counts["train"])
        assert 0.17 < share < 0.23

    def test_texts_are_one_line_without_spaces_around(self, standard):
        for text in (*standard.train_texts, *standard.test_texts):
            assert len(text) >= 20 and text == " ".join(text.split())

    def test_majority_is_what_a_constant_answer_gets(self, standard):
        answer = max(set(standard.train_labels), key=standard.train_labels.count)
        right = sum(label == answer for label in standard.test_labels)
        assert standard.majority == right / len(standard.test_labels)
        assert 0.18 < standard.majority < 0.30

    def test_progress_reaches_the_end_one_file_at_a_time(self, standard):
        total = PROGRESS[0][1]
        assert total > 100
        assert [(done, total) for done in range(1, total + 1)] == PROGRESS

    def test_another_process_reads_the_same_and_imports_nothing(self, standard):
        code = (
            "import hashlib, sys, sysconfig\n"
            "from adalora_fast.experiments.data.docstrings import build_corpus\n"
            "sysconfig.get_path('stdlib')\n"
            "before = set(sys.modules)\n"
            "corpus = build_corpus()\n"
            "print(*sorted(set(sys.modules) - before))\n"
            "print(hashlib.sha256(repr(corpus).encode()).hexdigest())\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"PYTHONHASHSEED": "7"},  # the order of sets must not matter
            cwd=Path(__file__).parents[3],
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # old escapes in other people's strings are not our warnings
        imported, same = done.stdout.splitlines()
        assert same == digest(standard)
        # All there is: codecs of source files that declare an encoding, and what sysconfig itself reads.
        assert all(name.startswith(("encodings.", "_sysconfigdata")) for name in imported.split()), imported

    def test_version(self, standard):
        assert standard.python_version == sys.version.split()[0].rstrip("+")
