"""The suite: its tasks, candidates, budgets and scores, and the command with a plug-in."""

import re
from pathlib import Path

import pytest

from seqmix.lab.study.plan import plan
from seqmix.lab.study.results import EvaluationPoint, RunResult
from seqmix.lab.study.study import load_study
from seqmix.lab.study.summary import statistic
from seqmix.lab.suite import budget, score_page, scores, tasks
from seqmix.lab.suite.tasks import Candidate, Change, Extent, SuiteSettings, load_settings, write_studies
from seqmix.mixers import MIXERS
from seqmix.registry import SeqmixError
from seqmix.training import load_config

MINE = """
from typing import Literal
from seqmix.mixers.retention import RetentionConfig

class MineConfig(RetentionConfig):
    kind: Literal["mine"] = "mine"
"""
TINY = SuiteSettings.model_validate(
    {
        "base": "base.yaml",
        "seeds": [0, 1],
        "tasks": {
            name: {
                "measures": "bits",
                "source": "nobody",
                "chance": 0.5,
                "model": {"d_model": 16, "n_layers": 1, "vocab_size": 2},
                "data": {"kind": "parity", "sequence_length": 8, "evaluate_at": [4, 16], "evaluation_examples": 32},
                "training": {"steps": 4, "batch_size": 4, "checkpoint_every": 4},
                "learning_rates": [1e-3, 1e-2],
                "score_at": ["16"],
            }
            for name in ("first", "second")
        },
    }
)
"""Two tasks that take a second each."""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "paper"])
def test_all_tasks_plan_training_at_equal_parameters(size, tmp_path):
    settings = load_settings(size)
    for task in settings.tasks.values():
        config = tasks.base_of(settings, task, Extent())
        config.open_data()
        measured = {str(difficulty) for difficulty in getattr(config.data, "evaluate_at", None) or ()}
        assert set(task.score_at or ()) <= measured
        assert config.training.warmup_steps < config.training.steps
    chosen = settings.chosen(["s3", "recall"])
    assert list(chosen) == ["recall", "s3"]
    planned = write_studies(tmp_path, settings, chosen, [Candidate.of("retention")], "parameters", Extent())
    for task in planned:
        (entry,) = task.plan.entries
        assert entry.matched is not None
        assert abs(entry.matched.cost / entry.matched.wanted - 1) <= 0.01
        assert entry.config.data == load_config(tmp_path / task.name / "base.yaml").data
    # an ordinary study, which compare runs as well
    file = tmp_path / "s3" / "s3.yaml"
    assert plan(load_study(file), file).runs == planned[1].plan.runs


def test_states_are_matched_and_unmatchable_mixers_are_omitted(tmp_path):
    settings = load_settings("small")
    chosen = settings.chosen(["recall"])
    given = [*map(Candidate.of, ("attention", "delta_net")), Candidate.of("wide={kind: attention, window: 7}")]
    (task,) = write_studies(tmp_path, settings, chosen, given, "state", Extent())
    costs = {entry.name: entry.cost.state_bytes for entry in task.plan.entries}
    assert abs(costs["delta_net"] / costs["attention"] - 1) < 0.15
    nothing = Candidate("nothing", {"kind": "attention", "n_heads": 3})
    (task,) = write_studies(tmp_path, settings, chosen, [*given[:1], nothing], "parameters", Extent())
    assert task.left_out.keys() == {"nothing"}
    assert "3" in task.left_out["nothing"]
    with pytest.raises(SeqmixError, match="no mixer can be trained on recall"):
        write_studies(tmp_path, settings, chosen, [nothing], "parameters", Extent())


def test_candidate_accepts_kind_mapping_plugin_or_config_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("suited.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    base = load_config(tasks.FOLDER / "base.yaml", ["model.blocks.mixer.mixer.n_heads=8"])
    place = "model.blocks.mixer.mixer"
    assert Candidate.of("retention").entry(base)["set"][place] == {"kind": "retention", "n_heads": 8}
    assert Candidate.of("min_gru").entry(base)["set"][place] == {"kind": "min_gru"}
    wide = Candidate.of("wide={kind: attention, window: 7}")
    assert (wide.name, wide.entry(base)["set"][place]) == ("wide", {"kind": "attention", "n_heads": 8, "window": 7})
    plugged = Candidate.of("suited:MineConfig")
    assert plugged.name == "MineConfig"
    hybrid = Candidate.of("hybrid-tiny")
    assert hybrid.entry(base)["model"] == {"d_model": 64, "n_layers": 2, "pattern": ["ret", "attn"]}
    for wrong, named in {
        "retension": "did you mean .*retention",
        "x={window: 7}": "NAME={kind: MIXER",
        "suited:Nothing": "Nothing",
        "missing.yaml": "missing.yaml",
    }.items():
        with pytest.raises(SeqmixError, match=named):
            Candidate.of(wrong)


def test_budget_drops_tasks_then_tuning_then_seeds_then_steps():
    times = {name: {"a": 105.0, "b": 105.0} for name in ("one", "two", "three")}
    rates = dict.fromkeys(times, 3)
    task = 2 * (3 + 2) * 105.0  # entries, tuning runs and seeds

    def chosen(seconds):
        extent, names, took = budget.fit(times, rates, 2, seconds)
        assert took <= seconds
        return extent, names

    assert chosen(3 * task) == (Extent(), list(times))
    # few tasks with tuning and intervals before many without
    assert chosen(3 * task - 1) == (Extent(), ["one", "two"])
    assert chosen(task) == (Extent(), ["one"])
    assert chosen(task - 1) == (Extent(one_rate=True), ["one", "two"])
    assert chosen(2 * 2 * 105 - 1) == (Extent(one_rate=True, one_seed=True), ["one"])
    assert chosen(2 * 105 - 1) == (budget.LADDER[3], ["one"])
    assert chosen(2 * 75 - 1) == (budget.LADDER[-1], ["one"])
    said = " ".join(budget.left_out(budget.LADDER[-1], ["one", "two"], list(times)))
    for part in ("leaves out three", "50%", "not tuned", "one seed"):
        assert part in said
    with pytest.raises(SeqmixError, match=r"1\.8 core-minutes"):
        budget.fit(times, rates, 2, 60)
    assert budget.cost(times["one"], 1, 3, Extent()) == 2 * 3 * 105.0  # a single rate needs no tuning


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("seqmix.cli.commands.suite.load_settings", lambda size: TINY)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_plugin_is_listed_beside_retention_and_attention(seqmix, refused):
    Path("suited.py").write_text(MINE)
    assert "second" in seqmix("suite", "--list").out
    dry = seqmix("suite", "suited:MineConfig", "--dry-run")
    assert (dry.status, re.search("first +12 +4 ", dry.out) is None) == (0, False)
    assert not Path("studies").exists()
    # eleven seconds an entry for processes to begin: one rate, one seed, one task
    made = seqmix("suite", "retention", "--no-references", "--budget", "9s", "--jobs", "1")
    assert made.status == 0, made.out
    folder = Path("studies/suite-small-parameters")
    assert "The budget leaves out second. " in made.out.replace("\n", " ")
    found = scores.read_scores(folder)
    assert [row.entry for row in found.tasks["first"].rows] == ["retention"]
    assert (folder / "first" / "report.html").is_file()
    # another call: another mixer's row beside the first one's
    more = ("suited:MineConfig", "--no-references", "--budget", "9s", "--jobs", "1")
    done = seqmix("suite", *more, "--out", "mine", "--beside", folder)
    assert done.status == 0, done.out
    for name in ("MineConfig", "retention", "(guessing)"):
        assert name in done.out
    both = scores.read_scores(Path("mine"))
    row = both.tasks["first"].rows[0]
    assert row.score.mean == row.accuracy_by["length"]["16"]
    page = Path("mine/suite.md").read_text()
    assert all(command in page for command in both.commands)
    assert len(both.commands) == 2
    # the second time nothing is trained, and rows of an earlier call stay
    again = seqmix("suite", *more, "--out", "mine")
    assert "1 runs of MineConfig on 1 tasks, 1 at once, in mine. Reduce them with --quick" in again.out
    assert "1 of 1 runs are finished already" in again.out
    assert scores.read_scores(Path("mine")).tasks.keys() == {"first"}
    assert len(scores.read_scores(Path("mine")).tasks["first"].rows) == 2
    _rows_are_merged(found, both)
    assert "no_such" in refused("suite", "--tasks", "no_such")
    # a folder of another suite, before anything is trained
    assert "cannot share a table" in refused("suite", "--match", "state", "--out", "mine", "--dry-run")
    everything = seqmix("suite", "all", "--quick", "--tasks", "first", "--dry-run")
    runs = re.search("first +([0-9]+) +4 ", everything.out)
    assert runs
    assert int(runs[1]) + everything.out.count("leaves out") == len(MIXERS.built_in()) - 1
    assert "parallel_hybrid" not in everything.out
    assert "--budget" in refused("suite", "--quick", "--budget", "9s")
    assert "--seeds" in refused("suite", "--quick", "--seeds", "2")
    assert "expected --equal OPTION=VALUE" in refused("suite", "gla", "--equal", "short_conv", "--dry-run")
    assert 'did you mean "short_conv"?' in refused("suite", "gla", "--equal", "short_cnv=4", "--dry-run")
    # what could not be compared is refused before it is trained
    assert "rows of first cannot share" in refused("suite", "--beside", "mine", "--out", "other")
    assert not list(Path("other").glob("*/runs"))
    assert "there is no mixer to measure" in refused("suite", "--no-references")
    assert "elsewhere" in refused("suite", "--beside", "elsewhere", status=3)
    # before anything else is trained without it
    assert 'did you mean "n_heads"?' in refused("suite", "x={kind: gla, n_headz: 3}", "--dry-run")
    assert "got 'a b'" in refused("suite", "a b={kind: gla}", "--dry-run")
    assert "two mixers are called attention" in refused("suite", "attention={kind: gla}", "--dry-run")
    Path("file").touch()
    assert "is a file" in refused("suite", "gla", "--out", "file", "--dry-run")


@pytest.mark.usefixtures("tiny")
def test_published_rows_are_reused_only_under_equal_conditions(seqmix, tmp_path, monkeypatch):
    given = [Candidate.of("attention"), Candidate.of("retention")]
    planned = write_studies(tmp_path, TINY, TINY.chosen(["first"]), given, "parameters", Extent())
    known = scores.new_scores("small", "parameters", "", (), planned)
    rows = (row_of("attention", 1.0, 1.0), row_of("retention", 0.5, 0.6))
    known.tasks["first"] = known.tasks["first"].model_copy(update={"rows": rows})
    published = tmp_path / "published"
    score_page.write_scores(known, published)
    (published / scores.SCORES_FILE).rename(published / "small-parameters.json")
    for module in ("seqmix.cli.commands.suite", "seqmix.lab.suite.scores"):
        monkeypatch.setattr(f"{module}.PUBLISHED", published)

    def runs(*options):
        dry = seqmix("suite", "gla", "--tasks", "first", "--dry-run", *options)
        return int(re.search("first +([0-9]+) ", dry.out)[1]), "no training: attention, retention." in dry.out

    assert runs() == (4, True)  # two rates, two seeds
    assert runs("--no-published") == (12, False)
    assert runs("--quick") == (3, False)  # under other conditions


def _rows_are_merged(one, both):
    head, rows = score_page.score_table(scores.merge(one, both))
    assert head == ["entry", "first"]
    assert {row[0] for row in rows} == {"retention", "MineConfig", "(guessing)"}
    first = both.tasks["first"]
    other = first.model_copy(update={"conditions": first.conditions.model_copy(update={"seeds": (7,)})})
    with pytest.raises(SeqmixError, match=r"rows of first .* seeds differ"):
        scores.merge(one, both.model_copy(update={"tasks": {"first": other}}))
    with pytest.raises(SeqmixError, match="paper"):
        scores.merge(one, both.model_copy(update={"size": "paper"}))
    # an entry without a figure in every task comes last
    last = min(first.rows, key=lambda row: row.score.mean)
    gap = both.model_copy(update={"tasks": both.tasks | {"more": first.model_copy(update={"rows": (last,)})}})
    _, rows = score_page.score_table(gap)
    assert rows[0][0] == last.entry
    assert [bool(row[-1]) for row in rows] == [True, False, True]


def test_halfway_accuracy_comes_from_evaluation_at_half_the_steps():
    def run(seed, **accuracy):
        points = (
            EvaluationPoint(step=int(step[1:]), tokens=1, flops=1.0, seconds=1.0, validation_loss=1.0, accuracy=value)
            for step, value in accuracy.items()
        )
        name = f"gla-seed{seed}"
        return RunResult(
            name=name, entry="gla", seed=seed, learning_rate=0.1, status="finished", evaluations=tuple(points)
        )

    assert scores.halfway([run(0, _4=0.2, _8=0.9), run(1, _3=0.1, _8=0.8), run(2)]) == {"0": 0.2}


def row_of(entry, *values, accessories=None):
    return scores.ScoreRow(
        entry=entry,
        mixers=(entry,),
        score=statistic(values),
        scores={str(seed): value for seed, value in enumerate(values)},
        accessories=accessories or {},
        accuracy_by={},
        learning_rate=1e-3,
        parameters=1,
        state_bytes=1,
        state_grows=True,
    )


def test_score_table_marks_ties_and_lists_accessories(tmp_path):
    planned = write_studies(
        tmp_path, TINY, TINY.chosen(["first"]), [Candidate.of("gla"), Candidate.of("delta_net")], "parameters",
        Extent(), equal={"gate": "none"}, subject="delta_net",
    )  # fmt: skip
    assert planned[0].plan.subject == "delta_net"
    assert {entry.config.model.blocks["mixer"].mixer.gate for entry in planned[0].plan.entries} == {"none"}
    conditions = scores.conditions_of(planned[0])
    assert (conditions.equal, conditions.learning_rates) == ("{gate: none}", (1e-3, 1e-2))
    assert (conditions.seeds, conditions.tuning_seeds) == ((0, 1), (2,))
    assert "precision: float32" in conditions.training
    # a mixer without the option stays, also if another one cannot be trained
    given = [*map(Candidate.of, ("attention", "gla")), Candidate("nothing", {"kind": "attention", "n_heads": 3})]
    for option, value, refusal in (
        ("short_conv", 4, None),
        ("short_cnv", 4, r'^--equal short_cnv: no mixer has this option; did you mean "short_conv"'),
        ("short_conv", "x", r"^--equal short_conv: no mixer allows this value \(keeps null: expected an integer"),
    ):
        arguments = (tmp_path, TINY, TINY.chosen(["first"]), given, "parameters", Extent())
        if refusal is None:
            (task,) = write_studies(*arguments, equal={option: value})
            assert [entry.name for entry in task.plan.entries] == ["attention", "gla"]
            assert task.left_out.keys() == {"nothing"}
        else:
            with pytest.raises(SeqmixError, match=refusal):
                write_studies(*arguments, equal={option: value})
    found = scores.new_scores("small", "parameters", "", (), planned)
    rows = (
        row_of("best", 0.9, 0.95, 0.97, accessories={"short_conv": "4"}),
        row_of("near", 0.89, 0.96, 0.96, accessories={"short_conv": "none"}),
        row_of("worse", 0.5, 0.55, 0.56, accessories={"short_conv": "none"}),
        row_of("other", 0.4, 0.41, 0.42, accessories={"short_conv": "none"}),
    )
    found.tasks["first"] = found.tasks["first"].model_copy(update={"rows": rows})
    _, cells = score_page.score_table(found)
    assert [row[0] for row in cells if row[-1].endswith("*")] == ["best", "near"]
    assert not any(row[-1].endswith("?") for row in cells)
    page = "\n".join(score_page.markdown(found))
    assert "± is half the width of a mean's 95 % interval" in page
    assert "| worse | none |" in page
    assert "learning rate tuned (0.001, 0.01; seeds 2)" in page
    single = found.tasks["first"].model_copy(update={"rows": (row_of("a", 0.5), row_of("b", 0.9))})
    found.tasks["first"] = single
    page = "\n".join(score_page.markdown(found))
    assert "There is one seed, so there are no intervals and no ranking" in page
    assert "*" not in page.replace("**", "").replace("blocks.*", "")


def test_task_variations_share_one_column_with_their_mean(tmp_path):
    changes = {"long": {"data": {"sequence_length": 32}}, "few": {"data": {"training_examples": 8}}}
    first = TINY.tasks["first"].model_copy(
        update={"changes": {k: Change.model_validate(v) for k, v in changes.items()}}
    )
    settings = TINY.model_copy(update={"tasks": {"first": first}})
    chosen = settings.chosen(["first"])
    assert list(chosen) == ["first", "first+long", "first+few"]
    planned = write_studies(tmp_path, settings, chosen, [Candidate.of("attention")], "parameters", Extent())
    data = [task.plan.runs[0].config.data for task in planned]
    assert [(each.sequence_length, each.training_examples) for each in data] == [(8, None), (32, None), (8, 8)]
    found = scores.new_scores("small", "parameters", "", (), planned)
    for (name, task), mean in zip(found.tasks.items(), (0.5, 0.7, 0.9), strict=True):
        found.tasks[name] = task.model_copy(update={"rows": (row_of("a", mean - 0.1, mean + 0.1),)})
    # the mean of each seed is 0.6 and 0.8, and t is 12.706
    assert score_page.score_table(found) == (
        ["entry", "first"],
        [("a", "70.0 ± 127.1"), ("(guessing)", "50.0")],
    )
    # one without a figure: none of the task
    found.tasks["first+few"] = found.tasks["first+few"].model_copy(update={"rows": ()})
    assert score_page.score_table(found)[1][:-1] == []


def test_marks_say_who_is_not_separated_from_the_best(tmp_path):
    planned = write_studies(tmp_path, TINY, TINY.chosen(["first"]), [Candidate.of("gla")], "parameters", Extent())

    def cells(*rows):
        found = scores.new_scores("small", "parameters", "", (), planned)
        found.tasks["first"] = found.tasks["first"].model_copy(update={"rows": rows})
        return dict(score_page.score_table(found)[1])

    # an entry of which little is known may be the best, but gets no star for that
    rough = cells(row_of("wide", 0.6, 0.35, 0.85), row_of("sure", 0.67, 0.68, 0.66), row_of("low", 0.1, 0.11, 0.12))
    assert rough["sure"].endswith("*")
    assert rough["wide"].endswith("?")
    assert not rough["low"].endswith(("*", "?"))
    assert not any(cell.endswith(("*", "?")) for cell in cells(row_of("a", 0.5, 0.51), row_of("b", 0.5, 0.52)).values())
    # where seeds learn or do not, the column counts them
    split = cells(
        *(row_of(name, *([high] * 5)) for name, high in (("yes", 0.999), ("no", 0.1))),
        row_of("half", *[0.1] * 2, *[0.99] * 3),
    )
    assert (split["yes"], split["no"], split["half"]) == ("99.9 (5 of 5) *", "10.0 (0 of 5)", "63.4 (3 of 5) *")


def test_published_rows_match_current_settings(tmp_path):
    (file,) = scores.PUBLISHED.glob("*.json")
    published = scores.read_scores(Path(file.stem))
    settings, extent = load_settings(published.size), Extent()
    chosen = settings.chosen(list(published.tasks))
    planned = write_studies(tmp_path, settings, chosen, [Candidate.of("attention")], published.match, extent)
    assert scores.comparable(scores.new_scores("small", "parameters", "", (), planned), published) == published
