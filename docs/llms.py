"""MkDocs hook: write llms.txt into the site, the list of its pages with one line each, for language models.

The line is the first sentence of a page's first paragraph (https://llmstxt.org).
"""

import re
from pathlib import Path
from typing import Any

PAGES: dict[str, tuple[str, str]] = {}
"""Title and first sentence of each page, by its address in the site."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Note the title and the first sentence of a page."""
    title = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    text = re.sub(r"^(```.*?^```|<!--.*?-->)$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if re.match(r"[A-Za-z`*\[]", part.strip())]
    first = " ".join(paragraphs[0].split()) if paragraphs else ""
    first = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", first).replace("**", "")
    sentence = re.match(r".+?\.(?=\s|$)", first)
    PAGES[page.url] = title[1] if title else page.title, sentence[0] if sentence else first.rstrip(":")


def on_post_build(config: Any, **_: Any) -> None:
    """Write the pages in the order of the navigation; without the site's address, links are relative to llms.txt."""
    base = (config.site_url or ".").rstrip("/")
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    lines += [f"- [{title}]({base}/{url}): {sentence}" for url, (title, sentence) in PAGES.items()]
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
