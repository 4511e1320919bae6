"""Language modeling at equal parameters: the studies, merged results, comparisons at equal time, and the page."""

import json
import math
import runpy
from pathlib import Path

import pytest

from seqmix import MIXERS, SeqmixError
from seqmix.lab.study.plan import plan
from seqmix.lab.study.results import DecodeSpeedRow, EntryResult, Results, RunResult, SpeedResult, TrainSpeedRow
from seqmix.lab.study.results_file import read_results, write
from seqmix.lab.study.study import STUDIES, load_study
from seqmix.lab.study.summary import summarise
from seqmix.research.language_results import Measured, Model, Trained, add, losses_after, read_measured

ROOT = Path(__file__).resolve().parents[2]
SIZES = "steps of 8 sequences of 256 tokens"
SETUP = f"data: text · optimizer: adamw · training: 120 {SIZES} / 360 {SIZES}"
STEP = {"attention": 0.2, "retention": 0.2, "gla": 0.1, "mamba2": 0.6}
"""Seconds per training step: within the measured lengths, beyond the longest run, and below the shortest."""


@pytest.fixture(scope="module")
def page():
    return runpy.run_path(str(ROOT / "research" / "language.py"))


def loss(entry, steps, seed):
    return (6.0 + 0.01 * seed + 0.1 * list(STEP).index(entry)) * steps**-0.2


def results(entries, seeds, *, timed=True, setup=SETUP, parameters=1_000_000, rate=2e-3, cpu_time=True, path=None):
    runs = [
        RunResult(
            name=f"{entry}-{steps}-{seed}",
            entry=entry,
            seed=seed,
            learning_rate=rate,
            variant={path or "training.steps": steps},
            precision="bfloat16",
            status="finished",
            validation_loss=loss(entry, steps, seed),
        )
        for seed in seeds
        for steps in (120, 360)
        for entry in entries
    ]
    speed = SpeedResult(
        tokens=2048,
        cpu_time=cpu_time,
        train=tuple(
            TrainSpeedRow(
                entry=entry,
                length=256,
                tokens_per_second=2048 / STEP[entry],
                tokens_per_second_range=(2048 / STEP[entry] / 1.2, 2048 / STEP[entry]),
            )
            for entry in entries
        ),
        decode=tuple(
            DecodeSpeedRow(entry=entry, context=context, seconds=1e-3, state_bytes=64 * context)
            for entry in entries
            for context in (256, 4096)
        ),
    )
    return Results(
        name="language",
        created="2026-12-01T00:00:00+00:00",
        setup=setup,
        entries=tuple(
            EntryResult(
                name=entry,
                config="",
                mixers=(entry,),
                parameters=parameters,
                flops_per_token=2e6,
                state_bytes=4096,
                state_grows=False,
            )
            for entry in entries
        ),
        runs=tuple(runs),
        summary=tuple(summarise(runs)),
        speed=speed if timed else SpeedResult(),
    )


def test_language_studies_include_every_mixer_once():
    names = [name for study in ("language", "language-slow") for name in load_study(STUDIES / f"{study}.yaml").names]
    assert sorted(names) == sorted([*MIXERS.built_in(), "attention"])  # attention is in both, to compare times with


def test_5m_study_has_the_sizes_and_lengths_stated_on_the_page(page):
    file = STUDIES / "language-5m.yaml"
    planned = plan(load_study(file), file)
    assert {run.config.training.steps for run in planned.runs} == set(page["LENGTHS"])
    assert {run.tokens_per_step for run in planned.runs} == {page["TOKENS"]}
    assert all(abs(entry.cost.parameters / 5e6 - 1) < 1e-3 for entry in planned.entries)
    assert len(planned.runs) == 6 * 2 * (2 + 3)
    assert planned.study.speed is not None
    assert planned.study.speed.cpu_time
    assert tuple(map(str, planned.study.speed.decode.contexts)) == page["CONTEXTS"]


def test_add_merges_seeds_entries_and_times(tmp_path):
    write(results(["attention", "retention"], [0, 1], timed=False), tmp_path / "first")
    write(results(["attention", "gla"], [1, 2]), tmp_path / "second")
    measured = Measured()
    for folder in ("first", "second", "second"):
        measured = add(measured, read_results(tmp_path / folder))
    (tmp_path / "all.json").write_text(measured.model_dump_json(exclude_defaults=True))
    assert read_measured(tmp_path / "all.json") == measured
    assert read_measured(tmp_path / "none.json") == Measured()
    (size,) = measured.sizes.values()
    assert measured.sizes.keys() == {"1M"}
    assert {name: set(model.runs["360"].losses) for name, model in size.models.items()} == {
        "attention": {"0", "1", "2"},
        "retention": {"0", "1"},
        "gla": {"1", "2"},
    }
    assert size.models["retention"].costs is None
    assert size.models["gla"].costs is not None
    assert size.models["gla"].costs.relative == pytest.approx(0.5)
    assert size.models["gla"].costs.state_bytes == {"256": 16384, "4096": 262144}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": SETUP.replace("adamw", "muon")}, "expected optimizer: adamw, got optimizer: muon"),
        ({"parameters": 1_100_000}, "expected equal parameters, got 1,000,000 to 1,100,000"),
        ({"rate": 6e-3}, "attention was trained for 120 steps with learning rate 0.002, now with 0.006"),
        ({"cpu_time": False}, "set speed.cpu_time to true"),
        ({"path": "model.d_model"}, "expected a study that varies training.steps and nothing else, got language"),
    ],
)
def test_runs_under_other_conditions_are_rejected(changes, message):
    measured = add(Measured(), results(["attention", "gla"], [0]))
    entries = ["retention"] if "parameters" in changes else ["attention"]
    with pytest.raises(SeqmixError, match=message):
        add(measured, results(entries, [1], **changes))


def test_results_with_fewer_lengths_can_be_added():
    measured = add(Measured(), results(["attention"], [0]))
    shorter = SETUP.replace(f" / 360 {SIZES}", "")
    assert add(measured, results(["attention"], [1], setup=shorter)).sizes.keys() == {"1M"}


def test_losses_between_lengths_are_interpolated_by_power_law():
    losses = {steps: {"0": 1.0 + 5 * steps**-0.3} for steps in (100, 200, 400)}
    runs = {str(steps): Trained(learning_rate=1e-3, losses=each) for steps, each in losses.items()}
    model = Model(mixer="gla", short_conv="none", parameters=1, runs=runs)
    assert model.losses_at(150, floor=1.0).losses["0"] == pytest.approx(1.0 + 5 * 150**-0.3)
    assert model.losses_at(150).losses["0"] > 1.0 + 5 * 150**-0.3  # the chord of a curve that levels off
    assert model.losses_at(200) == (losses[200], None)
    assert model.losses_at(50) == (losses[100], "at least")
    assert model.losses_at(500) == (losses[400], "at most")
    assert model.model_copy(update={"runs": {}}).losses_at(150) is None
    assert losses_after({"gla": model}, {"gla": 200})["gla"] == pytest.approx([losses[200]["0"] / math.log(2)])
    assert losses_after({"gla": model}, {"gla": 500}) == {}  # only a bound


def test_page_is_written_from_results(page):
    measured = add(Measured(), results(list(STEP), [0, 1, 2]))
    files = page["files"](measured)
    text = files.pop(page["TARGET"])
    assert [picture.name for picture in files] == ["1m.svg", "1m-costs.svg"]
    assert all(f"(language/{picture.name})" in text for picture in files)
    (losses,) = (svg for picture, svg in files.items() if picture.name == "1m.svg")
    assert [losses.index(f">{name}<") for name in STEP] == sorted(losses.index(f">{name}<") for name in STEP)
    tokens, time, _ = text.split("## Results")[1].split("### ")[1:]
    assert "No entry is better than `attention`, by simultaneous intervals of all pairs." in tokens
    assert "Against attention, 0 are better, 3 worse, 0 equivalent within 0.05 bits and 0 not separated." in tokens
    assert "bits, pooled over 4 entries (8 degrees of freedom" in tokens
    bits = f"{loss('gla', 360, 1) / math.log(2):.3f} ± "
    assert bits in next(line for line in tokens.splitlines() if line.startswith("| `gla`"))
    by_name = {line.split("`")[1]: line for line in time.splitlines() if line.startswith("| `")}
    assert f"| 200 | 1.00 | 0.49M | {loss('retention', 240, 1) / math.log(2):.3f} ± " in by_name["retention"]
    assert f"≤ {loss('gla', 360, 1) / math.log(2):.3f} |  |  |" in by_name["gla"]
    assert f"≥ {loss('mamba2', 120, 1) / math.log(2):.3f} |  |  |" in by_name["mamba2"]
    slower = (loss("retention", 200, 1) - loss("retention", 240, 1)) / math.log(2)
    assert f"slowest round, no loss changes by more than {slower:.3f} and no difference from attention by" in time
    assert "floor of 0.5 nats in the power laws, no loss changes by more than" in time
    assert "0 of the verdicts against it would change." in time


def test_family_and_cost_findings_follow_the_planned_rules(page):
    (size,) = add(Measured(), results(list(STEP), [0, 1, 2])).sizes.values()
    compared = page["at_length"](size, 360)
    assert page["family_findings"](compared, size) == (
        "Families that differ from attention, by the rule above: linear attention and decays (3 of 3 worse)."
    )
    without = size.model_copy(update={"models": {name: size.models[name] for name in ("attention", "gla", "mamba2")}})
    fewer = page["at_length"](without, 360)
    assert page["family_findings"](fewer, without).endswith(": none.")  # two members are no family
    cheap = {"mamba2": 1, "gla": 2, "attention": 3, "retention": 3}  # from the worst to the best
    assert page["worth_naming"](compared, cheap) == ["gla", "attention", "retention"]
    assert page["worth_naming"](compared, {name: -cost for name, cost in cheap.items()}) == []
    assert page["costs"](size)[0].startswith("Better, by intervals of all pairs, than every mixer with a")


def test_single_seed_allows_no_conclusion(page):
    (size,) = add(Measured(), results(list(STEP), [0])).sizes.values()
    lines = page["equal_tokens"](size)
    assert lines[0] == "There is one seed, so there is no interval: differences may be chance."
    assert not any("±" in line for line in lines)


def test_untimed_results_have_no_cost_figure(page):
    files = page["files"](add(Measured(), results(list(STEP), [0, 1], timed=False)))
    assert [file.name for file in files] == ["language.md", "1m.svg"]
    assert "1m-costs" not in files[page["TARGET"]]
    assert "The times are to be measured" in files[page["TARGET"]]


def test_failed_run_is_listed_until_it_finishes(page):
    good = results(["attention", "gla"], [0])
    *rest, last = good.runs
    broken = last.model_copy(update={"status": "failed", "error": "the loss is not finite", "validation_loss": None})
    bad = good.model_copy(update={"runs": (*rest, broken), "summary": tuple(summarise([*rest, broken]))})
    measured = add(Measured(), bad)
    assert "- gla-360-0 failed: the loss is not finite\n" in page["files"](measured)[page["TARGET"]]
    assert "failed" not in page["files"](add(measured, good))[page["TARGET"]].partition("## Results")[2]


def test_study_without_finished_runs_adds_nothing():
    measured = add(Measured(), results(["attention"], [0]))
    empty = results(["attention"], [1]).model_copy(update={"runs": (), "summary": (), "speed": SpeedResult()})
    assert add(measured, empty) == measured


def test_page_says_when_there_are_no_results(page):
    (text,) = page["files"](Measured()).values()
    assert "<!-- language: begin -->\n\nIt is to be measured.\n\n<!-- language: end -->" in text


def test_unrelated_results_file_is_rejected(tmp_path):
    file = tmp_path / "language.json"
    file.write_text(json.dumps({"rows": []}))
    with pytest.raises(SeqmixError, match=r"language\.json does not hold results of language studies"):
        read_measured(file)
