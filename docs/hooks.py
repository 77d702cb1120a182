"""What the site needs beside mkdocs.yml: the README is its first page, and links to other files are text."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")  # within the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as index.md."""
    readme = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep only the text of links to files of the repository that are no pages."""
    pages = {file.src_uri for file in files}
    folder = Path(config.config_file_path).parent / ("" if page.file.src_uri == "index.md" else "docs")

    def keep(match: re.Match[str]) -> str:
        target = match[2].partition("#")[0]
        return match[1] if target not in pages and (folder / target).exists() else match[0]

    return LINK.sub(keep, markdown)
