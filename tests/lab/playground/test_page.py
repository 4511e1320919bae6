"""The page of `seqmix playground` in a browser, opened from disk, with trained models and no network."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import run_of

from seqmix import generate_text, load_config, load_run
from seqmix.lab.figures import theme
from seqmix.lab.inspect import look as inspect
from seqmix.lab.playground import write_playground
from seqmix.mixers.base.state import nbytes
from seqmix.models import Sampling

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="not installed: pip install 'seqmix[onnx]'")
pytestmark = pytest.mark.slow

TEXT = "def add(x, y):\n    return x + y\n\n\ndef größer(a, b):\n    return a > b\n\n\n" * 40
MLP = "ffn: {kind: mlp, expansion: 1.0, activation: gelu}, norm: {kind: layernorm}"
HYBRID = (
    f"model.blocks={{ret: {{mixer: {{kind: retention, n_heads: 2}}, {MLP}}}, "
    f"attn: {{mixer: {{kind: attention, n_heads: 2}}, {MLP}}}}}",
    "model.pattern=[ret, attn]",
    "model.n_layers=2",
)
GATED = (
    f"model.blocks={{ret: {{mixer: {{kind: gla, n_heads: 2}}, {MLP}}}, "
    f"near: {{mixer: {{kind: attention, n_heads: 2, window: 8}}, {MLP}}}}}",
    "model.pattern=[ret, near]",
    "model.n_layers=2",
)
PROMPT = "def gr"
COUNT = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Retention and attention on bytes, and gated linear attention and attention with a window on byte pairs."""
    from seqmix.models.subword import train_bpe

    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    train_bpe([("text", TEXT.encode())], 280, folder / "tokenizer.json")
    small = [
        "model.d_model=32",
        "training={steps: 60, batch_size: 8, learning_rate: 1e-2, warmup_steps: 2}",
        "training.evaluation_batches=1",
        "training.final_evaluation_batches=1",
    ]
    data = f"paths: [{folder / 'text.txt'}], split: tail, sequence_length: 48"
    changes = {
        "hybrid": (*HYBRID, f"data={{{data}}}"),
        "gated": (*GATED, f"data={{{data}, tokenizer: {folder / 'tokenizer.json'}}}", "model.vocab_size=281"),
    }
    for name, changed in changes.items():
        run_of(load_config("retnet-tiny", [*small, *changed]), folder / name)
    return {name: folder / name for name in changes}


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "playground"
    write_playground(list(runs.values()), out)
    return out


def start(page: Any, count: int = COUNT, prompt: str = PROMPT, temperature: str = "0") -> None:
    page.fill("#prompt", prompt)
    page.locator("[name=temperature]").fill(temperature)
    page.fill("[name=count]", str(count))
    page.click("#generate")


def finish(page: Any) -> None:
    page.wait_for_selector("html[data-state=idle]", state="attached")


def text_of(page: Any, run: str) -> str:
    return page.locator(f"[data-run={run}] [data-part=text]").evaluate(
        "pane => [...pane.children].map(span => span.textContent).join('')"
    )


def part(page: Any, run: str, name: str) -> Any:
    return page.locator(f"[data-run={run}] [data-part={name}]")


def test_greedy_text_matches_torch(look, folder, runs):
    page = look(folder)
    page.check("[name=shown][value=all]")
    start(page)
    finish(page)
    assert page.inner_text("#status") == f"Done: {COUNT} tokens generated"
    for name, run in runs.items():
        model = load_run(run)
        (text,) = generate_text(model, [PROMPT], max_new_tokens=COUNT, sampling=Sampling(temperature=0))
        assert text_of(page, name) == PROMPT + text
        assert "def" in text or "return" in text  # it has learned something
        assert re.fullmatch(r"[\d,]+ tokens/s \([\d.]+ ms per token\)", part(page, name, "speed").inner_text())
        tokens = model.tokenizer.encode(PROMPT + text)[None]
        state = model(tokens, return_state=True).state
        stated = part(page, name, "state").inner_text()
        assert stated.endswith("grows with the text" if name == "hybrid" else "constant")
        assert float(stated.split(" kB")[0]) == pytest.approx(nbytes(state) / 1000, abs=0.06 + 8 * 2 / 1000)


TINTS = "pane => [...pane.children].map(span => parseInt(span.style.getPropertyValue('--tint') || 0))"


def test_text_tint_shows_attention_of_the_last_token(look, folder, runs):
    page = look(folder)
    page.check("[name=shown][value=all]")
    start(page)
    finish(page)
    for name, run in runs.items():
        model = load_run(run)
        tokens = model.tokenizer.encode(text_of(page, name))[None]
        weights = inspect(model, tokens)[1].maps[0, -1]
        part(page, name, "heads").select_option(label="layer 2, head 1")
        expected = (100 * weights / weights.max()).tolist()
        assert part(page, name, "text").evaluate(TINTS) == pytest.approx(expected, abs=0.6)


def test_attention_colours_are_explained_below_the_text(look, folder):
    page = look(folder)
    figures = page.locator("[data-run=hybrid] figure")
    assert not any(figure.is_visible() for figure in figures.all())  # there is nothing to show yet
    page.check("[name=shown][value=all]")
    start(page, count=3)
    finish(page)
    figure = part(page, "hybrid", "attention-figure")
    assert figure.evaluate("figure => figure.previousElementSibling.dataset.part") == "text"
    ramp = figure.locator(".ramp i").evaluate("ramp => getComputedStyle(ramp).backgroundImage")
    tint = "span => { span.style.setProperty('--tint', '100%'); return getComputedStyle(span).backgroundColor; }"
    assert part(page, "hybrid", "text").locator("span").last.evaluate(tint) in ramp
    for name in ("changes-figure", "decays-figure"):
        assert "Attention has no rows" in part(page, "hybrid", name).inner_text()


def test_labels_are_drawn_next_to_the_columns(look, folder):
    page = look(folder)
    start(page, count=3)
    finish(page)
    right = """canvas => {
      const {width, height} = canvas, {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
      return data.reduce((right, value, i) => value && i % 4 === 3 ? Math.max(right, (i >> 2) % width) : right, 0);
    }"""
    columns = len(PROMPT) + 1 + 3
    assert part(page, "hybrid", "changes").locator("canvas").evaluate(right) < 92 + 12 * columns + 46


def test_selected_token_shows_its_probabilities(look, folder, runs):
    page = look(folder)
    start(page)
    finish(page)
    pane = part(page, "hybrid", "text")
    place = 4
    pane.locator("span").nth(place).hover()
    assert part(page, "hybrid", "selected").inner_text().startswith(f"Token {place} of ")

    model = load_run(runs["hybrid"])
    tokens = model.tokenizer.encode(PROMPT)[None]
    probabilities = model(tokens).logits[0, place, :256].softmax(-1)
    best, token = probabilities.max(-1)
    first = part(page, "hybrid", "candidates").locator("li").first
    assert first.locator("output").inner_text() == f"{100 * best:.1f} %"
    assert first.locator(".label").inner_text().strip("“”") == chr(int(token)).replace(" ", "␣").replace("\n", "↵")
    assert page.locator("[data-run=hybrid] .chosen").count() == 1

    # attention reads the selected token and those before it; without a tint, none
    strengths = pane.evaluate(TINTS)
    assert max(strengths) == 100
    assert not any(strengths[place + 1 :])
    assert len([strength for strength in strengths if strength > 0]) > 1
    part(page, "hybrid", "heads").select_option("none")
    assert not any(pane.evaluate(TINTS))


def test_half_lives_match_the_decays(look, folder, runs):
    page = look(folder)
    start(page)
    finish(page)
    model = load_run(runs["hybrid"])
    gammas = inspect(model, model.tokenizer.encode(PROMPT)[None])[0].decays
    shown = part(page, "hybrid", "decays").locator("output").all_inner_texts()
    assert [float(each.replace(",", "")) for each in shown] == pytest.approx(
        [math.log(0.5) / math.log(gamma) for gamma in gammas], rel=0.06
    )
    canvas = part(page, "hybrid", "changes").locator("canvas").bounding_box()
    assert canvas["height"] > 2 * 7
    # the strip scrolls with the text, and a column selects its token
    page.mouse.move(canvas["x"] + canvas["width"] - 5, canvas["y"] + 24)
    assert part(page, "hybrid", "selected").inner_text().startswith(f"Token {len(PROMPT) + COUNT} of ")


def test_escape_stops_generation(look, folder):
    page = look(folder)
    start(page, count=1000)
    page.wait_for_function("document.querySelectorAll('[data-run=hybrid] [data-part=text] span').length > 20")
    page.keyboard.press("Escape")
    finish(page)
    stopped = re.fullmatch(r"Stopped: (\d+) tokens generated", page.inner_text("#status"))
    assert stopped
    assert 0 < int(stopped[1]) < 1000
    assert page.locator("#stop").is_disabled()
    # and it can begin again
    start(page, count=3)
    finish(page)
    assert page.inner_text("#status") == "Done: 3 tokens generated"


def test_swapping_models_keeps_the_prompt(look, folder):
    page = look(folder)
    start(page, count=10)
    finish(page)
    page.check("[name=shown][value='1']")
    page.wait_for_function("document.querySelectorAll('[data-run=gated] [data-part=text] span').length > 10")
    finish(page)
    assert text_of(page, "gated").startswith(PROMPT)
    assert not page.locator("[data-run=hybrid]").is_visible()
    # what is there is shown again, not computed again
    text = text_of(page, "hybrid")
    page.check("[name=shown][value='0']")
    assert page.locator("[data-run=hybrid]").is_visible()
    assert text_of(page, "hybrid") == text


def test_same_seed_reproduces_the_text(look, folder):
    page = look(folder)
    texts = []
    for seed in ("1", "1", "2"):
        page.fill("[name=seed]", seed)
        start(page, temperature="1.5")
        finish(page)
        texts.append(text_of(page, "hybrid"))
    assert texts[0] == texts[1] != texts[2]


def test_page_is_usable_by_keyboard_alone(look, folder):
    page = look(folder, reduced_motion="reduce")
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.name || document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    assert order == ["prompt", "shown", "temperature", "seed", "count", "generate", ""]  # the last one is the text
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("html[data-state=generating]", state="attached")
    finish(page)
    part(page, "hybrid", "text").focus()
    page.keyboard.press("Home")
    assert "the begin token" in part(page, "hybrid", "selected").inner_text()
    page.keyboard.press("ArrowRight")
    assert part(page, "hybrid", "selected").inner_text().startswith("Token 1 of ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_screen(look, folder, scheme):
    page = look(folder, 360, scheme)
    page.check("[name=shown][value=all]")
    start(page, prompt="x" * 60)
    finish(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    outside = """() => [...document.querySelectorAll(
        "h1, h2, h3, p, figcaption, dd, li, canvas, button, input, output")]
      .filter(e => e.checkVisibility())
      .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.scrollWidth > e.clientWidth + 0.5)
      .map(e => e.outerHTML.slice(0, 60))"""
    assert page.evaluate(outside) == []
    paper = (theme.DARK if scheme == "dark" else theme.LIGHT)["paper"]
    wanted = f"rgb({', '.join(str(int(paper[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == wanted


def test_missing_model_file_is_named(look, folder, tmp_path):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "models" / "0.js").unlink()
    context = look(folder).context  # the fixture forbids messages on the console, which this page must give
    page = context.new_page()
    page.goto((broken / "index.html").as_uri())
    page.click("#generate")
    page.wait_for_selector("html[data-state=failed]", state="attached")
    assert "models/0.js is missing" in page.inner_text("#status")


def test_runtime_includes_its_licence(folder):
    assert "MIT License" in (folder / "runtime" / "LICENSE").read_text()
    assert (folder / "runtime" / "ThirdPartyNotices.txt").stat().st_size > 100_000
