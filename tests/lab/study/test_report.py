"""Report contents: the answer, order, failures, numbers from results.json, and escaped names."""

import json
import re
from functools import cache
from html import unescape
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from study_results import STUDIES, few, recall, text, varied

from seqmix.lab.study.comparisons import comparisons
from seqmix.lab.study.conclusion import conclusion, format_statistic
from seqmix.lab.study.report import REPORT_FILE, render, write_report
from seqmix.lab.study.results import Results, RunResult, Statistic
from seqmix.lab.study.results_file import read_results, write
from seqmix.lab.study.study_figures import Plots
from seqmix.lab.study.summary import best_first, summarise
from seqmix.lab.study.tables import markdown
from seqmix.registry import SeqmixError

pytest.importorskip("altair")


def results(study: dict[str, Any]) -> Results:
    return Results.model_validate(json.loads(json.dumps(study)))


def plots(study: dict[str, Any]) -> Plots:
    return Plots(results(study))


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row.model_dump(mode="json") for row in summarise([RunResult(**run) for run in runs])]


def said(study: dict[str, Any]) -> str:
    return conclusion(results(study)).replace("\N{NO-BREAK SPACE}", " ")


@cache
def page(study: str) -> str:
    return render(results(STUDIES[study]()))


def specs(page: str) -> dict[str, Any]:
    return json.loads(re.findall(r'<script type="application/json" id="specs">(.*?)</script>', page, re.S)[0])


def body(page: str) -> str:
    return page[page.index("<main>") : page.index("<script")]


def table(page: str, label: str) -> list[list[str]]:
    """The text of a table's cells, without drawings."""
    found = re.findall(rf'aria-label="{label}.*?</table>', page, re.S)[0]
    plain = re.sub(r"<span.*?</span>", "", found)
    rows = re.findall(r"<tr>(.*?)</tr>", plain, re.S)
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", body(page))


@pytest.mark.parametrize("study", STUDIES)
def test_report_is_a_self_contained_file(study):
    shown = body(page(study))
    assert not re.search(r"<iframe|<img|@import|url\(|\bsrc=|https?://", shown)
    assert re.findall(r'href="(.*?)"', page(study).partition("<body>")[0]) == ["data:,"]
    assert page(study).count("</script>") == 3
    assert shown.count("<h1>") == 1
    assert set(re.findall(r'data-figure="(.*?)"', shown)) == set(specs(page(study)))


def test_answer_describes_the_subject():
    assert "<h1>Which mixer recalls the most pairs of key and value?</h1>" in page("recall")
    assert said(recall()) == (
        "retention reaches an accuracy of 81.7 ± 1.1 % (mean and 95 % interval of 3 seeds). Against it, attention is "
        "better by 11.2 points (9.1 to 13.3); gated DeltaNet is better by 8.8 points (6.7 to 10.9); Mamba-2 is better "
        "by 5.4 points (3.3 to 7.4); linear attention is worse by 25.6 points (23.6 to 27.7)."
    )
    assert said(recall() | {"subject": "Mamba-2"}).startswith("Mamba-2 reaches")
    order = [row[0] for row in table(page("recall"), "Results of all entries")[1:]]
    assert order == ["attention", "gated DeltaNet", "Mamba-2", "retention", "linear attention"]
    assert said(text()).startswith("retention reaches a validation loss of 1.6")
    assert [row[0] for row in table(page("text"), "Results of all")[1:]] == ["retention", "attention", "Mamba-2"]


def test_answer_names_differences_that_may_be_chance():
    study = recall()
    noise = {0: -0.03, 1: 0.01, 2: 0.02}
    for run in study["runs"]:
        if run["entry"] == "Mamba-2":
            run["accuracy"] = 0.76 + noise[run["seed"] % 3]
    assert "; Mamba-2 is not separated: \N{MINUS SIGN}5.7 points (\N{MINUS SIGN}16.5 to +5.2); linear" in said(study)
    study["runs"] = [run for run in study["runs"] if run["tunes"] or run["seed"] == study["runs"][-1]["seed"]]
    for row in study["summary"]:
        row["seeds"], row["accuracy"]["margin"] = 1, None
    assert said(study).endswith(
        "the best of the others is attention with 92.9 %. With only one seed there is no interval, so differences may "
        "be chance."
    )


def test_comparisons_match_numbers_and_verdicts_of_the_answer():
    study = recall()
    noise = {0: -0.03, 1: 0.01, 2: 0.02}
    for run in study["runs"]:
        if run["entry"] == "Mamba-2":
            run["accuracy"] = 0.76 + noise[run["seed"] % 3]
    found = results(study)
    compared = {each.entry: each for each in comparisons(found)}
    assert {entry: each.verdict for entry, each in compared.items()} == {
        "attention": "better", "gated DeltaNet": "better", "linear attention": "worse",
        "Mamba-2": "not separated",
    }  # fmt: skip
    assert {each.measure for each in compared.values()} == {"accuracy"}
    assert all(f"{entry} is {each.words}" in said(study) for entry, each in compared.items())
    rows = {row.entry: found.runs_of(row) for row in found.summary}
    means = {entry: fmean(run.accuracy for run in runs) for entry, runs in rows.items()}
    near = compared["Mamba-2"]
    assert near.difference == pytest.approx(means["Mamba-2"] - means["retention"])
    assert near.low < 0 < near.high


def test_lower_loss_wins_and_each_variant_is_compared_separately():
    losses = comparisons(results(text()))
    assert [(each.entry, each.measure, each.verdict) for each in losses] == [
        ("attention", "validation_loss", "worse"), ("Mamba-2", "validation_loss", "worse"),
    ]  # fmt: skip
    assert all(0 < each.low < each.difference < each.high for each in losses)
    assert [each.variant for each in comparisons(results(varied()))] == [{"data.pairs": n} for n in (8, 16, 32, 64)]


def test_comparison_with_one_seed_has_no_verdict():
    study = text()
    study["runs"] = [run for run in study["runs"] if run["seed"] == 0]
    for each in comparisons(results(study)):
        assert (each.low, each.high, each.verdict) == (None, None, None)
        assert each.words.startswith("one seed, so no interval: +")
    assert comparisons(results(study | {"summary": []})) == []


def difference(entry: str, also: dict[str, str], compared: str = "the mixer") -> dict[str, Any]:
    return {"entry": entry, "compared": [compared], "also": list(also), "values": also}


def test_other_differences_are_shown_with_the_answer():
    study = text()
    same = {"differences": [difference("attention", {}), difference("Mamba-2", {})]}
    assert " The entries differ only in the mixer. " in said(study | same)
    one = {"differences": [difference("attention", {}), difference("Mamba-2", {"short_conv": "4"})]}
    assert (
        " Mamba-2 differs from retention also in short_conv, so what separates them cannot be attributed to the mixer "
        "alone. Only attention is equal to retention in everything else."
    ) in said(study | one)
    one["differences"] += [{"entry": "retention", "values": {"short_conv": "none"}}]
    made = render(results(study | one))
    assert table(made, "What else differs") == [["entry", "short_conv"], ["retention", "none"], ["attention", ""],
                                                ["Mamba-2", "4"]]  # fmt: skip
    header = made[made.index("<header>") : made.index("</header>")]
    assert "What else differs" in header
    assert "<details" not in header
    two = {"differences": [difference("attention", {"gate": "none"}), difference("Mamba-2", {"short_conv": "4"})]}
    assert "The entries differ from retention also in some of gate and short_conv, so what" in said(study | two)


def test_accessories_are_listed_before_mixer_options():
    also = {"mixer.norm_eps": "1", "gate": "none"}
    two = [difference("attention", {"mixer.norm_affine": "true"}), difference("Mamba-2", also)]
    study = text() | {"differences": two}
    assert "in some of gate, mixer.norm_affine and mixer.norm_eps, so" in said(study)
    assert table(render(results(study)), "What else differs")[0] == [
        "entry", "gate", "mixer.norm_affine", "mixer.norm_eps",
    ]  # fmt: skip


def test_answer_says_when_learning_rates_were_not_tuned():
    untuned = "The learning rate was not tuned for each entry, so another one may change the order."
    assert said(text()).endswith(untuned)
    assert said(varied()).count(untuned) == 1
    assert untuned not in said(recall())
    assert untuned not in said(few())  # one entry has no order
    rates = [difference(entry, {}, "training.learning_rate") for entry in ("attention", "Mamba-2")]
    assert untuned not in said(text() | {"differences": rates})


def test_answer_reports_progress_when_only_tuning_runs_finished():
    study = recall()
    study |= {"runs": [run for run in study["runs"] if run["tunes"]], "summary": []}
    assert said(study) == (
        "Only runs that choose the learning rates have finished (10 of 10), so there is nothing to compare yet."
    )
    names = [figure.name for figure in plots(study).all()]
    assert names == ["loss-by-learning-rate"]


def test_each_variant_has_its_own_answer_and_loss_figure():
    told = said(varied())
    assert re.findall(r"At pairs (\d+): attention reaches", told) == ["8", "16", "32", "64"]
    names = [figure.name for figure in plots(varied()).all()]
    assert "accuracy-over-pairs" in names
    assert [name for name in names if re.match(r"loss-\d", name)] == ["loss-1", "loss-2", "loss-3", "loss-4"]


def captions(study: dict[str, Any]) -> dict[str, str]:
    return {figure.name: figure.caption for figure in plots(study).all()}


def test_captions_describe_their_figures():
    one, several = captions(recall()), captions(varied())
    assert "by pairs; larger values are to the right." in one["accuracy-by-pairs"]
    assert "Bars are 95 % intervals of means over seeds, cut at 0 and 100 %." in one["accuracy-by-state"]
    assert captions(text())["loss-by-length"] == (
        "Validation loss at each sequence length. Beyond the training length, a flat or falling line is a model that "
        "extrapolates. Bars are 95 % intervals of means over seeds."
    )
    best = "Of each entry, only the variant with its best accuracy is drawn"
    assert f"{best}: pairs 8 (all)." in several["accuracy-by-pairs"]
    assert f"{best}: pairs 8 (all)." in several["accuracy-by-state"]
    assert best not in several["accuracy-over-pairs"]
    assert not any(best in caption for caption in one.values())
    study = varied()
    for row in study["summary"]:
        if row["entry"] == "retention":
            row["accuracy"]["mean"] = 0.01 * row["variant"]["data.pairs"]
    assert f"{best}: pairs 8 (attention), pairs 64 (retention)." in captions(study)["accuracy-by-pairs"]


def test_captions_say_what_each_point_averages():
    one = captions(recall())
    assert one["accuracy-by-pairs"].startswith("Share of answer tokens predicted correctly")
    assert one["loss"].startswith(
        "Validation loss during training, each entry at its tuned learning rate; the mean over seeds, in a band"
    )
    assert "tuned" not in captions(text())["loss"]
    assert "of the runs that chose the learning rates, with one seed." in one["loss-by-learning-rate"]
    study = recall()
    study["runs"] += [run | {"seed": 4} for run in study["runs"] if run["tunes"]]
    assert "the learning rates, means over 2 seeds." in captions(study)["loss-by-learning-rate"]
    study = text()
    for run in study["runs"]:
        run["evaluations"] = run["evaluations"][-1:]
    assert captions(study)["loss"].startswith("Loss of training batches; the mean over seeds")


def test_caption_names_entries_without_the_varied_option():
    study = recall()
    runs = [run | {"variant": {"equal.short_conv": width}} for run in study["runs"] for width in (None, 4)]
    lacks = difference("attention", {"short_conv": "no option"}) | {"variant": {"equal.short_conv": 4}}
    study |= {"runs": runs, "summary": summary(runs), "differences": [lacks]}
    assert (
        "attention has no option short_conv: its models are the same at all values."
        in captions(study)["accuracy-over-short-conv"]
    )


def test_learning_rate_figure_shows_tuning_losses():
    study = recall()
    (figure,) = (figure for figure in plots(study).all() if figure.name == "loss-by-learning-rate")
    tuning = {(run["entry"], run["learning_rate"]): run["validation_loss"] for run in study["runs"] if run["tunes"]}
    assert {(each.name, point.x): point.y for each in figure.series for point in each.points} == tuning


def test_every_variant_has_a_learning_rate_figure():
    study = recall()
    runs = [run | {"variant": {"equal.short_conv": width}} for run in study["runs"] for width in (None, 4)]
    study |= {"runs": runs, "summary": summary(runs)}
    titles = [figure.title for figure in plots(study).all() if "learning-rate" in figure.name]
    assert titles == [f"Validation loss by learning rate: short conv {value}" for value in ("null", "4")]


def test_task_losses_are_labelled_per_answer_token():
    def labels(study):
        return {figure.y.label for figure in plots(study).all() if "loss" in figure.y.label}

    assert labels(recall()) == {"validation loss (nats per answer token)"}  # and accuracies, which are compared
    assert "Losses are in nats per answer token" in page("recall")
    loss = "validation loss (nats per token)"
    assert labels(text()) == {loss, f"{loss} minus that of retention"}
    assert "Losses are in nats per token" in page("text")


def test_flops_are_labelled_as_matmul_flops():
    assert "forward matmul FLOPs/token" in table(page("text"), "Results of all")[0]
    (figure,) = (figure for figure in plots(text()).all() if figure.name == "loss-flops")
    assert figure.x.label == "training matmul FLOPs"
    assert "three times those of the forward passes" in figure.caption


def test_only_figures_with_data_are_drawn():
    assert [figure.name for figure in plots(recall()).all()] == [
        "differences", "accuracy-by-pairs", "accuracy-by-state", "loss-by-learning-rate", "loss", "loss-flops",
        "accuracy",
    ]  # fmt: skip
    assert [figure.name for figure in plots(text()).all()] == [
        "differences", "loss-by-length", "loss-by-state", "loss", "loss-flops", "train-speed", "train-memory",
        "decode-time", "decode-memory", "decode-state",
    ]  # fmt: skip
    assert headings(page("text")) == [
        "Results", "Training", "Speed and memory", "Comparison with the paper", "What was held equal",
        "Reproduce",
    ]  # fmt: skip


def test_loss_over_time_is_drawn_only_for_runs_made_alone():
    study = recall()
    for run in study["runs"]:
        run["alone"] = True
    assert "loss-time" in [figure.name for figure in plots(study).curves()]
    study["runs"][-1]["alone"] = False
    assert "loss-time" not in [figure.name for figure in plots(study).curves()]


def test_training_length_is_marked_on_the_length_axis():
    study = text()
    for run in study["runs"]:
        run["sequence_length"] = 512
    marked = {figure.name: figure.marks for figure in plots(study).all() if figure.marks}
    assert marked == {name: {512.0: "trained"} for name in ("loss-by-length", "train-speed", "train-memory")}


def test_page_shows_the_numbers_of_results_json(tmp_path):
    study = text()
    for row in study["speed"]["train"]:
        row["tokens_per_second_range"] = [0.9 * row["tokens_per_second"], 1.1 * row["tokens_per_second"]]
    study["speed"] |= {"repeat": 5, "threads": 1, "tokens": 2048}
    write(results(study), tmp_path)
    found = read_results(tmp_path)
    made = write_report(found, tmp_path).read_text()
    data = {name: one["spec"]["datasets"][name] for name, one in specs(made).items()}
    rows = {name: {(row["series"], row["x"]): row for row in found} for name, found in data.items()}
    for row in found.summary:
        for length, loss in row.validation_loss_by_length.items():
            drawn = rows["loss-by-length"][row.entry, float(length)]
            assert (drawn["y"], drawn["high"] - drawn["y"]) == pytest.approx((loss.mean, loss.margin))
        runs = [run for run in found.runs if run.entry == row.entry]
        for points in zip(*(run.evaluations for run in runs), strict=True):
            drawn = rows["loss"][row.entry, points[0].tokens]
            losses = [point.validation_loss for point in points]
            assert (drawn["y"], drawn["low"], drawn["high"]) == pytest.approx((fmean(losses), min(losses), max(losses)))
    for row in found.speed.train:
        drawn = rows["train-speed"][row.entry, row.length]
        assert (drawn["y"], drawn["low"], drawn["high"]) == pytest.approx(
            (row.tokens_per_second, *row.tokens_per_second_range)
        )
    for row in found.speed.decode:
        assert rows["decode-time"][row.entry, row.context]["y"] == pytest.approx(1e3 * row.seconds)
        assert rows["decode-state"][row.entry, row.context]["y"] == pytest.approx(row.state_bytes / 2**10)
    head, *cells = table(made, "Results of all entries")
    for row, line in zip(best_first(found), cells, strict=True):
        shown = dict(zip(head, line, strict=True))
        assert shown["entry"] == row.entry
        assert shown["validation loss"] == format_statistic(row.validation_loss)
        # one speed, that of the plot, with its spread and how it was measured
        timed = next(one for one in found.speed.train if (one.entry, one.length) == (row.entry, 16384))
        low, high = timed.tokens_per_second_range
        shown = [float(number.replace(",", "").replace("k", "e3")) for number in re.findall(r"[\d.,]+\dk?", line[-1])]
        assert shown == pytest.approx([timed.tokens_per_second, low, high], rel=5e-3)
    assert re.search(r"tokens/s: .*16,384 tokens.*2,048 tokens.*1 thread.*5 interleaved", made)


def test_table_names_source_of_untimed_speed():
    assert re.search("tokens/s: .*own logged steps.*may have shared", page("recall"))


def test_bands_span_seeds_and_need_more_than_one():
    one = recall()
    bands = [row for figure in plots(one).curves() for row in figure.rows() if "low" in row]
    assert all(row["low"] <= row["y"] + 1e-9 and row["y"] <= row["high"] + 1e-9 for row in bands)
    assert len({row["series"] for row in bands}) == 5
    one["runs"] = [run for run in one["runs"] if run["seed"] == 0]
    assert not [row for figure in plots(one).curves() for row in figure.rows() if "low" in row]


def test_curves_use_runs_at_the_best_learning_rate():
    study = recall()
    for run in study["runs"]:
        if run["learning_rate"] == 3e-4:
            run["evaluations"] = [point | {"validation_loss": 777.0} for point in run["evaluations"]]
    assert max(row["y"] for figure in plots(study).curves() for row in figure.rows() if "loss" in figure.name) < 777


def test_runs_evaluated_once_show_training_loss_curves():
    study = text()
    for run in study["runs"]:
        run["evaluations"] = run["evaluations"][-1:]
    loss = plots(study).curves()[0]
    assert (loss.name, loss.y.label) == ("loss", "training loss (nats per token)")


def test_failed_runs_are_listed_with_reasons():
    assert "2 of 3 runs have not finished; reasons are under Unfinished runs." in page("few")
    assert headings(page("few"))[2:4] == ["What was held equal", "Unfinished runs"]
    assert "the loss is not finite at step 31" in page("few")
    assert "Unfinished runs" not in headings(page("recall"))
    study = few()
    study["runs"], study["summary"] = study["runs"][1:], []
    nothing = render(results(study))
    assert "No run has finished" in nothing
    assert specs(nothing) == {}


def test_page_shows_equal_and_different_settings():
    assert "With the same seed, all entries see the same batches in the same order." in page("text")
    assert [
        "attention",
        "parameters 1,234,311 by blocks.main.ffn.expansion = 2.1 (wanted 1,234,000; +0.01 %)",
    ] in table(page("text"), "Matched costs")
    fields = [row[0] for row in table(page("text"), "Fields that differ")]
    assert fields == ["field", "blocks.main.mixer.kind", "blocks.main.ffn.expansion"]
    assert "n_layers: 4\n" in page("text").partition("Fields that are equal in all models")[2]
    assert ["In-domain perplexity", "retention", "26.05", "4.95"] in table(page("text"), "The paper")


def test_report_explains_row_order_and_training_time_and_gives_the_date():
    assert "Best first within each variant. " in page("varied")
    assert "Best first. " in page("recall")
    assert "Training time: tokens over the median speed of the run's logged steps, without evaluations." in page("text")
    assert "<dt>results collected</dt>" in page("text")


def test_data_and_training_are_named():
    line = "data: mqar (pairs [4, 8]) · optimizer: adamw"
    assert line in render(results(recall() | {"setup": line})).partition("</header>")[0]


def test_details_of_the_first_variant_are_labelled():
    study = varied()
    study["entries"][0]["matched"] = "parameters 10 by d_model = 2"
    made = render(results(study))
    assert "Matched costs, fields and configurations below are those at pairs 8, the first variant." in made
    for words in ("Fields that differ between the models", "Configuration of attention"):
        assert f"<summary>{words} at pairs 8</summary>" in made
    assert "Configuration of attention</summary>" in page("recall")
    assert "first variant" not in page("recall")
    assert "Matched where data.pairs is 8:" in markdown(results(study))


def test_skipped_timings_and_edge_learning_rates_are_reported():
    study = text()
    study["speed"]["train"].append({"entry": "attention", "length": 65536, "skipped": "it takes 3 minutes a step"})
    study["summary"][0]["at_edge"] = "highest"
    made = render(results(study))
    assert ["attention", "training at 65,536", "it takes 3 minutes a step"] in table(made, "Not timed")
    assert "0.001, highest tried" in [cell for row in table(made, "Results of all") for cell in row]
    assert "retention: the best learning rate, 0.001, is the highest that was tried" in made.partition("</header>")[0]


def test_page_warns_when_precisions_differ():
    study = recall()
    for run in study["runs"]:
        run["precision"] = "bfloat16" if run["entry"] == "Mamba-2" else "float32"
    sentence = "Runs differ in the precision of matrix products (float32 and bfloat16), so do not compare them."
    assert sentence in render(results(study)).partition("</header>")[0]
    assert sentence in markdown(results(study))


def test_html_in_names_is_escaped():
    name = "<script>alert('x')</script> & \"co\""
    source = json.dumps(few()).replace("Mamba-2", json.dumps(name)[1:-1]).replace("retention", "</svg><b>r")
    study = json.loads(source)
    study["question"] = "Is <i>this</i> & that text?"
    study["runs"][1]["error"] = "</table><h2>broken"
    made = render(results(study))
    assert "<b>" not in body(made)
    assert made.count("</script>") == 3
    assert "Is &lt;i&gt;this&lt;/i&gt; &amp; that text?" in made
    assert "broken" not in headings(made)
    assert {row["series"] for row in specs(made)["loss"]["spec"]["datasets"]["loss"]} == {"</svg><b>r"}


def test_existing_report_is_replaced(tmp_path):
    (tmp_path / REPORT_FILE).write_text("old")
    assert write_report(results(few()), tmp_path) == tmp_path / REPORT_FILE
    assert (tmp_path / REPORT_FILE).read_text() == page("few")
    assert [file.name for file in tmp_path.iterdir()] == [REPORT_FILE]
    (tmp_path / "file").write_text("")
    with pytest.raises(SeqmixError, match=re.escape(str(Path("file") / REPORT_FILE))):
        write_report(results(few()), tmp_path / "file")


@pytest.mark.parametrize(
    ("value", "share", "shown"),
    [
        (None, False, ""),
        (Statistic(mean=1.23456, margin=0.0123), False, "1.235 ± 0.012"),
        (Statistic(mean=12.3456, margin=0.5), False, "12.35 ± 0.50"),
        (Statistic(mean=0.93123, margin=0.02), True, "93.1 ± 2.0 %"),
        (Statistic(mean=0.93123, margin=None), True, "93.1 %"),
        (Statistic(mean=0.5, margin=0.0), True, "50.0 ± 0.0 %"),
    ],
)
def test_mean_is_formatted_with_its_margin(value, share, shown):
    assert format_statistic(value, as_percent=share).replace("\N{NO-BREAK SPACE}", " ") == shown
