"""What a report says: its answer, its order, what failed, and nothing that a name could break."""

import json
import re
from typing import Any

import pytest
from studies import STUDIES, few, recall, text, varied

from seqmix.experiments.report import REPORT_FILE, measured, render, write_report
from seqmix.experiments.results import Results, Statistic
from seqmix.registry import SeqmixError


def rendered(study: dict[str, Any]) -> str:
    return render(Results.model_validate(json.loads(json.dumps(study))))


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def lead(page: str) -> str:
    return re.sub("\N{NO-BREAK SPACE}", " ", re.findall(r'class="lead">(.*?)<', page)[0])


def titles(page: str) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", page)


@pytest.mark.parametrize("study", STUDIES)
def test_a_report_is_one_file_without_script(study):
    page = rendered(STUDIES[study]())
    assert not re.search(r"<script|<iframe|<img|@import|url\(|\bsrc=", page)
    assert re.findall(r'href="(.*?)"', page) == ["data:,"]
    assert not re.search(r"https?://", page)
    assert len(page) < 150_000
    assert page.count("<h1>") == 1
    assert page.count('role="img"') == page.count("<figcaption>") == len(titles(page)) > 0


def test_the_answer_names_who_is_best():
    page = rendered(recall())
    assert "<h1>Which mixer recalls the most pairs of key and value?</h1>" in page
    assert lead(page) == "attention reaches an accuracy of 92.9 ± 0.5 %, gated DeltaNet comes next with 90.5 ± 1.0 %."
    order = re.findall(r'scope="row">.*?<span>(.*?)</span>', page)[:5]
    assert order == ["attention", "gated DeltaNet", "Mamba-2", "retention", "linear attention"]


def test_text_is_compared_by_its_loss():
    page = rendered(text())
    assert lead(page).startswith("retention reaches a validation loss of 1.6")
    assert re.findall(r'scope="row">.*?<span>(.*?)</span>', page)[:3] == ["retention", "attention", "Mamba-2"]


def test_a_difference_within_the_spread_is_called_one():
    study = recall()
    for row in study["summary"]:
        row["accuracy"] = {"mean": 0.9 if row["entry"] == "attention" else 0.88, "spread": 0.02}
    assert lead(rendered(study)).endswith("The difference is within the spread of the seeds.")


def test_one_seed_is_no_evidence():
    study = text()
    for row in study["summary"]:
        row["seeds"], row["validation_loss"]["spread"] = 1, None
    assert lead(rendered(study)).endswith("With one seed, how much of this is chance is not known.")


def test_variants_are_compared_each_for_itself():
    page = rendered(varied())
    assert re.match(r"At pairs 8: attention reaches .* At pairs 64: attention reaches", lead(page))
    assert "Accuracy over pairs" in titles(page)
    assert [title for title in titles(page) if title.startswith("Loss over tokens")] == [
        f"Loss over tokens: pairs {pairs}" for pairs in (8, 16, 32, 64)
    ]


def test_only_what_there_are_data_for_is_drawn():
    assert titles(rendered(recall())) == [
        "Accuracy by pairs", "Accuracy and state", "Accuracy over learning rate", "Loss over tokens",
        "Loss over computation", "Loss over time", "Accuracy over tokens",
    ]  # fmt: skip
    assert titles(rendered(text())) == [
        "Loss over length", "Validation loss and state", "Loss over tokens", "Loss over computation", "Loss over time",
        "Training speed", "Memory of training", "Time of one token", "Memory of decoding", "State of one sequence",
    ]  # fmt: skip
    assert headings(rendered(text())) == [
        "What came out", "How they learnt", "What speed and memory they take", "Beside the paper",
        "What was held equal", "To do it again",
    ]  # fmt: skip


def test_a_band_is_that_of_the_seeds():
    page = rendered(recall())
    curves = page[page.index("How they learnt") : page.index("What was held equal")]
    assert curves.count('class="band"') == 4 * 5
    one = recall()
    one["runs"] = [run for run in one["runs"] if run["seed"] == 0]
    page = rendered(one)
    assert 'class="band"' not in page[page.index("How they learnt") : page.index("What was held equal")]


def test_curves_are_those_of_the_best_learning_rate():
    study = recall()
    for run in study["runs"]:
        if run["learning_rate"] == 3e-4:
            run["evaluations"] = [point | {"validation_loss": 777.0} for point in run["evaluations"]]
    assert "777" not in rendered(study)


def test_runs_that_are_evaluated_once_have_curves_of_training():
    study = text()
    for run in study["runs"]:
        run["evaluations"] = run["evaluations"][-1:]
    page = rendered(study)
    assert "training loss (nats per token)" in page
    assert "Loss over tokens" in titles(page)


def test_failures_stand_there_with_their_reasons():
    page = rendered(few())
    assert "2 runs of 3 did not finish" in page
    assert headings(page)[2:4] == ["What was held equal", "Failures"]
    assert "the loss is not finite at step 31" in page
    assert "Failures" not in headings(rendered(recall()))


def test_a_study_in_which_nothing_finished_has_a_report():
    study = few()
    study["runs"] = [run | {"status": "failed", "error": "no memory"} for run in study["runs"]]
    study["summary"] = []
    page = rendered(study)
    assert lead(page) == "No run has finished, so there is nothing to compare."
    assert titles(page) == []


def test_what_was_equal_is_shown_with_what_was_not():
    page = rendered(text())
    assert "Of one seed, every entry reads the same batches in the same order." in page
    assert "parameters 1,234,311 by blocks.main.ffn.expansion = 2.1" in page
    fields = page[page.index("What differs between the models") :]
    assert re.findall(r'scope="row">([\w.]+)</th>', fields)[:2] == [
        "blocks.main.mixer.kind",
        "blocks.main.ffn.expansion",
    ]
    assert "n_layers: 4\n" in page[page.index("What is the same in all models") :]


def test_a_paper_s_figures_have_their_decimals():
    page = rendered(text())
    assert '<td data-head="paper">26.05</td><td data-head="here">4.95</td>' in page


def test_what_was_not_timed_is_said():
    study = text()
    study["speed"]["train"].append({"entry": "attention", "length": 65536, "skipped": "it takes 3 minutes a step"})
    page = rendered(study)
    assert "training at 65,536" in page
    assert "it takes 3 minutes a step" in page


def test_the_edge_of_the_learning_rates_is_said():
    study = recall()
    study["summary"][0]["at_edge"] = "highest"
    assert "0.001, highest tried" in rendered(study)


def test_names_are_text_whatever_they_are():
    name = "<script>alert('x')</script> & \"co\""
    source = json.dumps(few()).replace("Mamba-2", json.dumps(name)[1:-1]).replace("retention", "</svg><b>r")
    study = json.loads(source)
    study["question"] = "Is <i>this</i> & that text?"
    study["runs"][1]["error"] = "</table><h2>broken"
    page = rendered(study)
    assert "<script" not in page
    assert "<b>" not in page
    assert "Is &lt;i&gt;this&lt;/i&gt; &amp; that text?" in page
    assert "broken" not in headings(page)


def test_the_file_is_replaced_whole(tmp_path):
    results = Results.model_validate(few())
    (tmp_path / REPORT_FILE).write_text("old")
    assert write_report(results, tmp_path) == tmp_path / REPORT_FILE
    assert (tmp_path / REPORT_FILE).read_text() == render(results)
    assert [file.name for file in tmp_path.iterdir()] == [REPORT_FILE]


def test_a_file_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SeqmixError, match=r"report\.html cannot be written: .*file is no folder"):
        write_report(Results.model_validate(few()), tmp_path / "file")


@pytest.mark.parametrize(
    ("value", "share", "said"),
    [
        (None, False, ""),
        (Statistic(mean=1.23456, spread=0.0123), False, "1.235 ± 0.012"),
        (Statistic(mean=12.3456, spread=0.5), False, "12.35 ± 0.50"),
        (Statistic(mean=0.93123, spread=0.02), True, "93.1 ± 2.0 %"),
        (Statistic(mean=0.93123, spread=None), True, "93.1 %"),
        (Statistic(mean=0.5, spread=0.0), True, "50.0 ± 0.0 %"),
    ],
)
def test_a_mean_is_said_with_its_spread(value, share, said):
    assert measured(value, share=share).replace("\N{NO-BREAK SPACE}", " ") == said
