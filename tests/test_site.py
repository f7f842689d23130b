"""The documentation site in a real browser, over HTTP: every page, on a screen and on a phone. Its search also from files.

It takes mkdocs, which has an extra of its own: `.ci/run` runs this after `make docs`.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.documents import ROOT

pytest.importorskip("selenium", reason="selenium is not installed: it is in the extra `test`")
pytest.importorskip("material", reason="the documentation's tools are not installed: they are in the extra `docs`")

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.drawing.test_page import fixture_browser

__all__ = ["fixture_browser"]

PATIENCE_S = 30.0
#: What is ugly: a page that scrolls sideways, something beyond its edge that does not scroll by itself, pictures that are not
#: there, and, on a screen, code whose end is hidden.
LOOK = """
    const wrong = [], width = document.documentElement.clientWidth, isPhone = width < 500;
    if (document.documentElement.scrollWidth > width) wrong.push('the page scrolls sideways');
    for (const code of document.querySelectorAll('article pre > code'))
        if (!isPhone && code.scrollWidth > code.clientWidth + 1) wrong.push(`cut off: ${code.innerText.slice(0, 60)}`);
    for (const part of document.querySelectorAll('article *'))
        if (part.getBoundingClientRect().right > width + 2 && !part.closest('pre, .md-typeset__scrollwrap'))
            wrong.push(`beyond the edge: ${part.tagName} ${part.innerText}`);
    for (const picture of document.images)
        if (!picture.complete || !picture.naturalWidth) wrong.push(`no picture: ${picture.src}`);
    return wrong;
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - so it is called there
        """Say nothing."""


@pytest.fixture(name="site", scope="module")
def fixture_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    site = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(build, cwd=ROOT, check=True)
    yield site
    shutil.rmtree(site)


@pytest.fixture(name="address", scope="module")
def fixture_address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def pages() -> list[str]:
    """What the menu has."""
    menu = (ROOT / "mkdocs.yml").read_text().rpartition("nav:")[2]
    return [line.rpartition(": ")[2].removesuffix(".md") for line in menu.splitlines() if line.endswith(".md")]


def open_page(browser: Chrome, address: str, *, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(address)


@pytest.mark.parametrize("width", [1280, 400], ids=["screen", "phone"])
@pytest.mark.parametrize("page", pages())
def test_page_is_whole(browser: Chrome, address: str, page: str, width: int) -> None:
    browser.get_log("browser")  # of the page before
    open_page(browser, f"{address}/{page}.html", width=width)
    WebDriverWait(browser, PATIENCE_S).until(
        lambda _: browser.execute_script("return document.readyState") == "complete"
    )
    assert browser.execute_script(LOOK) == []
    assert browser.get_log("browser") == []
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [one for one in fetched if not one.startswith((f"{address}/", "data:", "blob:"))] == []


@pytest.mark.parametrize(
    ("words", "page"),
    [("MemoryBudgetError", "errors.html"), ("page_cache", "configuration.html"), ("vllm serve", "vllm.html")],
)
@pytest.mark.parametrize("is_served", [True, False], ids=["http", "file"])
def test_search_finds(browser: Chrome, address: str, site: Path, words: str, page: str, *, is_served: bool) -> None:
    browser.get_log("browser")  # of the page before
    open_page(browser, f"{address if is_served else site.as_uri()}/index.html", width=1280)
    box = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    box.click()
    box.send_keys(words)

    def found(_: object) -> list[str]:
        links = browser.execute_script(
            "return [...document.querySelectorAll('.md-search-result__link')].map((a) => a.href)"
        )
        return [link for link in links if page in link]

    assert WebDriverWait(browser, PATIENCE_S).until(found), json.dumps(words)
    assert browser.get_log("browser") == []


def test_first_screen_ends_with_the_picture(browser: Chrome, address: str) -> None:
    open_page(browser, f"{address}/index.html", width=1280)
    bottom = "return document.querySelector('article img').getBoundingClientRect().bottom"
    assert 0 < browser.execute_script(bottom) <= 900
