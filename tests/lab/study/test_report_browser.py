"""Reports in a browser: figures and controls, wide and narrow, light and dark, and in print."""

import json
from pathlib import Path
from typing import Any

import pytest
from study_results import AWKWARD, figure, recall, text

from seqmix.lab.figures import page, theme
from seqmix.lab.figures.figure import Axis
from seqmix.lab.study.comparisons import comparisons
from seqmix.lab.study.report import write_report
from seqmix.lab.study.results import Results

pytest.importorskip("altair")


@pytest.fixture
def look(browser):
    """Open a file and wait until it is drawn; it may log nothing and request nothing but itself."""
    opened = []

    def call(file: Path, width: int = 1280, scheme: str = "light") -> Any:
        seen = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: set[str] = set()
        seen.on("console", lambda message: said.append(message.text))
        seen.on("pageerror", lambda error: said.append(str(error)))
        seen.on("request", lambda request: asked.add(request.url))
        seen.goto(file.as_uri())
        seen.wait_for_selector("html[data-drawn]", state="attached")
        opened.append((seen, said, asked, file))
        return seen

    yield call
    for seen, said, asked, file in opened:
        seen.close()
        assert not said
        assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return write_report(Results.model_validate(json.loads(json.dumps(text()))), tmp_path_factory.mktemp("report"))


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


def strokes(seen: Any, figure: str) -> list[str]:
    """The displayed colours of a figure's lines."""
    lines = f"#{figure} .mark-line.role-mark path"
    return seen.eval_on_selector_all(lines, "all => all.map(e => getComputedStyle(e).stroke)")


def labels(seen: Any, figure: str) -> list[str]:
    """The labels of a figure's axes."""
    return seen.eval_on_selector_all(f"#{figure} .role-axis-label text", "all => all.map(e => e.textContent)")


def test_differences_stand_in_rows_with_their_verdicts_in_words(look, tmp_path):
    results = Results.model_validate(json.loads(json.dumps(recall())))
    seen = look(write_report(results, tmp_path), 390)
    compared = comparisons(results)
    names = [label for label in labels(seen, "differences") if any(letter.isalpha() for letter in label)]
    assert sorted(names) == sorted(each.entry for each in compared)
    words = seen.locator("#differences .role-mark.mark-text text")
    assert sorted(words.all_text_contents()) == sorted(each.words for each in compared)
    fills = seen.eval_on_selector_all(
        "#differences .role-mark.mark-text text", "all => all.map(e => getComputedStyle(e).fill)"
    )
    assert set(fills) == {rgb(theme.colors()["ink"])}
    zero = seen.locator("#differences .role-mark.mark-rule line[stroke-dasharray]")
    assert zero.count() == 1  # one line through all rows
    assert zero.bounding_box()["height"] > 0.9 * seen.locator("#differences .background").first.bounding_box()["height"]


def changes(seen: Any, figure: str, before: list[str]) -> None:
    """Wait until the labels of a figure's axes change."""
    texts = f"[...document.querySelectorAll('#{figure} .role-axis-label text')].map(e => e.textContent)"
    seen.wait_for_function(f"before => {texts}.join() != before.join()", arg=before)


def test_controls_toggle_series_axes_and_smoothing(look, report):
    seen = look(report)
    blue, orange, green = map(rgb, theme.LIGHT_LINES[:3])
    assert strokes(seen, "loss") == [blue, orange, green]

    # the nearest point is read
    seen.locator("#loss-by-length .chart svg").scroll_into_view_if_needed()
    box = seen.locator("#loss-by-length .mark-line.role-mark path").nth(1).bounding_box()
    seen.mouse.move(box["x"] + box["width"] - 3, box["y"] + 3)
    seen.wait_for_selector("#vg-tooltip-element.visible")
    read = seen.locator("#vg-tooltip-element").inner_text()
    loss = json.loads(json.dumps(text()))["summary"][1]["validation_loss_by_length"]["4096"]["mean"]
    assert [word for word in ("attention", "4,096", f"{loss:.4f}") if word not in read] == []
    seen.mouse.move(0, 0)

    # a series is switched off in all figures, in whichever legend, and on again
    attention = seen.locator(".series[value=attention]")
    attention.first.click()
    seen.wait_for_function("document.querySelectorAll('#decode-time .mark-line.role-mark path').length == 2")
    assert strokes(seen, "loss") == strokes(seen, "decode-time") == [blue, green]
    assert [box.is_checked() for box in attention.all()] == [False] * attention.count()
    attention.last.click()
    seen.wait_for_function("document.querySelectorAll('#loss .mark-line.role-mark path').length == 3")

    # an axis becomes logarithmic
    before = labels(seen, "decode-state")
    seen.locator("#decode-state .log[data-axis=y]").click()
    changes(seen, "decode-state", before)
    assert "0" in labels(seen, "decode-state")

    # curves are smoothed: they begin where they began, and end higher, as losses fall
    path = seen.locator("#loss .mark-line.role-mark path").first
    drawn = path.get_attribute("d")
    seen.locator(".smoothing").evaluate("e => { e.value = 0.9; e.dispatchEvent(new Event('input', {bubbles: true})); }")
    seen.wait_for_function(
        "before => document.querySelector('#loss .mark-line.role-mark path').getAttribute('d') != before", arg=drawn
    )
    first, last = (path.get_attribute("d").split("L")[i] for i in (0, -1))
    assert float(last.split(",")[1]) < float(drawn.split("L")[-1].split(",")[1])
    assert first.startswith("M")

    # the wheel scrolls the page, and zooms with Ctrl
    seen.locator("#loss").scroll_into_view_if_needed()
    box = seen.locator("#loss .chart").bounding_box()
    seen.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    place, shown = seen.evaluate("scrollY"), labels(seen, "loss")
    seen.mouse.wheel(0, 40)
    seen.wait_for_function("place => scrollY != place", arg=place)
    assert labels(seen, "loss") == shown
    box = seen.locator("#loss .chart").bounding_box()
    seen.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    seen.keyboard.down("Control")
    seen.mouse.wheel(0, -600)
    seen.keyboard.up("Control")
    changes(seen, "loss", shown)


def test_report_fits_a_phone_and_follows_colour_scheme(look, report):
    seen = look(report, 390, "dark")
    outside = """() => [...document.querySelectorAll("h1, h2, h3, p, figcaption, summary, li, figure, .scroll, svg")]
      .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 0.5)
      .map(e => e.textContent.slice(0, 40))"""
    assert seen.evaluate("document.documentElement.scrollWidth") == 390
    assert seen.evaluate(outside) == []
    assert seen.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(theme.DARK["paper"])
    assert strokes(seen, "loss") == list(map(rgb, theme.DARK_LINES[:3]))
    # a system that turns light, and paper, which is light always
    seen.emulate_media(color_scheme="light")
    assert strokes(seen, "loss") == list(map(rgb, theme.LIGHT_LINES[:3]))
    seen.emulate_media(color_scheme="dark", media="print")
    assert seen.evaluate("getComputedStyle(document.body).backgroundColor") == rgb(theme.LIGHT["paper"])
    assert strokes(seen, "loss") == list(map(rgb, theme.LIGHT_LINES[:3]))


def test_figures_with_awkward_values_are_drawn_without_overflowing_the_page(look, tmp_path):
    powers = [2**i for i in range(7, 21)]
    t, seconds = Axis("t", ticks=powers), Axis("time", unit="seconds")
    figures = [
        *AWKWARD,
        figure([1, 2, 3], [2.00001, 2.00002, 2.00003], name="close"),
        figure(powers, [1e-3 * n for n in powers], name="lengths", x=t, y=seconds),
    ]
    file = tmp_path / "page.html"
    file.write_text(page.render(figures, title="awkward", text=""))
    seen = look(file, 390)
    assert seen.evaluate("document.documentElement.scrollWidth") == 390
    for one in figures:
        assert len(strokes(seen, one.name)) == (len(one.series) if one.joined else 0), one.name
        assert len(set(labels(seen, one.name))) >= 3, one.name
        sizes = seen.eval_on_selector_all(f"#{one.name} svg", "all => all.map(e => e.getBoundingClientRect().width)")
        assert all(250 < size <= 390 for size in sizes)


def test_all_figures_of_a_task_study_are_drawn(look, tmp_path):
    results = Results.model_validate(json.loads(json.dumps(recall())))
    seen = look(write_report(results, tmp_path))
    figures = seen.locator("figure").count()
    assert figures == seen.locator("figure svg").count() == 7
    tops = seen.eval_on_selector_all("figure .chart", "all => all.map(e => e.getBoundingClientRect().top)")
    assert len({round(top) for top in tops[1:4]}) == 1  # below the forest plot, side by side
