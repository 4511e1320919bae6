"""Results: statistics over seeds, the best learning rate, invalid files, tables, and generated pages."""

import csv
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from seqmix import SeqmixError
from seqmix.cli.study_progress import Forecast
from seqmix.lab.statistics.multiplicity import t_quantile
from seqmix.lab.study.results import (
    Difference,
    EntryResult,
    Results,
    RunResult,
    SpeedResult,
    Statistic,
    TrainSpeedRow,
    where,
)
from seqmix.lab.study.results_file import read_results, write
from seqmix.lab.study.run_results import collect_results, is_finished, run_result, setup
from seqmix.lab.study.scaling import scaling_lines
from seqmix.lab.study.study_figures import Plots
from seqmix.lab.study.summary import best_first, choose_rates, statistic, summarise, with_timed_speeds
from seqmix.lab.study.tables import markdown, write_tables
from seqmix.registry.yaml import write as to_yaml

ROOT = Path(__file__).resolve().parents[3]


def run(entry, loss, *, seed=0, rate=1e-3, accuracy=None, variant=None, tunes=False):
    return RunResult(
        name=f"{entry}-{rate}-{seed}-{variant}",
        entry=entry,
        tunes=tunes,
        seed=seed,
        learning_rate=rate,
        variant=variant or {},
        status="failed" if loss is None else "finished",
        error="it broke" if loss is None else None,
        validation_loss=loss,
        accuracy=accuracy,
        accuracy_by={} if accuracy is None else {"pairs": {"4": accuracy, "8": accuracy / 2}},
        tokens_per_second=1000.0,
    )


def results(runs, rates=()):
    names = dict.fromkeys(run.entry for run in runs)
    entries = tuple(
        EntryResult(
            name=name,
            config="",
            mixers=("retention",),
            parameters=1000,
            flops_per_token=2000.0,
            state_bytes=4096,
            state_grows=False,
        )
        for name in names
    )
    return Results(name="x", created="", entries=entries, runs=tuple(runs), summary=tuple(summarise(runs, rates)))


def test_best_learning_rate_minimizes_mean_tuning_loss():
    runs = [
        *(run("a", loss, seed=seed, rate=1e-3, tunes=True) for seed, loss in enumerate((2.0, 2.2))),
        *(run("a", loss, seed=seed, rate=3e-3, tunes=True) for seed, loss in enumerate((1.0, 2.8))),
        *(run("a", loss, seed=seed, rate=1e-2, tunes=True) for seed, loss in enumerate((3.0, 3.2))),
        *(run("a", 0.1, seed=seed, rate=1e-2) for seed in (5, 6)),  # what is reported chooses nothing
    ]
    assert choose_rates(runs) == {"a": 3e-3}
    assert choose_rates(runs[:2] + runs[4:]) == {"a": 1e-3}


def test_learning_rate_with_failed_seeds_is_not_chosen():
    runs = [run("a", 2.0), run("a", 2.0, seed=1), run("a", 1.0, rate=1e-2), run("a", None, rate=1e-2, seed=1)]
    tuning = [each.model_copy(update={"tunes": True}) for each in runs]
    assert choose_rates(tuning) == {"a": 1e-3}
    assert choose_rates([each for each in tuning if each.status == "failed"]) == {}
    # nothing is chosen before all have ended
    assert choose_rates([*tuning, tuning[0].model_copy(update={"status": "missing", "validation_loss": None})]) == {}
    assert not summarise([run("a", None)])
    assert not summarise(tuning)


def test_best_rate_at_grid_edge_is_flagged():
    assert [summarise([run("a", 1.0, rate=rate)], (1e-3, 3e-3, 1e-2))[0].at_edge for rate in (1e-3, 3e-3, 1e-2)] == [
        "lowest",
        None,
        "highest",
    ]


def seeds(entry, *losses):
    return [run(entry, loss, seed=seed) for seed, loss in enumerate(losses)]


def test_intervals_of_means_use_the_seeds_of_all_entries():
    rows = summarise([*seeds("a", 1.0, 1.2, 1.1), *seeds("b", 2.0, 2.1, 2.3)])
    deviation = np.mean([np.var([1.0, 1.2, 1.1], ddof=1), np.var([2.0, 2.1, 2.3], ddof=1)]) ** 0.5
    margin = t_quantile(4) * deviation / 3**0.5
    assert [row.validation_loss.margin for row in rows] == pytest.approx([margin, margin])
    assert rows[0].validation_loss.spread == pytest.approx(0.1)
    assert statistic([1.0]) == Statistic(mean=1.0)


def test_entry_has_all_ranks_that_intervals_allow():
    rows = summarise([*seeds("a", 1.0, 1.1, 1.2), *seeds("b", 1.1, 1.2, 1.3), *seeds("c", 2.1, 2.0, 2.2)])
    assert {row.entry: row.ranks for row in rows} == {"a": (1, 2), "b": (1, 2), "c": (3, 3)}
    assert {row.ranks for row in summarise([*seeds("a", 1.0), *seeds("b", 2.0)])} == {None}
    assert {row.ranks for row in summarise(seeds("a", 1.0, 2.0))} == {None}
    better = [run(entry, 1.0, seed=seed, accuracy=acc) for entry, acc in (("a", 0.5), ("b", 0.7)) for seed in (0, 1)]
    assert {row.entry: row.ranks for row in summarise(better)} == {"b": (1, 1), "a": (2, 2)}


def test_summary_explains_ranks_and_intervals():
    several = markdown(results([run(entry, loss, seed=s) for entry, loss in (("a", 1.0), ("b", 2.0)) for s in (0, 1)]))
    assert "A seed's score has a standard deviation of 0.0001 nats, pooled over 2 entries (2 degrees" in several
    assert "rank: the places that an entry can have" in several
    assert "against a: differences with simultaneous 95 % intervals, by Dunnett's method; not separated:" in several
    assert "all seeds are evaluated on the same data." in several
    one = markdown(results([run("a", 1.0), run("b", 2.0)]))
    assert "There is one seed, so there is no interval and no rank: differences may be chance." in one
    assert "rank |" not in one


def test_entry_of_which_seeds_failed_has_no_rank_and_stands_last():
    found = results([*seeds("a", 0.5, None, None), *seeds("b", 1.0, 1.1, 1.2), *seeds("c", 2.0, 2.1, 2.2)])
    rows = {row.entry: row for row in found.summary}
    assert (rows["a"].ranks, rows["a"].seeds, rows["a"].failed) == (None, 1, 2)
    assert (rows["b"].ranks, rows["c"].ranks) == ((1, 1), (2, 2))
    assert [row.entry for row in best_first(found)] == ["b", "c", "a"]
    page = markdown(found)
    assert "not compared: 2 of 3 seeds of a failed" in page
    assert "An entry of which seeds failed has neither a rank nor a verdict and stands last" in page


def test_grid_edge_notes_are_grouped_by_variant():
    runs = [run(e, 1.0, variant={"equal.short_conv": v}) for v in (None, 4) for e in "abc" if (e, v) != ("c", None)]
    assert (
        "a and b where equal.short_conv is null; a, b and c where equal.short_conv is 4: the best learning rate, "
        "0.001, is the lowest that was tried" in markdown(results(runs, (1e-3, 1e-2)))
    )


def test_speed_note_explains_numbers_in_brackets():
    runs = [
        run("a", 1.0, seed=seed).model_copy(update={"tokens_per_second": speed, "tokens_per_second_range": quartiles})
        for seed, (speed, quartiles) in enumerate(((100.0, (50.0, 110.0)), (200.0, (190.0, 300.0))))
    ]
    page = markdown(results(runs))
    assert "150 [50, 300]" in page  # from the lowest lower to the highest upper quartile
    assert "in brackets, the lowest lower and the highest upper quartile of these runs" in page
    alone = markdown(results([each.model_copy(update={"alone": True}) for each in runs]))
    assert "one after another, not interleaved; other programs may have slowed some more than others" in alone


def test_variant_values_are_shown_as_yaml():
    variants = ({"equal.short_conv": None}, {"equal.short_conv": {"kind": "standard"}})
    page = markdown(results([run(entry, 1.0, variant=variant) for variant in variants for entry in "ab"]))
    assert "At short conv null: a reaches" in page
    assert "At short conv {kind: standard}: a reaches" in page
    assert "| a | {kind: standard} |" in page
    assert where(variants[0]) == " where equal.short_conv is null"
    assert "None" not in page


def test_each_variant_has_its_own_summary_row():
    variants = ({"data.sequence_length": 8}, {"data.sequence_length": 16})
    runs = [
        run(entry, 1.0, seed=seed, accuracy=accuracy, variant=variant)
        for variant, accuracy in zip(variants, (0.5, 1.0), strict=True)
        for entry in ("a", "b")
        for seed in (0, 1)
    ]
    rows = summarise(runs)
    assert [(row.entry, row.variant) for row in rows] == [(entry, variant) for variant in variants for entry in "ab"]
    assert rows[0].accuracy_by["pairs"]["8"].mean == 0.25
    assert rows[0].accuracy_by["pairs"]["8"].spread == 0.0


def test_task_scores_get_their_own_columns(tmp_path):
    runs = [
        run("a", 1.0, seed=seed).model_copy(update={"scores": {"piqa": {"acc": accuracy}}})
        for seed, accuracy in enumerate((0.5, 0.7))
    ]
    runs.append(run("b", 1.0))
    found = results(runs)
    page = markdown(found)
    assert "piqa acc" in page
    assert f"0.6000 ± {t_quantile(1) * 0.1:.4f}" in page
    write_tables(found, tmp_path)
    (first, *_) = csv.DictReader((tmp_path / "summary.csv").open())
    assert float(first["scores.piqa.acc"]) == pytest.approx(0.6)


def test_best_entry_comes_first():
    runs = [run("a", 1.0, accuracy=0.2), run("b", 2.0, accuracy=0.9), run("c", 0.5, accuracy=0.2)]
    assert [row.entry for row in best_first(results(runs))] == ["b", "c", "a"]
    page = markdown(results(runs))
    assert page.index("| b |") < page.index("| c |") < page.index("| a |")


def test_row_shows_cost_of_its_variant_and_speed_of_its_runs():
    runs = [
        run("a", loss, seed=seed, rate=rate, variant={"model.d_model": width}).model_copy(
            update={
                "parameters": 100 * width,
                "flops_per_token": 1e9 * width,
                "state_bytes": 1024 * width,
                "tokens_per_second": speed,
            }
        )
        for width, rate, loss, speeds in ((8, 1e-3, 2.0, (7000, 7002, 7900)), (16, 1e-3, 1.0, (500, 510, 600)))
        for seed, speed in enumerate(speeds)
    ]
    slow = run("a", 3.0, rate=1e-2, variant={"model.d_model": 8}, tunes=True)
    slow = slow.model_copy(update={"tokens_per_second": 1.0})
    found = results([*runs, slow])
    page = markdown(found)
    assert "| 8 | 2.0000 ± 0.0002 | 3 | 0.001 | 800 | 8 KiB | 7,002 |" in page
    assert "| 16 | 1.0000 ± 0.0002 | 3 | 0.001 | 1,600 | 16 KiB | 510 |" in page
    (state,) = [figure for figure in Plots(found).outcomes() if figure.name.endswith("state")] or [None]
    assert state is None or {point.x for point in state.series[0].points} == {16384.0}


def test_setup_names_data_optimizer_rate_schedule_and_length(planned):
    assert setup(planned("")) == (
        "data: text (paths [text.txt], tokenizer bytes, validation_fraction 0.1, test_fraction 0.0) · "
        "optimizer: adamw · learning rate: 0.01 (not tuned) · schedule: linear (warmup_steps 1) · "
        "training: 120 steps of 2 sequences of 16 tokens"
    )
    default = planned(study="base: retnet-tiny\nmodel: {n_layers: 1}\nmixers: [retention]\n")
    assert setup(default).startswith("data: text (the source of Python's standard library, tokenizer bytes, ")
    tuned = setup(
        planned(
            "tune: {learning_rate: [1e-3, 3e-3]}\nvary: {data.sequence_length: [8, 16]}\n"
            "entries: {other: {training: {optimizer: muon}}}\n"
        )
    )
    assert "optimizer: adamw / muon · learning rate: tuned over 0.001, 0.003 · " in tuned
    assert tuned.endswith("120 steps of 2 sequences of 8 tokens / 120 steps of 2 sequences of 16 tokens")


@pytest.mark.parametrize(("loss", "ours"), [(1.0, math.e), (1e5, None)])
def test_overflowing_perplexity_is_none(planned, tmp_path, loss, ours):
    made = planned("paper: [{label: perplexity, entry: retention, theirs: 26.0}]\n")
    run = made.runs[0]
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(run.config.model_dump(mode="json")))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 120, "validation_loss": loss, "final": True}) + "\n")
    (folder / "scores.json").write_text(json.dumps({"piqa": {"acc": 0.5, "acc_stderr": 0.1}}))
    found = collect_results(made, tmp_path, failed={})
    assert found.runs[0].scores == {"piqa": {"acc": 0.5}}
    assert found.runs[0].validation_loss == loss
    assert found.paper[0].ours == ours
    write(found, tmp_path)
    assert read_results(tmp_path) == found


def test_stalled_step_does_not_inflate_time_of_other_steps(planned, tmp_path):
    run = planned().runs[0]
    (tmp_path / "config.yaml").write_text(to_yaml(run.config.model_dump(mode="json")))
    speeds = {30: 320.0, 60: 0.1, 90: 320.0, 120: 320.0}  # of one step each: 32 tokens
    lines = [{"step": step, "loss": 2.0, "tokens_per_second": speed} for step, speed in speeds.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = run_result(run, tmp_path)
    assert found.seconds == 12.0
    assert [point.seconds for point in found.history] == [3.0, 6.0, 9.0, 12.0]


def test_extended_run_reports_its_last_step(planned, tmp_path):
    run = planned().runs[0]
    steps = run.config.training.steps
    (tmp_path / "config.yaml").write_text(to_yaml(run.config.model_dump(mode="json")))
    early = {"step": steps // 2, "validation_loss": 3.0, "final": True}  # of the run before its steps were raised
    late = {"step": steps, "validation_loss": 2.0, "final": True}
    for lines, status, loss in (([early], "missing", None), ([early, late], "finished", 2.0)):
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        found = run_result(run, tmp_path)
        assert (found.status, found.validation_loss) == (status, loss)
        assert is_finished(run, tmp_path) == (status == "finished")


DAMAGED = (
    '{"step": 120, "validation_loss": null, "final": true}',
    '{"step": 120, "validation_loss": NaN, "final": true}',
    '{"step": 1, "loss": 2.0}',
    '{"step": 1, "loss": 2.0, "tokens_per_second": 0}',
    '{"step": 1, "loss": "2.0", "tokens_per_second": "x"}',
    '{"step": 120, "fin',
)


def test_damaged_measurements_are_ignored(planned, tmp_path):
    made = planned(study="base: retnet-tiny\nmodel: {n_layers: 1}\nmixers: [retention]\ntraining: {batch_size: 1}\n")
    (tmp_path / "config.yaml").write_text(to_yaml(made.runs[0].config.model_dump(mode="json")))
    for damage in DAMAGED:
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 2, "loss": 3.0, "tokens_per_second": 512.0}}\n{damage}\n')
        found = run_result(made.runs[0], tmp_path)
        assert (found.status, found.seconds, [point.step for point in found.history]) == ("missing", 1.0, [2]), damage


def test_the_summary_of_results_of_version_0_4_is_computed_again_from_the_runs(tmp_path):
    rates = 1e-3, 3e-3
    tuning = [run("a", loss, rate=rate, tunes=True) for loss, rate in ((1.0, 1e-3), (2.0, 3e-3))]
    found = results([*tuning, *seeds("a", 1.0, 1.2, 1.1), *seeds("b", 2.0, 2.1, 2.3)], rates)
    train = tuple(TrainSpeedRow(entry=entry, length=16, tokens_per_second=7e3) for entry in "ab")
    found = with_timed_speeds(found.model_copy(update={"speed": SpeedResult(train=train)}))
    assert [row.tokens_per_second for row in found.summary] == [7e3, 7e3]
    content = json.loads(write(found, tmp_path).read_text())
    for row in content["summary"]:
        del row["ranks"]
        row |= {"rank": 1, "validation_loss": {"mean": 1.0, "margin": 118.0}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert read_results(tmp_path) == found


def test_results_round_trip_through_files(tmp_path):
    found = results([run("a", 1.0, accuracy=0.5), run("b", None)], (1e-3, 3e-3))
    assert write(found, tmp_path) == tmp_path / "results.json"
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == found
    write_tables(found, tmp_path)
    assert "accuracy.pairs.4" in (tmp_path / "summary.csv").read_text()
    page = markdown(found)
    assert "| a | 50.0 % | 1.0000 | 1 | 1,000 | 4 KiB | 1,000 |" in page
    # seeds that agree exactly still vary as much as accuracies are measured: half a point
    margin = 100 * t_quantile(1) * 0.005 / 2**0.5
    same = markdown(results([run("a", 1.0, seed=seed, accuracy=0.5) for seed in (0, 1)]))
    assert f"| 50.0 ± {margin:.1f} % |" in same
    assert "- b-0.001-0-None failed: it broke" in page
    assert "the best learning rate, 0.001, is the lowest that was tried" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file or directory; expected a study's folder or its results.json"),
        ("{", "does not hold the results of a study: Invalid JSON"),
        ("[" * 100_000, "does not hold the results of a study: Invalid JSON"),
        (json.dumps({"format": 2}), "does not hold the results of a study: "),
    ],
)
def test_invalid_results_file_raises(tmp_path, text, said):
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SeqmixError) as error:
        read_results(tmp_path)
    assert str(error.value).startswith(f"{file} {said}")


def test_run_of_unknown_entry_is_rejected():
    found = results([run("a", 1.0)]).model_dump(mode="json")
    found["runs"][0]["entry"] = "b"
    with pytest.raises(ValueError, match=r"'b'.*entries: a"):
        Results.model_validate(found)


def test_time_left_counts_only_remaining_work():
    now = [0.0]
    forecast = Forecast({"a": 100.0, "b": 300.0}, clock=lambda: now[0])
    assert forecast.seconds_left is None
    forecast.move("a", 0.5)  # half of it was made before
    now[0] = 10.0
    forecast.move("a", 1.0)
    assert forecast.share == 0.25
    assert forecast.seconds_left == pytest.approx(300 / 50 * 10)


def test_filling_a_page_without_region_markers_raises(tmp_path):
    page = runpy.run_path(str(ROOT / "docs" / "mixers.py"))
    file = tmp_path / "page.md"
    file.write_text("x")
    with pytest.raises(SeqmixError, match="no region between <!-- costs: begin -->"):
        page["fill"](file, {"costs": ["a"]})


def test_transfer_table_shows_cost_of_using_the_narrow_models_rate():
    page = runpy.run_path(str(ROOT / "research" / "transfer.py"))
    losses = {
        ("standard", 64): (1.5, 1.2),
        ("mup", 64): (1.5, 1.2),
        ("standard", 256): (1.0, 1.1),
        ("mup", 256): (1.3, 1.0),
    }
    runs = [
        run(entry, loss, rate=rate, variant={"model.parametrization": {"kind": kind}, "model.d_model": d}, tunes=True)
        for (kind, d), row in losses.items()
        for entry in ("b", "a")  # as in a study: every variant has all entries
        for rate, loss in zip((1e-3, 2e-3), row, strict=True)
    ]
    assert page["transfer"](results(runs))[2:5] == [
        "| `b` | 64 | standard and muP | 1.500 | **1.200** |  |",
        "| `b` | 256 | standard | **1.000** | 1.100 | 0.100 |",
        "| `b` | 256 | muP | 1.300 | **1.000** | 0.000 |",
    ]


def test_table_says_no_option_for_a_mixer_without_convolution():
    page = runpy.run_path(str(ROOT / "research" / "accessories.py"))
    runs = [
        run(entry, 1.0, accuracy=accuracy, variant={"equal.short_conv": value})
        for entry, pair in (("a", (0.5, 0.5)), ("b", (0.1, 0.2)))
        for value, accuracy in zip((None, 4), pair, strict=True)
    ]
    lacks = Difference(entry="a", variant={"equal.short_conv": 4}, values={"short_conv": "no option"})
    lines = page["recall"](results(runs).model_copy(update={"differences": (lacks,)}))
    assert [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines[2:4]] == [
        "| `b` | 10.0 % |  | 0.001 | 20.0 % |  | 0.001 |",
        "| `a` | 50.0 % |  | 0.001 | no option |  |  |",
    ]


def test_convolution_losses_are_in_bits_with_simultaneous_intervals():
    page = runpy.run_path(str(ROOT / "research" / "accessories.py"))
    losses = {
        ("a", None): (1.0, 2.0),
        ("a", 4): (0.5, 1.0),
        ("attention", None): (2.0, 3.0),
        ("attention", 4): (1.0, 1.5),
    }
    runs = [
        run(entry, loss * math.log(2), seed=seed, variant={"training.steps": 360, "equal.short_conv": value})
        for (entry, value), pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    measured = page["read_text"](results(runs))
    lines = page["text"](measured)[2:]
    assert [line.replace("\N{NO-BREAK SPACE}", " ").replace(" ± ", "±").split(" | ") for line in lines] == [
        ["| `a`", "1.500±2.151", "-1.000±3.042", "0.001", "0.750±1.076", "-0.500±1.521", "0.001", "-0.750±1.954 |"],
        ["| `attention`", "2.500±2.151", "", "0.001", "1.250±1.076", "", "0.001", "-1.250±1.954 |"],
    ]
    others = measured.sizes["without"]  # 1 and 2 bits against attention's 1 and 1.5 with a convolution
    pooled = ((0.5 + 0.125) / 2) ** 0.5
    assert page["against"](measured, others)[-1].endswith(f"| +0.250 ± {t_quantile(2) * pooled:.3f} |")
    with pytest.raises(SeqmixError, match="expected results under the conditions other; got"):
        page["against"](measured, others.model_copy(update={"conditions": "other"}))


def test_study_that_does_not_vary_convolution_is_rejected(tmp_path):
    page = runpy.run_path(str(ROOT / "research" / "accessories.py"))
    (tmp_path / "results.json").write_text(results([run("a", 1.0)]).model_dump_json())
    with pytest.raises(SeqmixError, match=r"expected finished runs of a study that varies equal\.short_conv, got "):
        page["read_study"](str(tmp_path))


# ---- how loss falls with size

SIZES = 100_000, 250_000, 900_000


def sized(entry, size, loss, **how):
    variant = how.pop("variant", {"model.d_model": size})
    return run(entry, loss, variant=variant, **how).model_copy(update={"parameters": size})


def study(exponent=0.1, noise=(0.0, 0.0), **how):
    """Two seeds at each size on a power law, plus noise of each seed with alternating sign."""
    return [
        sized("a", size, 5 * size**-exponent * math.exp(noise[seed] * (-1) ** i), seed=seed, **how)
        for i, size in enumerate(SIZES)
        for seed in (0, 1)
    ]


def test_scaling_line_recovers_a_power_law():
    (line,) = scaling_lines(results(study()))
    assert (line.exponent, line.error) == pytest.approx((0.1, 0), abs=1e-12)
    assert line.loss(10**7) == pytest.approx(5 * 1e7**-0.1)
    assert (line.sizes, line.runs) == (SIZES, 6)


def test_scaling_exponent_error_matches_least_squares():
    runs = study(noise=(0.01, -0.03))
    (line,) = scaling_lines(results(runs))
    x, y = (np.log([getattr(run, name) for run in runs]) for name in ("parameters", "validation_loss"))
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert line.exponent == pytest.approx(-slope)
    assert line.error == pytest.approx(covariance[0, 0] ** 0.5)
    assert line.error > 1e-3


def test_no_scaling_line_without_enough_comparable_sizes():
    assert not list(scaling_lines(results(study()[:4])))  # two sizes
    assert not list(scaling_lines(results([run(f"a{i}", 2.0) for i in range(3)])))  # sizes not known
    lengths = [sized("a", size, 2.0, variant={"d": size, "length": n}) for size in SIZES for n in (8, 16)]
    assert not list(scaling_lines(results(lengths)))
    assert not list(scaling_lines(results([sized("a", size, 2.0, accuracy=0.5) for size in SIZES])))


def test_scaling_line_ignores_tuning_and_failed_runs():
    others = [sized("a", size, 9.0, rate=1.0, tunes=True) for size in SIZES] + [sized("a", 10**6, None)]
    (line,) = scaling_lines(results([*study(), *others]))
    assert (line.exponent, line.runs) == (pytest.approx(0.1), 6)


def test_scaling_line_is_drawn_and_described():
    found = results([*study(noise=(0.01, 0.0)), *(sized("b", size, 3.0) for size in SIZES[:2])])
    assert "a: the loss falls as parameters^-0.0" in markdown(found)
    assert "b: the loss" not in markdown(found)
    (figure,) = [figure for figure in Plots(found).outcomes() if figure.name == "loss-by-parameters"]
    fitted, measured = figure.series
    assert fitted.faint
    assert not measured.faint
    assert [point.x for point in fitted.points] == [SIZES[0], SIZES[-1]]
    assert [point.x for point in measured.points] == list(SIZES)
    assert "parameters^-0.0" in figure.caption
    assert any("low" in row for row in figure.rows())
    assert not any(row.get("dodge") for row in figure.rows())  # bars stay beside their points
