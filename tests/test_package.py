"""What is distributed: a whole source distribution, wheels named by what is in them, and the description.

Built by the functions that `python -m build --no-isolation` calls, from a copy of the repository.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "mkdocs.yml",
         "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md")  # fmt: skip
FOLDERS = ("adalora_fast", "csrc", "docs", "tests", "benchmarks")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.not-built.txt", "results")
NOTE = "adalora_fast/_C.not-built.txt"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository without what was built in it."""
    place = tmp_path_factory.mktemp("repository")
    for name in FILES:
        shutil.copy(ROOT / name, place)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, place / name, ignore=LEFT_OUT)
    return place


def backend(hook, source, out, python=sys.executable, **environment):
    """Call the build backend as `build` and `pip` do; the path of what it made, and its stderr."""
    code = f"from setuptools import build_meta; print('made', build_meta.{hook}({str(out)!r}))"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ADALORA_FAST_")}
    done = subprocess.run(
        [python, "-c", code], cwd=source, env=kept | {"ADALORA_FAST_BUILD_CUDA": "0"} | environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out / re.search(r"^made (.*)$", done.stdout, re.M).group(1), done.stderr


@pytest.fixture(scope="module")
def sdist(repository, tmp_path_factory):
    """The source distribution, and the folder that it unpacks to."""
    out = tmp_path_factory.mktemp("sdist")
    path, _ = backend("build_sdist", repository, out)
    with tarfile.open(path) as archive:
        archive.extractall(out, filter="data")
    return path, out / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that a machine with a compiler and PyTorch makes of the source distribution."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    return backend("build_wheel", sdist[1], tmp_path_factory.mktemp("wheel"), ADALORA_FAST_STRICT_BUILD="1")[
        0
    ]


def names_in(path):
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def package_files():
    """Every file of the package in the repository: code, recipes, published figures, py.typed."""
    found = (path for path in (ROOT / "adalora_fast").rglob("*") if path.is_file())
    left_out = {".so", ".pyc", ".txt"}
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix not in left_out}


def metadata(text):
    return email.message_from_string(text)


def test_the_source_distribution_is_whole(sdist):
    _, folder = sdist
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted = package_files() | set(FILES)
    for name in ("csrc", "docs", "tests"):
        files = (path for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc")
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    assert wanted <= there, sorted(wanted - there)
    assert not [name for name in there if name.endswith((".so", ".pyc", ".not-built.txt"))]


def test_the_wheel_has_the_kernels_and_its_name_says_so(wheel):
    assert re.fullmatch(r"adalora_fast-[\d.]+-cp311-abi3-(linux|macosx)_\w+\.whl", wheel.name), wheel.name
    there = names_in(wheel)
    wanted = package_files() | {"adalora_fast/_C.abi3.so", "adalora_fast/_C_cuda.not-built.txt"}
    assert {name for name in there if name.startswith("adalora_fast/")} == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in there)
    assert not [name for name in there if name.startswith(("tests/", "benchmarks/", "csrc/"))]


def test_the_wheel_runs_on_its_kernels(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import torch, adalora_fast\n"
        "from adalora_fast.ops import select_triplets\n"
        "from adalora_fast.ops.dispatch import backend, native\n"
        "print(adalora_fast.__file__)\n"
        "print(native.refusal('_C'), backend.choose('importance', 'cpu').backend)\n"
        "print(select_triplets(torch.tensor([1.0, 3.0]), torch.tensor(1)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "adalora_fast" / "__init__.py"), "None cpu", "[False, True]"
    ]  # fmt: skip


def without_torch(folder):
    """An interpreter that finds setuptools and nothing else, as in an isolated build."""
    venv.create(folder / "isolated", with_pip=False)
    packages = Path(find_spec("setuptools").origin).parents[1]
    place = next((folder / "isolated").glob("lib/python*/site-packages"))
    for path in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        (place / path.name).symlink_to(path)
    return str(folder / "isolated" / "bin" / "python")


@pytest.mark.parametrize("missing", ["compiler", "torch"])
def test_a_wheel_without_kernels_says_so(sdist, tmp_path, missing):
    """In its name, to who builds it, and in a note that `python -m adalora_fast` shows to who installs it."""
    said, source = "there is no C++ compiler", tmp_path / "source"
    shutil.copytree(sdist[1], source, ignore=shutil.ignore_patterns("build", "tests", "docs"))
    if missing == "compiler":
        path, err = backend("build_wheel", source, tmp_path, PATH="", CXX="")
    else:
        said = "there was no PyTorch to build against; install torch, then build without isolation"
        path, err = backend("build_wheel", source, tmp_path, python=without_torch(tmp_path))
    assert path.name.endswith("-py3-none-any.whl")
    assert f"adalora_fast._C was not built: {said}" in err
    assert "adalora_fast: this wheel has no C++ kernels" in err
    there = names_in(path)
    notes = {name for name in there if name.endswith(".not-built.txt")}
    assert {name for name in there if name.startswith("adalora_fast/")} == package_files() | notes
    with zipfile.ZipFile(path) as archive:
        assert archive.read(NOTE).decode().startswith(said)
        (wheel_file,) = (name for name in there if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(wheel_file).decode()


RELATIVE = re.compile(r"\]\((?!#|https?:)([^)]*)\)")


@pytest.mark.parametrize("repository_url", ["https://example.org/owner/adalora-fast", None])
def test_the_description_has_no_link_that_leads_nowhere(repository, tmp_path, repository_url):
    source = tmp_path / "source"
    shutil.copytree(repository, source, ignore=shutil.ignore_patterns("tests", "docs", "csrc", "build"))
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    assert "urls" not in project or "Repository" in project["urls"]
    text = (source / "pyproject.toml").read_text()
    text = re.sub(r"^\[project.urls\]\n(?:.+\n)*", "", text, flags=re.M)
    if repository_url is not None:
        text += f'\n[project.urls]\nRepository = "{repository_url}"\n'
    (source / "pyproject.toml").write_text(text)
    made, _ = backend("prepare_metadata_for_build_wheel", source, tmp_path)
    read = metadata((made / "METADATA").read_text())
    assert read["Description-Content-Type"] == "text/markdown"
    shown, readme = read.get_payload(), (ROOT / "README.md").read_text()
    relative = RELATIVE.findall(readme)
    assert relative and RELATIVE.findall(shown) == []
    assert shown.count("```") == readme.count("```")
    if repository_url is not None:
        assert all(f"{repository_url}/" in shown and f"/HEAD/{target}" in shown for target in relative)
        images = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", shown)
        assert images and all(image.startswith(f"{repository_url}/raw/HEAD/") for image in images)
    else:
        assert "![" not in shown
    assert all((ROOT / target.partition("#")[0]).exists() for target in relative)
