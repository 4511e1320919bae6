"""What a browser makes of reports: wide and narrow, light and dark. Skipped where there is no browser."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import STUDIES

from seqmix.experiments import palette, svg
from seqmix.experiments.chart import Axis, Chart, Line, Point
from seqmix.experiments.page import figures, legend, page, section
from seqmix.experiments.report import write_report
from seqmix.experiments.results import Results

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'seqmix[browser]'")
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no browser: install chromium")

WIDTHS, SCHEMES = (1280, 360), ("light", "dark")
MEASURE = """() => {
  const box = e => { const b = e.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; };
  const outside = [...document.querySelectorAll("h1, h2, h3, p, figcaption, summary, li, dd, figure, .scroll")]
    .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.textContent.slice(0, 40));
  return {
    scrolls: document.documentElement.scrollWidth > innerWidth, outside,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    charts: [...document.querySelectorAll("figure")].map(figure => {
      const drawn = figure.querySelector("svg"), place = drawn.getBoundingClientRect();
      return {
        title: figure.querySelector("h3").textContent, caption: figure.querySelector("figcaption").textContent,
        spoken: drawn.getAttribute("aria-label"), role: drawn.getAttribute("role"),
        size: [place.width, place.height],
        texts: [...drawn.querySelectorAll("text")].map(e => ({text: e.textContent, box: box(e)})),
        font: place.width / drawn.viewBox.baseVal.width * parseFloat(getComputedStyle(drawn).fontSize),
        axis: box(drawn.querySelector(".axis")), grid: [...drawn.querySelectorAll(".grid")].map(box),
        lines: [...drawn.querySelectorAll("[data-line]")].map(e => ({
          name: e.dataset.line,
          paths: [...e.querySelectorAll(".line, .band, .whisker")].map(box),
          markers: [...e.querySelectorAll(".marker")].map(box),
          color: getComputedStyle(e.querySelector(".line, .marker")).getPropertyValue("--c"),
          stroke: getComputedStyle(e.querySelector(".line") ?? e.querySelector(".marker"))
            [e.querySelector(".line") ? "stroke" : "fill"],
        })),
      };
    }),
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {name: Results.model_validate(json.loads(json.dumps(study()))) for name, study in STUDIES.items()}
    return {name: write_report(results, folder / name) for name, results in made.items()}


def look(browser: Any, file: Path, width: int = 1280, scheme: str = "light", media: str = "screen") -> dict[str, Any]:
    """What a page measures; it may say nothing on the console and ask for nothing but itself."""
    seen = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    seen.on("console", lambda message: said.append(message.text))
    seen.on("pageerror", lambda error: said.append(str(error)))
    seen.on("request", lambda request: asked.append(request.url))
    seen.emulate_media(media=media)
    seen.goto(file.as_uri())
    found = seen.evaluate(MEASURE)
    seen.close()
    assert not said
    assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    return found


def overlap(a: list[float], b: list[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def inside(inner: list[float], outer: list[float], by: float = 0.0) -> bool:
    low = inner[0] >= outer[0] - by and inner[1] >= outer[1] - by
    return low and inner[2] <= outer[2] + by and inner[3] <= outer[3] + by


def check_drawn(chart: dict[str, Any]) -> None:
    """A figure shows its lines between its axes, and its texts whole and apart."""
    title = chart["title"]
    assert chart["size"][0] > 250, title
    assert chart["size"][1] > 150, title
    assert chart["font"] >= 10, title
    assert chart["role"] == "img"
    assert chart["spoken"].startswith(title)
    assert chart["caption"]
    left, bottom, right, _ = chart["axis"]
    frame = [left, svg.TOP, right, bottom]
    assert len(chart["grid"]) >= 2, f"{title} has no lines to read values by"
    assert all(inside(grid, frame, 0.1) for grid in chart["grid"]), title
    assert chart["lines"], title
    for line in chart["lines"]:
        assert line["paths"] or line["markers"], f"{title}: {line['name']} is not drawn"
        assert all(inside(path, frame, 0.1) for path in line["paths"]), f"{title}: {line['name']} leaves the axes"
        assert all(inside(marker, frame, 5) for marker in line["markers"]), f"{title}: {line['name']} leaves the axes"
    points = [box for line in chart["lines"] for box in line["paths"] + line["markers"]]
    assert max(b[2] for b in points) - min(b[0] for b in points) > (right - left) / 2, f"{title} is drawn in a corner"
    for i, one in enumerate(chart["texts"]):
        assert inside(one["box"], [0, 0, svg.WIDTH, svg.HEIGHT], 0.5), f"{title}: {one['text']} is cut off"
        for other in chart["texts"][i + 1 :]:
            assert overlap(one["box"], other["box"]) < 2, f"{title}: {one['text']} lies over {other['text']}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("study", STUDIES)
def test_every_figure_is_drawn(browser, reports, study, width, scheme):
    found = look(browser, reports[study], width, scheme)
    assert not found["scrolls"]
    assert not found["outside"]
    for chart in found["charts"]:
        check_drawn(chart)


def line(name: str, *columns: Iterable[float], style: int = 0) -> Line:
    """A line of the columns x and y, and those of a band."""
    return Line(name, [Point(*values) for values in zip(*columns, strict=True)], style)


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize(
    ("scheme", "media", "names", "lines"),
    [
        ("light", "screen", palette.LIGHT, palette.LIGHT_LINES),
        ("dark", "screen", palette.DARK, palette.DARK_LINES),
        ("dark", "print", palette.LIGHT, palette.LIGHT_LINES),
    ],
)
def test_colours_follow_the_scheme_and_paper_is_white(browser, reports, scheme, media, names, lines):
    found = look(browser, reports["recall"], scheme=scheme, media=media)
    assert (found["paper"], found["ink"]) == (rgb(names[palette.PAPER]), rgb(names[palette.INK]))
    strokes = {line["name"]: line["stroke"] for chart in found["charts"] for line in chart["lines"]}
    assert list(strokes.values()) == [rgb(lines[list(strokes).index(name)]) for name in strokes]


def test_figures_of_a_row_stand_at_one_height(browser, tmp_path):
    # whatever the length of their titles
    one = line("a", [1, 2], [3, 4])
    charts = [Chart(title, "c", Axis("x"), Axis("y"), [one]) for title in ("Short", "A title of many words " * 4)]
    file = tmp_path / "page.html"
    file.write_text(page("row", figures(charts)))
    seen = browser.new_page(viewport={"width": 1280, "height": 800})
    seen.goto(file.as_uri())
    tops = seen.evaluate("() => [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().top)")
    seen.close()
    assert abs(tops[0] - tops[1]) < 0.5


@pytest.mark.parametrize("width", WIDTHS)
def test_awkward_values_are_drawn_as_well(browser, tmp_path, width):
    charts = [
        Chart("Tiny", "1e-9", Axis("x"), Axis("y"), [line("a", [1, 2, 3], [1e-9, 2e-9, 1.5e-9])]),
        Chart("Huge", "1e15", Axis("x", unit="bytes"), Axis("y"), [line("a", [1, 1e6, 1e14], [1e15, 5e15, 9e15])]),
        Chart("Decades", "many", Axis("x"), Axis("y"), [line("a", [1, 1e3, 1e9], [1e-12, 1.0, 1e12])]),
        Chart("Close", "alike", Axis("x"), Axis("y"), [line("a", [1, 2, 3], [2.00001, 2.00002, 2.00003])]),
        Chart("Flat", "one value", Axis("x"), Axis("y"), [line("a", [1, 2, 3], [7, 7, 7])]),
        Chart("Zero", "nothing", Axis("x"), Axis("y", unit="share", zero=True), [line("a", [1, 2, 3], [0, 0, 0])]),
        Chart("Below", "negative", Axis("x"), Axis("y"), [line("a", [-5, 2, 3], [-4, 0, -8])]),
        Chart(
            "Lengths",
            "many ticks",
            Axis("tokens", ticks=[2**i for i in range(7, 21)]),
            Axis("time", unit="seconds"),
            [line("a", [2**i for i in range(7, 21)], [1e-3 * 2**i for i in range(14)])],
        ),
        Chart(
            "Names",
            "long ones",
            Axis("what", names=["the first of the slices", "the second of the slices", "still one more slice"]),
            Axis("accuracy", unit="share", zero=True),
            [line("a", [0, 1, 2], [0.1, 0.5, 1.0], [0.0, 0.4, 0.9], [0.2, 0.6, 1.0])],
        ),
        Chart(
            "Long",
            "many",
            Axis("x"),
            Axis("y"),
            [line(f"line {i}", range(5000), range(i, 5000 + i), style=i) for i in range(20)],
        ),
    ]
    file = tmp_path / "page.html"
    file.write_text(page("awkward", section("All", legend(charts), figures(charts))))
    found = look(browser, file, width)
    assert not found["scrolls"]
    assert len(found["charts"]) == len(charts)
    (names,) = (chart for chart in found["charts"] if chart["title"] == "Names")
    assert sum(text["text"].endswith("…") for text in names["texts"]) == 3
    for chart in found["charts"]:
        check_drawn(chart)


def test_a_drawing_of_its_own_is_drawn(browser, tmp_path):
    from seqmix.experiments.markup import xml

    charts = [Chart(f"Chart {i}", "one", Axis("x"), Axis("y"), [line("a", [1, 2], [3, i])]) for i in range(3)]
    file = tmp_path / "drawing.svg"
    file.write_text(xml(svg.document(charts, 2)))
    seen = browser.new_page(viewport={"width": 800, "height": 800}, color_scheme="dark")
    seen.goto(file.as_uri())
    strokes = seen.evaluate("() => [...document.querySelectorAll('g .line')].map(e => getComputedStyle(e).stroke)")
    boxes = seen.evaluate("() => [...document.querySelectorAll('svg svg')].map(e => e.getBoundingClientRect().width)")
    seen.close()
    assert set(strokes) == {rgb(palette.DARK_LINES[0])}
    assert len(boxes) == 3 + 1
    assert min(boxes) > 20
    assert re.search(r'height="\d+"', file.read_text())
