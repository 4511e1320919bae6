"""The leaderboard: its commands measure its entries, and its tables list each entry in the right place."""

import re
import runpy
import shlex
from pathlib import Path
from statistics import fmean, variance

import pytest

from seqmix.lab.statistics.multiplicity import t_quantile
from seqmix.lab.study.summary import statistic
from seqmix.lab.suite.leaderboard import load_entries
from seqmix.lab.suite.score_page import write_scores
from seqmix.lab.suite.scores import Conditions, ScoreRow, Scores, TaskScores
from seqmix.lab.suite.tasks import Candidate, load_settings
from seqmix.mixers import MIXERS
from seqmix.research import leaderboard_tables as leaderboard

ROOT = Path(__file__).resolve().parents[2]


def row_of(entry, convolution, *values, state=1024, grows=False):
    return ScoreRow(
        entry=entry,
        mixers=("gla",),
        score=statistic(values),
        scores={str(seed): value for seed, value in enumerate(values)},
        accessories={"short_conv": convolution},
        accuracy_by={},
        learning_rate=1e-3,
        parameters=1,
        state_bytes=state,
        state_grows=grows,
    )


ROWS = (
    row_of("gla", "null", 0.1, 0.2, 0.15),
    row_of("gla-conv", "4", 0.9, 0.95, 0.97),
    row_of("attention", "no option", 1.0, 1.0, 1.0, state=65536, grows=True),
)


def scores_of(*tasks):
    settings = load_settings("small")
    conditions = Conditions(data="", training="", learning_rates=(1e-3,), seeds=(0, 1, 2), matched="")
    return Scores(
        size="small",
        match="parameters",
        created="2026-12-01T00:00:00+00:00",
        commands=("seqmix suite",),
        tasks={task: TaskScores(task=settings.tasks[task], conditions=conditions, rows=ROWS) for task in tasks},
    )


def test_commands_measure_every_built_in_mixer():
    entries = load_entries()
    assert {entry.kind for entry in entries.values()} == set(MIXERS.built_in()) - {"parallel_hybrid"}
    family = runpy.run_path(str(ROOT / "docs" / "mixers.py"))["family"]
    assert [name for name, entry in entries.items() if entry.family != family(entry.kind)] == []
    commands = leaderboard.commands(load_entries(), None)
    assert len(commands) == len(load_settings("small").default_tasks)
    for command in commands:
        words = shlex.split(command)
        made = map(Candidate.of, words[2 : words.index("--no-references")])
        assert {each.name: each.mixer for each in made} == {name: entry.mixer for name, entry in entries.items()}
    # what is known is not measured again
    (recall, *_) = leaderboard.commands(load_entries(), scores_of("recall"))
    assert not {"attention", "gla"} & set(shlex.split(recall))
    assert "gated_delta_net" in shlex.split(recall)


def test_entries_are_listed_by_short_convolution_or_in_both_tables():
    text = "\n".join(leaderboard.lines(scores_of("recall"), load_entries()))
    without, _, more = text.partition("### Without a short convolution")[2].partition("### With a short convolution")
    of_both = more.partition("### Tasks")[0]
    found = [re.findall(r"^\| (gla|gla-conv|attention) ", part, re.MULTILINE) for part in (without, of_both)]
    assert found == [["attention", "gla"], ["attention", "gla-conv"]]


def test_convolution_effect_has_a_simultaneous_interval():
    rows = (
        row_of("gla", "null", 0.1, 0.2, 0.15),
        row_of("gla-conv", "4", 0.8, 0.85, 0.75),
        row_of("mamba2", "4", 0.5, 0.5, 0.65),
        row_of("mamba2-plain", "null", 0.5, 0.5, 0.6),
        row_of("comba-plain", "null", 0.5, 0.51, 0.56),
    )

    def changes(*rows):
        scores = scores_of("recall")
        recall = scores.tasks["recall"].model_copy(update={"rows": rows})
        lines = leaderboard.changes(scores.model_copy(update={"tasks": {"recall": recall}}))
        return dict(re.findall(r"\| `(\w+)` \| (.*) \|", "\n".join(lines)))

    # one standard deviation of all five entries, and Bonferroni's correction for two differences
    deviation = fmean(variance(row.scores.values()) for row in rows) ** 0.5
    half = 100 * t_quantile(10, 1 - 0.025 / 2) * deviation * (2 / 3) ** 0.5
    assert changes(*rows) == {"gla": f"**+65.0 ± {half:.1f}**", "mamba2": f"+1.7 ± {half:.1f}", "comba": ""}
    # where one entry's seeds are split, all are counted
    split = changes(*rows, row_of("kda", "4", 0.99, 0.3, 0.6), row_of("kda-plain", "null", 0.2, 0.21, 0.22))
    assert (split["kda"], split["gla"]) == ("+42.0 (1 of 3, 0 of 3)", "+65.0 (0 of 3, 0 of 3)")


def test_heatmap_colours_scores_above_guessing():
    head, rows = (part.splitlines() for part in "\n".join(heat()).split("<tbody>"))
    assert re.findall("<th>(.*?)</th>", head[1]) == ["entry", "family", "state", "recall", "parity"]
    assert [re.findall("<td[^>]*>(.*?)</td>", row)[0] for row in rows[1:4]] == ["attention", "gla-conv", "gla"]
    attention, _, gla = rows[1:4]
    assert "64 KiB, grows" in attention
    assert attention.count("--share:1.00") == 2
    # 15 % right is a little above guessing one of 32 symbols, and below guessing a bit
    assert re.findall("--share:([0-9.]+)", gla) == ["0.12", "0.00"]


def heat():
    return leaderboard.heatmap(scores_of("recall", "parity"), load_entries())


def test_results_of_several_folders_are_merged(tmp_path, monkeypatch):
    page = runpy.run_path(str(ROOT / "research" / "leaderboard.py"))
    add = page["add"]
    monkeypatch.setitem(add.__globals__, "RESULTS", tmp_path / "published.json")
    for task in ("recall", "parity"):
        write_scores(scores_of(task), tmp_path / task)
        add([tmp_path / task])
    assert page["published"]().tasks.keys() == {"recall", "parity"}
    other = scores_of("recall")
    seeds = other.tasks["recall"].conditions.model_copy(update={"seeds": (7,)})
    other.tasks["recall"] = other.tasks["recall"].model_copy(update={"conditions": seeds})
    write_scores(other, tmp_path / "other")
    with pytest.raises(Exception, match="seeds differ"):
        add([tmp_path / "other"])
