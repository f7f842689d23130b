"""The page of a timeline in a real browser: it draws, zooms, moves and tells what each bar is, without a complaint."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.drawing.colors import pixels_like
from tests.drawing.timelines import timeline_of
from weightstream.drawing import save_timeline
from weightstream.drawing.chart import Chart

pytest.importorskip("selenium", reason="selenium is not installed: it is in the extra `test`")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By

MOST_CHUNKS = 20_000
#: The model of each panel, from top to bottom, and where a place in its data is in the window.
PANELS = "[...Bokeh.documents[0].all_models].filter((model) => model.type === 'Figure')"
PLACE = f"""
    const [number, x, y] = arguments;
    const panel = {PANELS}[number];
    const view = Bokeh.index.find_one(panel);
    const box = view.el.getBoundingClientRect();
    return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)];
"""
TOOLTIPS = """
    const found = [];
    const look = (node) => {
        if (node.classList?.contains('bk-Tooltip') && getComputedStyle(node).display !== 'none') found.push(node);
        for (const child of [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes]) look(child);
    };
    look(document.documentElement);
    const text = (node) => node.nodeName === 'STYLE' ? '' : node.nodeType === Node.TEXT_NODE ? node.data
        : [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].map(text).join(' ');
    return found.map(text);
"""


@pytest.fixture(name="browser", scope="module")
def fixture_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "window-size=1200,700", "force-device-scale-factor=1"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


class Page:
    """A timeline's page that is shown."""

    def __init__(self, browser: Chrome, file: Path, num_chunks: int) -> None:
        self.timeline = timeline_of(num_chunks)
        save_timeline(self.timeline, file)
        self.browser = browser
        browser.get_log("browser")  # of the page before
        browser.get(file.as_uri())
        self.console: list[str] = []
        self.until(lambda: any("document idle" in line for line in self._read_console()))  # everything is drawn

    def _read_console(self) -> list[str]:
        self.console += [f"{entry['level']} {entry['message']}" for entry in self.browser.get_log("browser")]
        return self.console

    def complaints(self) -> list[str]:
        """What the page has written to the console beside bokeh's word that it draws, and that all is drawn."""
        return [line for line in self._read_console() if not ("INFO" in line[:4] and '"[bokeh' in line)]

    def until(self, holds: Callable[[], object]) -> None:
        """Wait for the page, which draws when the browser tells it to."""
        deadline_s = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline_s, self._read_console()
            time.sleep(0.02)

    def seen(self) -> list[tuple[float, float]]:
        """From when to when each panel shows."""
        ranges: list[list[float]] = self.browser.execute_script(
            f"return {PANELS}.map((panel) => [panel.x_range.start, panel.x_range.end])"
        )
        return [(begin, end) for begin, end in ranges]

    def place(self, panel: int, x: float, y: float) -> tuple[int, int]:
        left, top = self.browser.execute_script(PLACE, panel, x, y)
        return round(left), round(top)

    def point(self, panel: int, x: float, y: float) -> ActionChains:
        """Begin to do something with the mouse at a place of a panel's data."""
        actions = ActionChains(self.browser, duration=0)
        left, top = self.place(panel, x, y)
        actions.w3c_actions.pointer_action.move_to_location(left, top)
        return actions

    def turn_wheel(self, panel: int, x: float, y: float, times: int) -> None:
        """Turn the wheel away from oneself, which zooms in."""
        for _ in range(times):
            before = self.seen()
            origin = ScrollOrigin.from_viewport(*self.place(panel, x, y))
            ActionChains(self.browser).scroll_from_origin(origin, 0, -240).perform()
            self.until(lambda before=before: self.seen() != before)  # type: ignore[misc]  # bound now

    def tooltips(self) -> list[str]:
        texts: list[str] = self.browser.execute_script(TOOLTIPS)
        return [" ".join(text.split()) for text in texts]


@pytest.fixture(name="page", scope="module", params=[50, MOST_CHUNKS], ids=["few", "many"])
def fixture_page(browser: Chrome, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Page:
    return Page(browser, tmp_path_factory.mktemp("page") / "load.html", request.param)


@pytest.fixture(autouse=True)
def _as_at_first(page: Page) -> Iterator[None]:
    yield
    page.point(1, sum(page.seen()[0]) / 2, 0.5).double_click().perform()
    page.until(lambda: page.seen() == [(0, 10)] * 3)
    assert page.complaints() == []


def test_every_lane_has_its_colour(page: Page, browser: Chrome) -> None:
    kinds = {"reader 0": "read", "reader 1": "read", "waiting": "wait", "copies to cuda:0": "copy", "load": "bind"}
    lanes = Chart.of(page.timeline).lanes
    assert [lane for lane, _ in lanes] == list(kinds)
    for lane, middle in lanes:
        box = (*page.place(1, 1, middle + 0.2), *page.place(1, 8.5, middle - 0.2))
        busy = {"wait": 0.4, "bind": 0.25}.get(kinds[lane], 0.9)
        share = pixels_like(BytesIO(browser.get_screenshot_as_png()), kinds[lane], box)
        if kinds[lane] == "bind" and len(page.timeline.spans) > MOST_CHUNKS:
            assert share == 0, "it takes 40 % of the time, in 20,000 moments, and looks pale"
        else:
            assert share > busy, lane


def test_wheel_zooms_all_panels_at_once_around_the_mouse(page: Page) -> None:
    assert page.seen() == [(0, 10)] * 3
    page.turn_wheel(1, 4.0, 0.5, 5)
    first, *others = page.seen()
    assert others == [first, first]
    assert 0 < first[0] < 4.0 < first[1] < 10
    left, _ = page.place(1, 4.0, 0.5)
    page.turn_wheel(1, 4.0, 0.5, 2)
    assert abs(page.place(1, 4.0, 0.5)[0] - left) <= 2


def test_dragging_moves_all_panels(page: Page) -> None:
    page.turn_wheel(1, 5.0, 0.5, 5)
    before = page.seen()[0]
    width = before[1] - before[0]
    page.point(1, 5.0, 0.5).click_and_hold().move_by_offset(-100, 0).release().perform()
    page.until(lambda: page.seen()[0] != before)
    first, *others = page.seen()
    assert others == [first, first]
    assert first[0] > before[0]
    assert first[1] - first[0] == pytest.approx(width)


@pytest.mark.parametrize("kind", ["read", "copy", "bind"])
def test_mouse_over_a_bar_tells_its_chunk(page: Page, kind: str) -> None:
    bars = [bar for bar in Chart.of(page.timeline).bars if bar.span.kind == kind]
    bar = bars[len(bars) // 3]
    span = bar.span
    x, y = (span.begin_s + span.end_s) / 2, (bar.bottom + bar.top) / 2
    while (page.seen()[0][1] - page.seen()[0][0]) > 100 * (span.end_s - span.begin_s):
        page.turn_wheel(1, x, y, 1)
    page.point(1, x, y).perform()
    page.until(page.tooltips)
    (told,) = page.tooltips()
    assert f"chunk {span.chunk}, 1 in all, 1.049 MB" in told
    assert span.file in told
    assert f"{(span.end_s - span.begin_s) * 1e3:.3f} ms" in told


def test_mouse_over_a_phase_tells_its_time(page: Page) -> None:
    page.point(0, 9.5, 0.5).perform()
    page.until(page.tooltips)
    assert page.tooltips() == ["waits for: copy 1000.00 ms, from 9.0000 s on"]


@pytest.mark.parametrize("times", [0, 6], ids=["whole", "zoomed"])
def test_rates_are_told_where_the_mouse_is(page: Page, times: int) -> None:
    page.turn_wheel(1, 5.03, 0.5, times)
    page.point(2, 5.03, 0.1).perform()
    page.until(page.tooltips)
    (told,) = page.tooltips()
    rate = page.timeline.num_bytes / page.timeline.wall_s
    unit, most = ("GB/s", 1e9) if rate > 1e9 else ("MB/s", 1e6)
    found = re.fullmatch(rf"disk: ([0-9.]+) {unit} bus: ([0-9.]+) {unit}", told)
    assert found, told
    for number in found.groups():
        assert 0.9 < float(number) * most / rate < 1.2


def test_legend_lists_what_is_drawn(page: Page) -> None:
    keys = page.browser.find_elements(By.CLASS_NAME, "key")
    assert len(keys) == 5
    (paragraph,) = {key.find_element(By.XPATH, "..").text for key in keys}
    assert paragraph.split() == ["preflight", "read", "(disk)", "wait", "copy", "bind"]


def test_labels_do_not_overlap(page: Page) -> None:
    """What is beside the panels fits there: the longest lane's name ends before the panel begins."""
    found: Any = page.browser.execute_script(
        f"return {PANELS}.map((panel) => {{ const view = Bokeh.index.find_one(panel);"
        " return [view.frame.bbox.left, view.frame.bbox.width, view.el.clientWidth]; })"
    )
    assert len({left for left, _, _ in found}) == 1  # the panels share their axis on the screen, too
    assert len({width for _, width, _ in found}) == 1
