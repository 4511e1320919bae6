"""Rank transfer: published grids as data, comparisons with them, and the page for made-up scores."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from seqmix.lab.markdown import fill
from seqmix.lab.study.summary import statistic
from seqmix.lab.suite.scores import Conditions, ScoreRow, Scores, TaskScores
from seqmix.lab.suite.tasks import load_settings
from seqmix.mixers import MIXERS
from seqmix.registry import ConfigError, SeqmixError, write_file
from seqmix.research.published_ranks import analysis, page, ranks
from seqmix.research.published_ranks.analysis import MINIMUM, Predictor
from seqmix.research.published_ranks.grids import Grid, entries_of, load_grid, load_grids
from seqmix.research.published_ranks.predictions import load_predictions

ROOT = Path(__file__).resolve().parents[2]


def test_groups_average_z_scores_of_entries_with_all_tasks():
    one = Predictor("one", ("a", "b", "c"), np.array([[[0.0, 1, 2]]]))
    other = Predictor("other", ("c", "a", "d"), np.array([[[10.0, 30, 99]]]))
    flat = Predictor("flat", ("a", "b", "c"), np.array([[[5.0, 5, 5]]]))
    tasks = {each.name: each for each in (one, other, flat)}
    made = analysis.group_predictors(
        tasks, {"alone": ["one"], "both": ["one", "other"], "with flat": ["one", "flat"], "no": ["one", "x"]}
    )
    assert made.keys() == {"alone", "both", "with flat"}
    assert (made["alone"].by_seed == one.by_seed).all()
    assert made["both"].entries == ("a", "c")
    assert made["both"].values.tolist() == [0, 0]  # first and last, last and first
    assert made["with flat"].values == pytest.approx(np.array([-1, 0, 1]) * math.sqrt(1.5) / 2)
    assert analysis.reliability(one) is None
    assert analysis.reliability(one._replace(by_seed=np.array([[[0, 1, 2], [2, 1, 0], [0, 1, 2]]]))) == pytest.approx(
        -1 / 3
    )


def test_grids_refer_to_existing_mixers_and_tasks():
    entries, grids, settings = entries_of(load_grids()), load_grids(), load_settings("small")
    for name, entry in entries.items():
        assert entry.kind in MIXERS.kinds(), name
        heads = {"n_heads": 2} if "n_heads" in MIXERS.resolve(entry.kind).model_fields else {}
        MIXERS.resolve(entry.kind).model_validate(entry.mixer | heads)
    used = [grid for grid in grids.values() if grid.used]
    assert len({grid.arxiv or grid.title for grid in used}) >= 10
    assert {model.entry for grid in used for model in grid.models.values()} <= set(entries)
    for name, grid in grids.items():
        assert len(grid.models) >= MINIMUM, name
        assert name == name.lower()
        assert {measure.task for measure in grid.measures.values()} - {None} <= set(settings.tasks)
    predictions = load_predictions()
    for tasks in predictions.groups.values():
        assert set(tasks) <= set(settings.tasks)
    assert set(predictions.groups["all tasks"]) == set(settings.default_tasks)


def test_values_are_oriented_and_averaged():
    grid = load_grids()["delta_net-340m"]
    assert grid.column("wikitext")["retention"] == -32.33
    assert grid.column("retrieval")["retention"] == pytest.approx((13.3 + 27.6 + 2.9) / 3)
    assert grid.own_entries() == {"delta_net", "delta_net-plain"}


def test_columns_need_four_entries_and_can_exclude_own_models():
    grids = {"grid": load_grids()["gated_delta_net-1.3b"]}
    names = ["mamba2", "retention", "hgrn2", "gated_delta_net", "gsa"]

    def positions(names, **options):
        return [each.column.positions.tolist() for each in analysis.columns_for(names, grids, recall, **options)]

    recall = analysis.about("recall")
    assert positions(names) == [[0, 1, 2, 3]]
    assert positions(names[1:]) == []
    assert positions(names, without_own=True) == []
    assert positions([*names, "attention"], without_own=True) == [[0, 1, 2, 5]]


GRID = """
title: Made up
paper: Nothing
arxiv: "2401.00001"
address: https://arxiv.org/abs/2401.00001
published: 2024-01
tables: Table 1
read: true
how_read: made up
size: 1B
data: 1B tokens
equal: everything
measures:
  loss: {asks: language, what: loss, better: lower}
models:
  A: {entry: attention, values: {loss: 1.0}}
  B: {entry: retention, values: {loss: 2.0}}
"""


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("entry: retention", "entry: retnetion", "leaderboard.yaml has no 'retnetion'; did you mean \"retention\"?"),
        ("entry: retention", "entry: attention", "expected each entry once, got 'attention' for 2 models"),
        ("values: {loss: 2.0}", "values: {los: 2.0}", "expected one of the measures loss, got 'los'"),
        ("better: lower", "better: low", "better"),
        ("address: https", "address: see https", "address"),
        ("published: 2024-01", "published: yesterday", "published"),
    ],
)
def test_invalid_grids_raise_errors_naming_the_file(tmp_path, old, new, sentence):
    file = tmp_path / "made-up.yaml"
    write_file(GRID, file)
    assert isinstance(load_grid(file, entries_of(load_grids())), Grid)
    write_file(GRID.replace(old, new), file)
    with pytest.raises((SeqmixError, ConfigError)) as refused:
        load_grid(file, entries_of(load_grids()))
    assert sentence in str(refused.value)
    assert str(file) in str(refused.value)


def made_up(value, seeds=3, halfway=None):
    """Scores of all entries here on all tasks of the suite: value(task, entry, seed), and at half of the training."""
    conditions = Conditions(data="", training="", learning_rates=(0.002,), seeds=tuple(range(seeds)), matched="")
    tasks = {}
    for name, task in load_settings("small").tasks.items():
        rows = []
        for entry, mapped in entries_of(load_grids()).items():
            scores = {str(seed): value(name, entry, seed) for seed in range(seeds)}
            rows.append(
                ScoreRow(
                    entry=entry,
                    mixers=(mapped.kind,),
                    score=statistic(list(scores.values())),
                    scores=scores,
                    halfway={seed: halfway(name, entry, int(seed)) for seed in scores} if halfway else {},
                    accuracy_by={},
                    learning_rate=0.002,
                    parameters=1,
                    state_bytes=1,
                    state_grows=False,
                )
            )
        tasks[name] = TaskScores(task=task, conditions=conditions, rows=tuple(rows))
    created = "2026-12-01T00:00:00+00:00"
    return Scores(size="small", match="parameters", created=created, commands=("seqmix suite",), tasks=tasks)


def quality(subject):
    """Mean rank of each entry in the published columns of a subject, from 0 to 1."""
    places = {}
    for grid in load_grids().values():
        for measure in grid.measures if grid.used else ():
            if grid.measures[measure].asks == subject:
                values = grid.column(measure)
                ranked = ranks.midranks(np.array(list(values.values()))) / len(values)
                for entry, rank in zip(values, ranked, strict=True):
                    places.setdefault(entry, []).append(rank)
    return {entry: sum(each) / len(each) for entry, each in places.items()}


def table_of(lines, title):
    """Rows of the table below a title, as lists of cells."""
    end = lines[lines.index(title) + 2 :].index("")
    rows = lines[lines.index(title) + 2 :][:end]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_analysis_detects_true_correlations_but_not_chance_ones():
    recall, predictions = quality("recall"), load_predictions()
    recalling, tracking = predictions.groups["recall tasks"], predictions.groups["tracking tasks"]
    rng = np.random.default_rng(3)
    noise = {entry: float(rng.uniform()) for entry in entries_of(load_grids())}

    def value(task, entry, seed):
        if task in recalling:  # what papers call recall, with noise between seeds
            return 0.1 + 0.8 * recall.get(entry, 0.5) + 0.01 * ((seed + len(entry)) % 3)
        return 0.5 if task in tracking else noise[entry]

    lines, _ = page.results(made_up(value), load_grids(), entries_of(load_grids()), predictions, draws=400)
    verdicts = {row[0]: row for row in table_of(lines, "### Predictions")}
    assert verdicts["1"][1:3] == ["recall tasks", "recall"]
    assert verdicts["1"][-1] == "as predicted"
    assert float(verdicts["1"][4].split()[0]) > 0.7
    assert verdicts["2"][-1] == "not distinguishable from chance"
    assert verdicts["6"][6].startswith("[")
    pooled = {row[0]: row for row in table_of(lines, "### All tasks, pooled over papers")}
    assert pooled["parity"][1].split()[0] == "0.00"
    assert {"recall", "recall tasks", "date"} <= pooled.keys()
    controls = {row[0]: row for row in table_of(lines, "### The same task at published size")}
    assert float(controls["recall"][1]) > 0.7  # entries that no paper asks for recall are in the middle
    assert controls["recall"][4] == ""  # no paper asks the same
    assert controls["parity"][2] == "2"
    families = table_of(lines, "### One family left out")
    assert ["recall tasks", "recall"] in [row[:2] for row in families]
    dates = {tuple(row[:2]): row[2:] for row in table_of(lines, "### Against the date")}
    assert float(dates["recall tasks", "recall"][0].split()[0]) > 0  # no date knows as much as the published scores
    assert dates["all tasks", "language"][0].endswith(verdicts["6"][6])
    assert dates["tracking tasks", "state tracking"][2].split()[0] == "0.00"
    assert dates["recall tasks", "recall"][2] == ""  # no paper asks the same
    assert any(row[1] == "`mom-340m`" for row in table_of([*lines, ""], "### Single columns"))
    assert f"3 seeds, {len(noise)} entries." in lines[0]


def test_halfway_scores_get_their_own_table():
    tracking = quality("tracking")

    def late(task, entry, seed):  # nobody knows anything at half
        return tracking.get(entry, 0.5)

    grids, entries, predictions = load_grids(), entries_of(load_grids()), load_predictions()
    lines, _ = page.results(made_up(late), grids, entries, predictions, draws=100)
    assert "### After half of the training" not in lines
    lines, _ = page.results(made_up(late, halfway=lambda *_: 0.5), grids, entries, predictions, draws=100)
    start = lines.index("### After half of the training") + 2
    assert "Not known" not in lines[start]
    half = {row[0]: row for row in table_of(["title", "", *lines[start + 2 :]], "title")}
    assert half["parity"][5].split()[0] == "0.00"
    known = made_up(late, halfway=lambda *_: 0.5)
    first, *rest = known.tasks["parity"].rows
    rows = (first.model_copy(update={"halfway": {}}), *rest)
    known.tasks["parity"] = known.tasks["parity"].model_copy(update={"rows": rows})
    partly, _ = page.results(known, grids, entries, predictions, draws=100)
    assert partly[start].endswith(f"Not known for all tasks: {first.entry}.")
    pooled = {row[0]: row for row in table_of(lines, "### All tasks, pooled over papers")}
    assert float(pooled["parity"][7].split()[0]) > 0.7


def test_few_random_rankings_have_intervals_excluding_zero():
    # papers share their mixers: resampling papers gave such intervals to 31 of 100 random rankings
    grids = load_grids()
    names = list(entries_of(grids))
    columns = [each.column for each in analysis.columns_for(names, grids, analysis.about("recall"))]
    rng = np.random.default_rng(7)
    outside = 0
    for _ in range(100):
        scores = rng.normal(size=len(names)) + 0.2 * rng.normal(size=(1, 3, len(names)))
        low, high = ranks.pooled_interval(scores, columns, draws=200)
        outside += not low <= 0 <= high
    assert outside <= 12


def test_row_order_does_not_change_intervals():
    # published intervals moved when rows of entries without a published table were added
    scores = made_up(lambda task, entry, seed: len(entry) / 30 + seed / 50)
    tasks = {name: task.model_copy(update={"rows": task.rows[::-1]}) for name, task in scores.tasks.items()}
    known = load_grids(), entries_of(load_grids()), load_predictions()
    lines, _ = page.results(scores, *known, draws=50)
    assert page.results(scores.model_copy(update={"tasks": tasks}), *known, draws=50)[0] == lines


def test_differences_below_one_percent_count_as_ties():
    scores = made_up(lambda task, entry, seed: 0.9962 + len(entry) / 1e4 if entry != "mamba" else 0.9)
    tasks = analysis.task_predictors(scores, entries_of(load_grids()))
    groups = analysis.group_predictors(tasks, load_predictions().groups)
    for each in (*tasks.values(), *groups.values()):  # mamba is last, and all others are equal
        assert sorted(set(ranks.midranks(each.values))) == [1, 1 + len(each.entries) / 2], each.name


def test_missing_results_are_reported_and_wrong_rows_raise():
    scores = made_up(lambda task, entry, seed: len(entry) / 30, seeds=1)
    kept = {name: task for name, task in scores.tasks.items() if name in ("recall", "compression")}
    rows = tuple(row for row in kept["recall"].rows if row.entry != "mamba")
    kept["recall"] = kept["recall"].model_copy(update={"rows": rows})
    kept["compression"] = kept["compression"].model_copy(update={"rows": rows})
    few = scores.model_copy(update={"tasks": kept})
    lines, _ = page.results(few, load_grids(), entries_of(load_grids()), load_predictions(), draws=100)
    assert "1 seed," in lines[0]
    assert "without mamba" in lines[0]
    assert {row[-1] for row in table_of(lines, "### Predictions")} == {"not measured"}
    wrong = rows[0].model_copy(update={"mixers": ("hyena",)})
    kept["recall"] = kept["recall"].model_copy(update={"rows": (wrong,)})
    with pytest.raises(SeqmixError, match=f"expected the mixer attention in the row {wrong.entry}"):
        analysis.task_predictors(scores.model_copy(update={"tasks": kept}), entries_of(load_grids()))


@pytest.mark.slow
def test_script_fills_the_page_from_scores(tmp_path):
    script = runpy.run_path(str(ROOT / "research" / "rank_transfer.py"))
    target = tmp_path / "rank-transfer.md"
    target.write_text((ROOT / "docs" / "explanation" / "rank-transfer.md").read_text())
    script["files"].__globals__["TARGET"] = target
    write_file(
        made_up(lambda task, entry, seed: len(task + entry) % 7 / 7, seeds=2).model_dump_json(), tmp_path / "suite.json"
    )
    (file, text), (picture, drawn) = script["files"](tmp_path).items()
    assert file == target
    assert f"]({picture.relative_to(tmp_path)})" in text
    assert "state tracking" in drawn
    begin = "<!-- results: begin -->"
    assert "### Predictions" in text.partition(begin)[2]
    ((_, unchanged),) = script["files"]().items()
    assert unchanged.partition(begin)[2] == target.read_text().partition(begin)[2]
    assert text.partition(begin)[2] != unchanged.partition(begin)[2]
    assert fill(target, {}) == target.read_text()
