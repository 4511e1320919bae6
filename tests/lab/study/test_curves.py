"""`seqmix plot` with running, killed and invalid runs, and with studies."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from study_results import few, recall

from seqmix.cli.commands.plot import names_of
from seqmix.lab.figures import libraries
from seqmix.lab.study.results import Results
from seqmix.lab.study.results_file import write
from seqmix.lab.study.run_figures import figures_of, read_curves


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


def write_run(folder: Path, lines: list[dict] = LINES, *, torn: str = "", config: str | None = "4") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    if config is not None:
        (folder / "config.yaml").write_text(f"training: {{batch_size: {config}}}\ndata: {{sequence_length: 250}}\n")
    return folder


def drawn(run: Path) -> dict[str, list[list[tuple[float, float]]]]:
    """The points of every series, by figure."""
    figures = figures_of([read_curves(run, "run")])
    return {figure.name: [[(p.x, p.y) for p in one.points] for one in figure.series] for figure in figures}


def test_all_measured_quantities_are_drawn(tmp_path):
    found = drawn(write_run(tmp_path / "run"))
    assert list(found) == ["loss", "loss-time", "accuracy", "learning-rate", "gradient-norm", "throughput", "memory"]
    assert found["loss"] == [[(1000, 4.9), (2000, 4.8), (4000, 4.6)], [(2000, 4.5), (4000, 4.0)]]
    # a step of 1000 tokens at 1000 tokens a second, one at 2000, two at 4000
    assert found["loss-time"] == [[(1.0, 4.9), (1.5, 4.8), (2.0, 4.6)], [(1.5, 4.5), (2.0, 4.0)]]
    without = [{k: v for k, v in step(n).items() if k != "memory_bytes"} for n in (1, 2)]
    assert not {"memory", "accuracy"} & set(drawn(write_run(tmp_path / "other", without)))


@pytest.mark.parametrize("torn", ['{"step": 5, "loss": 4.', "\x00\x00\x00", '"a word"\n', '{"step": "5"}\n', "[]\n"])
def test_truncated_metrics_line_is_skipped(tmp_path, torn):
    assert drawn(write_run(tmp_path / "run", torn=torn))["loss"][0] == [(1000, 4.9), (2000, 4.8), (4000, 4.6)]


def test_non_finite_values_are_skipped(tmp_path):
    found = drawn(write_run(tmp_path / "run", [*LINES, step(5, loss=float("nan"), gradient_norm=float("inf"))]))
    assert found["loss"][0][-1] == (4000, 4.6)
    assert found["throughput"][0][-1] == (5000, 5000.0)


@pytest.mark.parametrize("config", [None, "a"])
def test_curves_use_steps_when_config_is_missing_or_broken(tmp_path, config):
    found = drawn(write_run(tmp_path / "run", config=config))
    assert found["loss"][0] == [(1, 4.9), (2, 4.8), (4, 4.6)]
    assert "loss-time" not in found


def test_run_names_are_distinct():
    assert names_of([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert names_of([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]
    assert names_of([Path("a/x/r"), Path("b/x/r"), Path("c")])[:2] == ["a/x/r", "b/x/r"]


# ---- the command


@pytest.fixture
def folders(tmp_path):
    """Folders of valid and invalid runs, and of a study."""
    write_run(tmp_path / "one")
    write_run(tmp_path / "two<b>")
    write_run(tmp_path / "begun", [], torn='{"st')
    write_run(tmp_path / "ruined", [{"step": 1, "loss": float("nan")}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    write(Results.model_validate(recall()), tmp_path / "recall")
    return tmp_path


def test_multiple_runs_share_figures(seqmix, folders):
    pytest.importorskip("altair")
    done = seqmix("plot", "one", "two<b>")
    assert (done.status, done.err) == (0, "")
    text = Path("plot.html").read_text()
    assert text.count("<figure ") == 7
    assert "two&lt;b&gt; has made 4 steps" in text
    assert "two<b>" not in text.partition("<script")[0]


def test_single_figure_can_be_saved_as_svg_or_pdf(seqmix, folders):
    pytest.importorskip("altair")
    assert seqmix("plot", "one", "--figure", "loss", "--out", "new/folder/one.svg").status == 0
    text = Path("new/folder/one.svg").read_text()
    assert "loss (nats per token)" in text
    assert "gradient norm" not in text
    assert (
        seqmix("plot", "recall", "--figure", "accuracy-by-state", "--out", "state.pdf", "--width", "6.75").status == 0
    )
    assert Path("state.pdf").read_bytes().startswith(b"%PDF")


def test_plot_rewrites_the_report_of_a_study(seqmix, folders):
    pytest.importorskip("altair")
    write(Results.model_validate(few()), folders / "few")
    assert seqmix("plot", "few").status == 0
    assert "the loss is not finite at step 31" in (folders / "few" / "report.html").read_text()


@pytest.mark.parametrize("missing", ["vl_convert", "altair"])
def test_missing_plotting_library_gives_install_command(refused, folders, monkeypatch, missing):
    monkeypatch.delitem(__import__("sys").modules, "seqmix.lab.figures.charts", raising=False)
    monkeypatch.delattr("seqmix.lab.figures.charts", raising=False)
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    assert "pip install altair vl-convert-python" in refused("plot", "one")


@pytest.mark.slow
@pytest.mark.skipif(not libraries.STATISTICS.exists(), reason="needs Linux's limits of memory")
@pytest.mark.parametrize(
    ("option", "limit", "file"), [("-v", 8 * 2**20, "a.svg"), ("-v", 8 * 2**20, "a.html"), ("-d", 2**19, "a.pdf")]
)
def test_memory_limit_too_low_for_plotting_reports_one_line(folders, tmp_path, option, limit, file):
    pytest.importorskip("altair")
    # an empty cache: a page's JavaScript is bundled
    command = f"ulimit {option} {limit}; XDG_CACHE_HOME={tmp_path / 'empty'} exec {sys.executable} -m seqmix plot one"
    done = subprocess.run(
        ["sh", "-c", f"{command} --out {file}"], cwd=folders, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr[:500]
    assert re.match(f"error: .* ulimit {option} of .* GiB .*vl-convert.* got {limit / 2**20:g} GiB", done.stderr)
    assert not (folders / file).exists()


@pytest.mark.parametrize(
    ("status", "arguments", "named"),
    [
        (3, ["on"], ["on", '"one"']),
        (3, ["text.txt"], ["text.txt", "file"]),
        (3, ["empty"], ["empty", "metrics.jsonl", "results.json"]),
        (3, ["begun"], ["begun", "metrics.jsonl"]),
        (2, ["ruined"], ["ruined", "finite"]),
        (2, ["one", "./one"], ["one", "twice"]),
        (2, ["one", "recall"], ["recall", "alone"]),
        (2, ["one", "--figure", "los"], ["'los'", "loss-time", '"loss"']),
        (2, ["recall", "--figure", "accuracy-by-pair", "--out", "a.pdf"], ["accuracy-by-state", '"accuracy-by-pairs"']),
        (2, ["one", "--out", "a.htm"], ["--out", "a.htm", ".svg", '".html"']),
        (2, ["one", "--width", "0.5"], ["--width", "0.5", "1.5"]),
        (3, ["one", "--figure", "loss", "--out", "text.txt/a.svg"], ["text.txt/a.svg", "folder"]),
        (3, ["one", "--figure", "loss", "--out", "folder.html"], ["folder.html", "directory"]),
    ],
)
def test_undrawable_input_is_rejected(refused, folders, status, arguments, named):
    pytest.importorskip("altair")
    said = refused("plot", *arguments, status=status)
    assert [word for word in named if word not in said] == []
    assert not list(folders.glob("**/.*.partial"))
