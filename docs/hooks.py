"""What `mkdocs` is told beyond `mkdocs.yml`: pages link as they do in the repository, and the site is whole.

Pages are written for a reader of the repository, so their links are paths in it. README.md and the other documents at
its top become pages of the site; any other file that a page links to goes into the site as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Documents at the top of the repository, and what they are in the site.
TOP = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
#: Where files that are no documents go. `.txt` makes a browser show code instead of saving it.
FILES = "files"
SHOWN_AS_TEXT = {".py", ".yaml", ".service", ".sh", ""}

_LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)(#[^)\s]*)?(?=\))")
_PICTURE = re.compile(r'(<img src=")(?!\w+:)([^"\s]+)()(?=")')  # in HTML, because it says how wide it is
_FROM_ELSEWHERE = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*stylesheet[^>]*//")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents at the top of the repository."""
    for name, page in TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to paths in the repository into links to pages and files of the site."""
    assert page.file.abs_src_path is not None
    folder = Path(page.file.abs_src_path).parent.relative_to(ROOT).as_posix()

    def replace(match: re.Match[str]) -> str:
        target = normpath(f"{folder}/{match[2]}")
        there = relpath(_in_site(target, config, files), Path(page.file.src_uri).parent.as_posix())
        return f"{match[1]}{there}{match[3] or ''}"

    return _PICTURE.sub(replace, _LINK.sub(replace, markdown))


def _in_site(target: str, config: MkDocsConfig, files: Files) -> str:
    if target in TOP:
        return TOP[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    source = ROOT / target
    name = f"{FILES}/{target}{'.txt' if source.suffix in SHOWN_AS_TEXT else ''}"
    if source.is_file() and files.get_file_from_path(name) is None:
        files.append(File.generated(config, name, abs_src_path=str(source)))
    return name


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:  # noqa: ARG001 - mkdocs passes all of them
    """Refuse a page that would fetch anything from another host.

    Raises:
        PluginError: it would.
    """
    if found := _FROM_ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch from another host: {output[found.start() :][:120]}")
