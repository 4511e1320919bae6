"""`seqmix plot`: runs that go on, were killed, or are none."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from seqmix.commands.plot import names_of
from seqmix.experiments.curves import charts_of, read_curves

SVG = "{http://www.w3.org/2000/svg}"


def step(n: int, **changes) -> dict:
    return {
        "step": n, "loss": 5 - n / 10, "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 1000.0 * n,
        "mfu": None, "memory_bytes": 2**28,
    } | changes  # fmt: skip


LINES = [
    step(1),
    step(2),
    {"step": 2, "validation_loss": 4.5, "final": False},
    step(4),
    {"step": 4, "validation_loss": 4.0, "final": True, "accuracy": 0.5, "accuracy_by": {"pairs": {"4": 0.5}}},
]


def write_run(folder: Path, lines: list[dict] = LINES, *, torn: str = "", config: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    if config:
        (folder / "config.yaml").write_text("training: {batch_size: 4}\ndata: {sequence_length: 250}\n")
    return folder


def curve(run: Path, title: str, place: int = 0) -> list[tuple[float, float]]:
    (found,) = (chart for chart in charts_of([read_curves(run, "run")]) if chart.title == title)
    return [(point.x, point.y) for point in found.lines[place].points]


def test_losses_lie_over_tokens_and_over_time(tmp_path):
    run = write_run(tmp_path / "run")
    assert curve(run, "Loss") == [(1000, 4.9), (2000, 4.8), (4000, 4.6)]
    assert curve(run, "Loss", 1) == [(2000, 4.5), (4000, 4.0)]
    # a step of 1000 tokens at 1000 tokens a second, one at 2000, two at 4000
    assert curve(run, "Loss over time") == [(1.0, 4.9), (1.5, 4.8), (2.0, 4.6)]
    assert curve(run, "Loss over time", 1) == [(1.5, 4.5), (2.0, 4.0)]


def test_everything_that_was_measured_is_drawn(tmp_path):
    charts = charts_of([read_curves(write_run(tmp_path / "run"), "run")])
    assert [chart.title for chart in charts] == [
        "Loss", "Loss over time", "Accuracy", "Learning rate", "Gradient norm", "Throughput", "Memory",
    ]  # fmt: skip
    without = [{k: v for k, v in step(n).items() if k != "memory_bytes"} for n in (1, 2)]
    titles = [chart.title for chart in charts_of([read_curves(write_run(tmp_path / "other", without), "run")])]
    assert "Memory" not in titles
    assert "Accuracy" not in titles


@pytest.mark.parametrize("torn", ['{"step": 5, "loss": 4.', "\x00\x00\x00", '"a word"\n', '{"step": "5"}\n', "[]\n"])
def test_a_line_cut_short_is_none(tmp_path, torn):
    run = write_run(tmp_path / "run", torn=torn)
    assert curve(run, "Loss") == [(1000, 4.9), (2000, 4.8), (4000, 4.6)]


def test_a_loss_that_is_not_finite_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", [*LINES, step(5, loss=float("nan"), gradient_norm=float("inf"))])
    assert curve(run, "Loss")[-1] == (4000, 4.6)
    assert curve(run, "Throughput")[-1] == (5000, 5000.0)


def test_without_a_configuration_curves_lie_over_steps(tmp_path):
    charts = charts_of([read_curves(write_run(tmp_path / "run", config=False), "run")])
    assert charts[0].x.label == "steps"
    assert [point.x for point in charts[0].lines[0].points] == [1, 2, 4]
    assert "Loss over time" not in [chart.title for chart in charts]


def test_with_a_damaged_configuration_curves_lie_over_steps(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("training: {batch_size: a}\ndata: {sequence_length: 250}\n")
    assert curve(run, "Loss") == [(1, 4.9), (2, 4.8), (4, 4.6)]


def test_names_tell_runs_apart():
    assert names_of([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert names_of([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("a/x/r"), Path("b/x/r"), Path("c")])[:2] == ["a/x/r", "b/x/r"]


# ---- the command


def test_runs_are_drawn_over_each_other(seqmix, tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two<b>")
    done = seqmix("plot", "one", "two<b>")
    assert (done.status, done.err) == (0, "")
    assert done.out == "plot.html is drawn\n"
    text = Path("plot.html").read_text()
    assert text.count("<figure>") == 7
    assert "two&lt;b&gt; has made 4 steps" in text
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|two<b>", text)


def test_a_drawing_is_svg(seqmix, tmp_path):
    write_run(tmp_path / "one")
    assert seqmix("plot", "one", "--out", "new/folder/one.svg").status == 0
    root = ElementTree.parse("new/folder/one.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "title"][:2] == [
        "Loss",
        "Loss over time",
    ]


def test_a_picture_is_png(seqmix, tmp_path):
    pytest.importorskip("vl_convert")
    write_run(tmp_path / "one")
    assert seqmix("plot", "one", "--out", "one.png").status == 0
    assert Path("one.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_needs_what_converts_it(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    write_run(tmp_path / "one")
    assert "pip install 'seqmix[plots]'" in refused("plot", "one", "--out", "one.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["on"], 'on is no run: it does not exist; did you mean "one"?'),
        (["text.txt"], "text.txt is no run: it is a file; a run is a folder that `seqmix train` wrote"),
        (["empty"], "empty is no run: it holds no metrics.jsonl; a run is a folder that `seqmix train` wrote"),
        (["begun"], "begun has no measurement in metrics.jsonl yet: try again after its first steps"),
        (["ruined"], "ruined: no measurement is a finite number, so there is nothing to draw"),
        (["one", "./one"], "one is given twice"),
        (
            ["one", "--out", "a.htm"],
            '--out a.htm: the name must end in one of .html, .svg, .png, .pdf; did you mean ".html"?',
        ),
        (["one", "--out", "plot"], "--out plot: the name must end in one of .html, .svg, .png, .pdf"),
        (["one", "--out", "text.txt/a.svg"], "text.txt/a.svg cannot be written: text.txt is no folder"),
        (["one", "--out", "folder.html"], "folder.html cannot be written: Is a directory"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(refused, tmp_path, arguments, said):
    write_run(tmp_path / "one")
    write_run(tmp_path / "begun", [], torn='{"st')
    write_run(tmp_path / "ruined", [{"step": 1, "loss": float("nan")}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    assert refused("plot", *arguments) == said
    assert not list(tmp_path.glob("**/.*.partial"))


def test_a_real_run_is_drawn(seqmix):
    tiny = ["data={paths: [text.txt], sequence_length: 16}", "model.d_model=32"]
    training = (
        "training={steps: 4, batch_size: 2, warmup_steps: 1, evaluate_every: 2, evaluation_batches: 1, log_every: 1}"
    )
    assert seqmix("train", "retnet-tiny", *tiny, training, "--out", "run").status == 0
    assert seqmix("plot", "run").status == 0
    (loss, *_) = charts_of([read_curves(Path("run"), "run")])
    assert [point.x for point in loss.lines[0].points] == [32, 64, 96, 128]
    assert [point.x for point in loss.lines[1].points] == [64, 128]
