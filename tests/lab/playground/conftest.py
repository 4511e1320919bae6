"""Pages in a browser without a network; they may log nothing and request nothing outside their folder."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def look(browser):
    """Open the index.html of a folder from disk."""
    opened = []

    def call(folder: Path, width: int = 1280, scheme: str = "light", **options: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, **options
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        complaints: list[str] = []
        requests: set[str] = set()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.add(request.url))
        page.goto((folder / "index.html").as_uri())
        page.wait_for_selector("html[data-state=idle]", state="attached")
        opened.append((context, complaints, requests, folder.as_uri()))
        return page

    yield call
    for context, complaints, requests, place in opened:
        context.close()
        assert not complaints
        assert [url for url in requests if not url.startswith((f"{place}/", "data:", "blob:"))] == []
