"""MkDocs hook: the pages are written for a repository page, and the site takes them as they are.

Files of the repository that belong to the site come in under their own paths (README.md is its start page).
A link to any other file of the repository leads to its address there, if pyproject.toml names one; else it is
its text. A link to a file that does not exist stays as it is: MkDocs names it, and a strict build fails.
"""

import re
import tomllib
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
COME_IN = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "experiments/results/**/*.md",
    "experiments/results/**/*.png",
)
FENCE = re.compile(r"^(```.*?^```$)", re.M | re.S)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!#|[a-z]+:)([^)\s#]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr):(?=<code>)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The address of the repository is pyproject.toml's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project.get("urls", {}).get("Repository", "").rstrip("/") or None
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in COME_IN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = page.file.src_uri
    at_home = f"docs/{source}" if (ROOT / "docs" / source).is_file() else source
    there = {file.src_uri for file in files}

    def on_the_site(link: re.Match) -> str:
        image, text, target, anchor = link.groups()
        path = normpath(str(PurePosixPath(at_home).parent / target))
        name = path.removeprefix("docs/")
        if not (ROOT / path).exists():
            return link[0]
        if name in there:
            address = relpath(name, str(PurePosixPath(source).parent))
        elif config.repo_url:
            address = f"{config.repo_url}/{'raw' if image else 'blob'}/HEAD/{path}"
        else:
            return text
        return f"{image}[{text}]({address}{anchor or ''})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(on_the_site, part) for part in parts)


def on_page_content(html: str, **_: object) -> str:
    """Docstrings name other objects by Sphinx's roles; the API page shows the name alone."""
    return ROLE.sub("", html)
