"""Claims of the RetNet paper: their studies match its descriptions, and saved results match the page."""

import json
import re
import runpy
from pathlib import Path
from statistics import fmean, variance
from types import SimpleNamespace

import pytest

from seqmix import SeqmixError, load_config
from seqmix.lab.paper import claims
from seqmix.lab.paper.verdict import OPPOSITE, SAME, UNMEASURED, direction, direction_of, judge
from seqmix.lab.statistics.comparison import Difference
from seqmix.lab.statistics.multiplicity import dunnett
from seqmix.lab.study.plan import plan
from seqmix.lab.study.results import Results
from seqmix.lab.study.results_file import read_results, write
from seqmix.lab.study.study import load_study

ROOT = Path(__file__).resolve().parents[2]
SAVED = claims.FOLDER / "results"
TINY = """
base: retnet-tiny
model: {n_layers: 1}
data: {paths: [text.txt], split: tail, sequence_length: 16}
training: {steps: 2, batch_size: 2, warmup_steps: 1, evaluation_batches: 1, final_evaluation_batches: 1}
entries:
  retnet: {}
  transformer: {set: {model.blocks.ret.mixer: {kind: attention, n_heads: 2, positions: xpos}}}
vary: {model.d_model: [64, 128]}
"""


def planned(claim: str, scale: claims.Scale):
    file = claims.file_of(claim, scale)
    return plan(load_study(file), file)


@pytest.fixture
def page() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "research" / "paper.py")))


# ---- studies


def test_list_and_dry_run_do_not_train(seqmix, refused):
    listed = json.loads(seqmix("paper", "--list", "--json", "-").out)["claims"]
    assert listed.keys() == set(claims.CLAIMS)
    assert all(question.endswith("?") for question in listed.values())
    done = seqmix("paper", "table8", "table6", "--dry-run", "--json", "-")
    studies = json.loads(done.out)["studies"]
    assert list(studies) == ["figure5", "table6"]
    for name, planned in studies.items():
        assert planned["runs"] == [run.name for run in claims.plan_claim(name, "cpu").runs]
        assert f"{len(planned['runs'])} runs, about" in done.err
    assert not Path("studies").exists()
    missing = refused("paper")
    assert all(claim in missing for claim in claims.CLAIMS)
    assert 'did you mean "table6"' in refused("paper", "tabel6", "--dry-run")


def test_every_claim_has_studies_at_both_scales_or_reuses_runs():
    names = {file.stem for file in claims.FOLDER.glob("*.yaml")} - {"base"}
    assert names == set(claims.STUDIES) == {file.stem for file in (claims.FOLDER / "gpu").glob("*.yaml")}
    assert set(claims.CLAIMS) == {*claims.STUDIES, *claims.OF_RUNS}


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("claim", claims.STUDIES)
def test_every_study_loads_and_cpu_studies_can_be_planned(claim, scale):
    file = claims.file_of(claim, scale)
    study = load_study(file)
    assert study.name == claims.folder_of(claim, scale, Path()).name
    assert study.question
    assert (study.speed is not None) == (claim in claims.TIMED)
    if scale == "cpu":
        assert {entry.config.data.sequence_length for entry in plan(study, file).entries} == {256}


def test_ablations_match_the_presets():
    presets = {
        "retnet": "",
        "no-gate": "-no-gate",
        "no-group-norm": "-no-head-norm",
        "no-decay": "-no-decay",
        "single-decay": "-single-decay",
        "small-heads": "-head-64",
    }
    entries = {entry.name: entry.config.model for entry in planned("table6", "gpu").entries}
    assert entries == {name: load_config(f"retnet-200m{preset}").model for name, preset in presets.items()}


def test_model_sizes_match_the_presets():
    entries = {entry.name: entry.config.model for entry in planned("figure5", "gpu").entries}
    for name in ("retnet-1.3b", "retnet-2.7b", "retnet-6.7b", "transformer-1.3b"):
        assert entries[name] == load_config(name).model
    for size in ("1.3b", "2.7b", "6.7b"):
        one, other = (entries[f"{kind}-{size}"] for kind in ("retnet", "transformer"))
        assert (one.d_model, one.n_layers) == (other.d_model, other.n_layers)
        assert other.blocks["attn"].mixer.n_heads * 128 == other.d_model


# ---- from a study to the page


@pytest.mark.slow
def test_claims_are_measured_and_saved(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("a text to be read, and more of it. " * 60)
    Path("figure5.yaml").write_text(TINY)
    monkeypatch.setattr(claims, "file_of", lambda claim, scale: tmp_path / "figure5.yaml")
    monkeypatch.setitem(claims.CONTEXTS, "cpu", (4, 8, 16))
    notes = []
    for claim in ("figure5", *claims.OF_RUNS):
        status, verdict = claims.prove(claim, scale="cpu", jobs=2, out=tmp_path / "out", on_note=notes.append)
        assert status == 0
        assert verdict.summary.startswith("The direction is the paper's in ")
    assert [line for line in notes if line.endswith(":")] == ["figure5:", "table8:", "paradigms:"]
    page.save(tmp_path / "out", tmp_path / "kept")
    results = read_results(tmp_path / "kept" / "figure5.json")
    assert not any(run.history or run.evaluations for run in results.runs)
    assert results.machine.processor is None
    rows = json.loads((tmp_path / "kept" / "paradigms.json").read_text())["rows"]
    assert [(row["entry"], row["dtype"], row["length"]) for row in rows] == [
        (entry, dtype, length)
        for entry in ("retnet", "transformer")
        for dtype in ("float32", "float64")
        for length in (16, 64)
    ]
    assert all(row["difference"] < (1e-3 if row["dtype"] == "float32" else 1e-10) for row in rows)
    for claim in ("figure5", "table8", "paradigms"):
        assert not page.part(claim, tmp_path / "kept")[0].startswith("Not measured")


def test_unknown_claim_raises_with_suggestion():
    with pytest.raises(SeqmixError, match=r"^there is no claim 'tabel6'; did you mean \"table6\"\? Claims: table6, "):
        claims.prove("tabel6", scale="cpu", jobs=None, out=Path(), on_note=print)


def test_page_says_which_directions_are_not_separated_and_which_claims_not_measured(tmp_path, page):
    (tmp_path / "table6.json").write_bytes((SAVED / "table6.json").read_bytes())
    said = page.part("table6", tmp_path)
    assert sum(line.count("not separated") for line in said) == 2  # GroupNorm's row, and the verdict on all
    study = json.loads((tmp_path / "table6.json").read_text())
    for run in study["runs"]:
        if run["entry"] == "no-group-norm":
            run["validation_loss"] -= 1
    (tmp_path / "table6.json").write_text(json.dumps(study))
    changed = [line for line in page.part("table6", tmp_path) if line not in said]
    assert [line.count("opposite") for line in changed] == [1, 1]
    for claim in sorted(page.PARTS.keys() - {"table6"}):
        (line,) = page.part(claim, tmp_path)
        assert line.startswith(f"Not measured yet: `seqmix paper {claim}")


# ---- verdicts


def values_of(claim: str):
    file = SAVED / f"{claim}.json"
    return read_results(file) if claim in claims.STUDIES else json.loads(file.read_text())


def test_direction_requires_an_interval_without_zero():
    def ours(low, high):
        return Difference((low + high) / 2, low, high, "not separated")

    assert direction(+0.1, ours(0.01, 0.2)) == direction(-0.1, ours(-0.2, -0.01)) == SAME
    assert direction(+0.1, ours(-0.2, -0.01)) == OPPOSITE
    assert direction(+0.1, ours(-0.01, 0.2)) == "not separated"
    assert direction(+0.1, None) == "one seed, so no interval"


def test_direction_of_several_sizes_requires_that_all_agree():
    assert direction_of(+0.1, [0.2, 0.01]) == direction_of(-0.1, [-3.0]) == SAME
    assert direction_of(+0.1, [-0.2, -0.01]) == OPPOSITE
    assert direction_of(+0.1, [-0.2, 0.01]) == "sizes disagree"
    assert direction_of(+0.1, []) == direction_of(+0.1, [float("nan")]) == UNMEASURED


@pytest.mark.parametrize("claim", claims.CLAIMS)
def test_every_claim_has_a_verdict(claim):
    verdict = judge(claim, values_of(claim))
    compared = [row for row in verdict.rows if row.direction]
    assert all(row.paper and row.ours for row in compared)
    count = sum(row.direction == SAME for row in compared) or "none"
    assert f" {count} of {len(compared)} rows" in verdict.summary
    assert [row.name for row in compared if row.direction != SAME and row.name not in verdict.summary] == []


def test_verdict_shows_numbers_from_paper_and_study():
    rows = {row.name: row for row in judge("table6", values_of("table6")).rows}
    entries: dict[str, list[float]] = {}
    for run in values_of("table6").runs:
        entries.setdefault(run.entry, []).append(run.validation_loss)
    row = rows["no GroupNorm"]
    assert row.paper == "27.54 (+0.056)"
    mean, low, high = map(float, re.findall(r"[-+]\d\.\d+", row.ours))
    assert mean == pytest.approx(fmean(entries["no-group-norm"]) - fmean(entries["retnet"]), abs=1e-4)
    # one standard deviation of all six entries of two seeds, and Dunnett's correction for five comparisons
    deviation = fmean(variance(losses) for losses in entries.values()) ** 0.5
    half = dunnett([0.5**0.5] * 5, 6) * deviation
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=2e-4)
    assert row.direction == "not separated"
    speed, memory = judge("table4", values_of("table4")).rows
    assert (speed.paper, speed.ours, speed.direction) == ("1.08 to 1.15", "2.10", SAME)
    assert (memory.ours, memory.direction) == ("0.79", OPPOSITE)


def test_paper_sizes_are_compared_by_entry_name():
    results = values_of("figure5").model_dump(mode="json")
    names = {64: "1.3b", 128: "2.7b", 192: "6.7b"}
    for run in results["runs"]:
        run["entry"] += f"-{names[run.pop('variant')['model.d_model']]}"
    entries = [entry | {"name": f"{entry['name']}-{size}"} for size in names.values() for entry in results["entries"]]
    renamed = Results.model_validate(results | {"entries": entries, "summary": []})
    assert judge("figure5", renamed).rows == judge("figure5", values_of("figure5")).rows


def test_command_prints_verdict_and_writes_to_working_directory(seqmix, tmp_path, monkeypatch):
    def study(planned, folder, *, jobs, observer):
        write(values_of(planned.name.removeprefix("retnet-")), folder)
        return values_of(planned.name.removeprefix("retnet-")), SimpleNamespace(stopped=False, failed=[])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "run_study", study)
    before = {file: file.stat().st_mtime_ns for file in claims.FOLDER.rglob("*")}
    done = seqmix("paper", "table6")
    assert done.status == 0
    *table, summary = done.out.strip().splitlines()
    (group_norm,) = (line for line in table if "GroupNorm" in line)
    words = ["no", "GroupNorm", "27.54", "(+0.056)", "-0.0655", "(-0.1544", "to", "+0.0235)", "not", "separated"]
    assert group_norm.split() == words
    assert summary == "The direction is the paper's in 4 of 5 rows, but not for: no GroupNorm (not separated)."
    assert seqmix("paper", "table5", "--out", "elsewhere").status == 0
    assert {file.relative_to(tmp_path) for file in tmp_path.rglob("results.json")} == {
        Path("studies/retnet-table6/results.json"),
        Path("elsewhere/retnet-table5/results.json"),
    }
    assert {file: file.stat().st_mtime_ns for file in claims.FOLDER.rglob("*")} == before
