"""A real browser with the network cut off, watched for errors, requests and dialogs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Watched:
    """An open page and what happened in it that should not have."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def check(self, url: str) -> None:
        """Nothing but the file itself was asked for, and nothing went wrong."""
        assert self.dialogs == []
        assert self.errors == []
        assert self.requests == [url]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright; skipped only where one of them is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Any]:
    """A function that opens a file offline and returns it watched; checks it at the end."""
    opened: list[tuple[Watched, str]] = []

    def open_file(path: Path, **options: Any) -> Watched:
        context = chromium.new_context(offline=True, **options)
        watched = Watched(context.new_page())
        page = watched.page
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on(
            "console",
            lambda message: (
                watched.errors.append(message.text)
                if message.type in {"error", "warning"}
                else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                # A download of what the page itself made asks nobody.
                None if request.url.startswith("blob:") else watched.requests.append(request.url)
            ),
        )

        def refuse(dialog: Any) -> None:
            watched.dialogs.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", refuse)
        page.goto(path.as_uri())
        opened.append((watched, path.as_uri()))
        return watched

    yield open_file
    for watched, url in opened:
        watched.check(url)
        watched.page.context.close()
