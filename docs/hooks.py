"""What the site needs beyond mkdocs: pages from elsewhere, and links that leave ``docs/``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "study.md": "benchmarks/paper/README.md",
    "language.md": "benchmarks/language/README.md",
    "vllm-results.md": "tests/integrations/vllm/results.md",
    "parity.md": "tests/parity/results.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    images = {
        path
        for file in files.documentation_pages()
        for image, _, target in LINK.findall(file.content_string)
        if image and (path := _in_repository(file.src_uri, target)) and not path.startswith("docs/")
    }
    for path in sorted(images):
        files.append(File.generated(config, f"images/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    return LINK.sub(lambda found: _link(page.file.src_uri, *found.groups()), markdown)


def _in_repository(page: str, target: str) -> str | None:
    """Where a link of a page leads, from the repository's root; None leads out of it."""
    if "://" in target or target.startswith(("#", "mailto:")):
        return None
    folder = Path(ELSEWHERE.get(page, f"docs/{page}")).parent
    return os.path.normpath(folder / target.split("#")[0])


def _link(page: str, image: str, text: str, target: str) -> str:
    path = _in_repository(page, target)
    if path is None:
        return f"{image}[{text}]({target})"
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{page}: {target}")
    if path in PAGE_OF:
        place = PAGE_OF[path]
    elif path.startswith("docs/"):
        place = path.removeprefix("docs/")
    elif image:
        place = f"images/{path}"
    else:  # a file of the repository, which the site does not hold
        return text if "`" in text or "/" in text else f"{text} (`{path}`)"
    anchor = "".join(target.partition("#")[1:])
    return f"{image}[{text}]({os.path.relpath(place, Path(page).parent)}{anchor})"
