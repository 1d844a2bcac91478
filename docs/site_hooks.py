"""Lets the site show what lies outside of docs/: the README, CONTRIBUTING and the examples.

Links are written for readers of the repository; here they are turned into the site's own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files elsewhere."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_links(text)))
    for path in sorted((ROOT / "examples").rglob("[0-9]*")):
        text = path.read_text(encoding="utf-8")
        shown = _notebook(text) if path.suffix == ".ipynb" else f"# {path.stem}\n\n{_code(text)}"
        page = path.relative_to(ROOT).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=shown))
    return files


def _notebook(text: str) -> str:
    """Return a notebook's cells as Markdown; its outputs are not kept in the repository."""
    cells = json.loads(text)["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(_code(source) if kind == "code" else source for kind, source in sources)


def _code(source: str) -> str:
    return f"```python\n{source.rstrip()}\n```\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/ into links of the site."""
    return re.sub(r"\]\(\.\./(examples/[^)]+)\)", lambda m: _link(m[1]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Refuse a page with a fence that was not understood: what follows it would all be code."""
    if "```" in html:
        raise PluginError(f"{page.file.src_uri}: a code fence was not understood.")
    return html


def _links(markdown: str) -> str:
    """Return a page of the repository's root with its links turned into the site's."""
    markdown = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", markdown)
    markdown = re.sub(r"\]\((examples/[^)]+)\)", lambda m: _link(m[1]), markdown)
    return markdown.replace("](CONTRIBUTING.md)", "](contributing.md)")


def _link(target: str) -> str:
    return f"]({target.rpartition('.')[0]}.md)"
