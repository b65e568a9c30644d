"""The report as Chromium shows it: silent, offline, whole at every width, usable by keyboard, legible in both colors.

Screenshots come to lie in build/screenshots.
"""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from minitron.config.stages import EvaluateConfig, PlanConfig
from minitron.report.page import write_report
from minitron.stages import plan
from tests.constants import REPOSITORY
from tests.report.evaluations import make_gated_evaluation

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCREENSHOTS = REPOSITORY / "build" / "screenshots"
FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex='0']"

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium to look at the report with: apt-get install chromium chromium-driver"
)

PLOTS = """
return [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg"), frame = svg.getBoundingClientRect();
  const boxes = tags => [...svg.querySelectorAll(tags)].map(part => part.getBoundingClientRect());
  const visible = boxes("path, use, image, rect").filter(box => box.width + box.height > 0);
  const cut = boxes("text").filter(box => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
  return {title: figure.querySelector("h3").textContent, width: frame.width, height: frame.height,
    drawn: visible.length, cut: cut.length};
});"""

WIDER_THAN_THE_PAGE = """
const page = document.documentElement;
const held = [...document.querySelectorAll(".scroll *, svg *")];
const wide = [...document.body.querySelectorAll("*")].filter(part => !held.includes(part))
  .filter(part => part.getBoundingClientRect().right > page.clientWidth + 1);
return [page.scrollWidth - page.clientWidth, wide.map(part => part.outerHTML.slice(0, 80))];"""

CONTRASTS = """
const channel = value => value / 255 <= 0.03928 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
const luminance = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = part => {
  for (let at = part; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
};
const texts = [...document.querySelectorAll("body *:not(svg):not(svg *), svg text, svg tspan")].filter(
  part => [...part.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim()));
return texts.map(part => {
  const style = getComputedStyle(part), color = part.closest("svg") ? style.fill : style.color;
  const both = [luminance(color), luminance(behind(part))].sort((a, b) => b - a);
  return [(both[0] + 0.05) / (both[1] + 0.05), part.outerHTML.slice(0, 80)];
});"""


@pytest.fixture(scope="module")
def report(compressed: EvaluateConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every section: a real compression, gates and a champion."""
    directory = tmp_path_factory.mktemp("report")
    write_report(directory, compressed, make_gated_evaluation())
    return directory / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: webdriver.Chrome, report: Path) -> webdriver.Chrome:
    show(chromium, 1280, "light")
    chromium.get(report.as_uri())
    return chromium


def show(chromium: webdriver.Chrome, width: int, scheme: str) -> None:
    """Set the width of the page, below what a window can be, too, and its colors."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})


def test_it_is_silent_and_asks_for_nothing(page: webdriver.Chrome, report: Path) -> None:
    page.get_log("performance")
    page.refresh()
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in sent
    assert [url for url in sent if url != report.as_uri() and not url.startswith("data:")] == []
    assert report.stat().st_size < 2_000_000


def test_every_plot_is_drawn_and_none_of_its_words_is_cut(page: webdriver.Chrome) -> None:
    plots = page.execute_script(PLOTS)
    assert len(plots) == 11
    for plot in plots:
        assert plot["width"] > 300 and plot["height"] > 150, plot
        assert plot["drawn"] > 10 and plot["cut"] == 0, plot


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_plan_is_whole(
    chromium: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory, width: int
) -> None:
    directory = tmp_path_factory.mktemp("plan") / "out"
    plan.run(PlanConfig(output=directory, preset="llama-3.1-minitron-4b-width", teacher="/teacher", corpus="/corpus"))
    show(chromium, width, "light")
    chromium.get((directory / "plan.html").as_uri())
    assert chromium.execute_script(WIDER_THAN_THE_PAGE) == [0, []]
    hidden = "return [...document.querySelectorAll('.scroll')].map(part => part.scrollWidth - part.clientWidth)"
    assert width < 1280 or chromium.execute_script(hidden) == [0]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    chromium.save_screenshot(str(SCREENSHOTS / f"plan-{width}.png"))


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_page(page: webdriver.Chrome, width: int) -> None:
    show(page, width, "light")
    assert page.execute_script(WIDER_THAN_THE_PAGE) == [0, []]
    if width == 1280:  # there even the tables need not be scrolled
        hidden = "return [...document.querySelectorAll('.scroll')].map(part => part.scrollWidth - part.clientWidth)"
        assert set(page.execute_script(hidden)) == {0}


def test_a_telephone_shows_the_student_without_scrolling(page: webdriver.Chrome) -> None:
    show(page, 390, "light")
    ends = page.execute_script(
        "return [...document.querySelectorAll(`.stack td`)].map(part => part.getBoundingClientRect().right)"
    )
    labels = page.execute_script(
        "return [...document.querySelectorAll(`#models td`)].map(part => getComputedStyle(part, '::before').content)"
    )
    assert max(ends) <= 390 and '"Distilled student"' in labels


def test_the_tab_key_reaches_everything_and_shows_where_it_is(page: webdriver.Chrome) -> None:
    count = page.execute_script(f"return document.querySelectorAll(`{FOCUSABLE}`).length")
    assert count >= 4 + 4  # the tables that may scroll, the stages' records
    reached = set()
    for _ in range(count):
        page.switch_to.active_element.send_keys(Keys.TAB)
        place, outline = page.execute_script(
            f"return [[...document.querySelectorAll(`{FOCUSABLE}`)].indexOf(document.activeElement), "
            "getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline != "none"
        reached.add(place)
    assert reached == set(range(count))
    page.switch_to.active_element.send_keys(Keys.ENTER)  # the last one is this evaluation's record
    assert page.execute_script("return document.activeElement.parentElement.open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible(page: webdriver.Chrome, scheme: str) -> None:
    for width in (390, 1280):
        show(page, width, scheme)
        save(f"report-{scheme}-{width}.png", page, "Page.captureScreenshot", captureBeyondViewport=True)
    page.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    contrasts: list[list[Any]] = page.execute_script(CONTRASTS)
    assert len(contrasts) > 200
    assert [entry for entry in contrasts if entry[0] < 4.5] == []
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(245, 246, 248)") == (scheme == "light")


def test_it_prints(page: webdriver.Chrome) -> None:
    content = save("report.pdf", page, "Page.printToPDF", printBackground=True)
    assert content.startswith(b"%PDF") and 3 <= content.count(b"/Type /Page\n") <= 20


def save(name: str, page: webdriver.Chrome, command: str, **options: Any) -> bytes:
    """Write what a command of Chromium's returns to a file."""
    content = base64.b64decode(page.execute_cdp_cmd(command, options)["data"])
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / name).write_bytes(content)
    return content
