"""The documentation: its links lead somewhere, its API page has every public name, and the site builds."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import adalora_fast
from adalora_fast import ops

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
RELATIVE = re.compile(r"\]\((?!#|[a-z]+:)([^)\s#]+)")
pytest.importorskip("mkdocs", reason="MkDocs is not installed (the docs extra)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_to_files(page):
    """On a repository page, where a link to a file outside of docs/ is one like any other."""
    targets = RELATIVE.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_lines_are_short():
    """But for tables, links and code, which a reader does not wrap."""
    long = []
    for page in (ROOT / "README.md", *PAGES):
        for line in FENCED.sub("", page.read_text(encoding="utf-8")).splitlines():
            if len(line) > 100 and not line.startswith(("|", "![", "    ")):
                long.append(f"{page.name}: {line}")
    assert long == []


def test_the_api_page_has_every_public_name():
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M))
    named |= {name.replace(".orthogonality.orthogonality", ".orthogonality") for name in named}
    wanted = {f"adalora_fast.{name}" for name in adalora_fast.__all__}
    wanted |= {f"adalora_fast.ops.{name}" for name in ops.__all__}
    assert wanted <= named, sorted(wanted - named)


class Addresses(HTMLParser):
    """What a page links to, shows and loads, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets, self.anchors = set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.targets |= {at[key] for key in ("href", "src") if at.get(key)}
        self.anchors |= {at[key] for key in ("id", "name") if at.get(key)}


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_site(tmp_path):
    """Builds strictly; every link leads to a file and an anchor of it; nothing is loaded from elsewhere."""
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: Addresses(path) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    assert {"index.html", "api.html", "maths.html", "CONTRIBUTING.html"} <= {path.name for path in pages}
    broken = []
    for page, found in pages.items():
        for target in found.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchors = pages[path].anchors if path in pages else ()
            if not path.exists() or (
                parts.fragment and path in pages and unquote(parts.fragment) not in anchors
            ):
                broken.append(f"{page.relative_to(tmp_path)}: {target}")
    assert broken == []
    loads = re.compile(r"<(?:script|img|link rel=\"stylesheet\")[^>]*(?:src|href)=\"https?:")
    assert [path.name for path in pages if loads.search(path.read_text(encoding="utf-8"))] == []
    assert "Make a PEFT AdaLoRA model fast" in (tmp_path / "api.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("address", [None, "https://example.org/owner/adalora-fast"])
def test_links_to_the_rest_of_the_repository(address):
    """By the hook of the site: to the pages that came in, to the repository's address, or to nothing."""
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

    hook = {"__file__": str(ROOT / "docs" / "site" / "links.py"), "__name__": "links"}
    exec(compile(Path(hook["__file__"]).read_text(), hook["__file__"], "exec"), hook)
    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "docs_dir": str(ROOT / "docs"), "repo_url": address})
    config.validate()
    page = Page(None, File("maths.md", str(ROOT / "docs"), "site", False), config)
    files = hook["on_files"](Files([page.file]), config)
    fenced = "```\n[c](../setup.py)\n```\n"
    text = f"[a](../README.md#b) [c](../setup.py) [d](../missing.py) [e](maths.md)\n{fenced}"
    code = f"[c]({address}/blob/HEAD/setup.py)" if address else "c"
    assert hook["on_page_markdown"](text, page=page, config=config, files=files) == (
        f"[a](README.md#b) {code} [d](../missing.py) [e](maths.md)\n{fenced}"
    )
