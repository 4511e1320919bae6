"""The report of a study: one page that answers its question, shows how, and says how to do it again."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from . import page
from .chart import Chart, number, quantity
from .differences import compared, shown
from .files import write_file
from .markup import element
from .plots import Plots, said
from .results import Machine, Results, RunResult, Statistic, SummaryRow
from .study import shipped
from .tables import Columns, filled, state_size

REPORT_FILE = "report.html"


def write_report(results: Results, folder: Path) -> Path:
    """Write the report of a study to `folder`/report.html: one file that needs no other, and no network.

    Raises:
        SeqmixError: the file cannot be written.
    """
    return write_file(render(results), folder / REPORT_FILE)


def render(results: Results) -> str:
    """The report as HTML."""
    plots = Plots(results)
    return page.page(
        f"{results.name}: a study",
        _head(results, plots),
        _outcome(results, plots),
        _figures("How they learnt", plots.curves()),
        _figures("What speed and memory they take", plots.speed(), _skipped(results)),
        _paper(results, plots),
        _fairness(results, plots),
        _failures(results),
        _details(results),
    )


def _head(results: Results, plots: Plots) -> Element:
    facts = [
        *([results.name] if results.question else []),
        f"{_count(len(results.entries), 'entry', 'entries')}, {_count(len(results.runs), 'run')}",
        results.created[:10],
        _machine(results.machine),
        *_versions(results.machine),
    ]
    missing = sum(run.status != "finished" for run in results.runs)
    note = f"{_count(missing, 'run')} of {len(results.runs)} did not finish; reasons are under Failures."
    return element(
        "header",
        element("h1", results.question or results.name),
        page.paragraph(" · ".join(facts), "quiet"),
        page.paragraph(_answer(plots), "lead"),
        page.paragraph(note, "note") if missing else None,
    )


def _answer(plots: Plots) -> str:
    """What came out, in a few sentences; where something was varied, at its first and its last value."""
    if not any(plots.score(row) for row in plots.results.summary):
        return "No run has finished, so there is nothing to compare."
    if len(plots.variants) <= 1:
        return _sentence(plots, plots.ranked())
    return " ".join(
        f"At {said(end)}: {_sentence(plots, [row for row in plots.ranked() if row.variant == end])}"
        for end in (plots.variants[0], plots.variants[-1])
    )


def _sentence(plots: Plots, ranked: Sequence[SummaryRow]) -> str:
    """Who is best, who is next, and whether the difference can be chance."""
    scored = [(row, score) for row in ranked if (score := plots.score(row)) is not None]
    if not scored:
        return "no run has finished."
    (best, a), *others = scored
    what = "an accuracy" if plots.has_accuracy else "a validation loss"
    text = f"{best.entry} reaches {what} of {measured(a, share=plots.has_accuracy)}"
    if not others:
        return f"{text}."
    second, b = others[0]
    text = f"{text}, {second.entry} comes next with {measured(b, share=plots.has_accuracy)}."
    if min(best.seeds, second.seeds) < 2:
        return f"{text} With one seed, how much of this is chance is not known."
    if abs(a.mean - b.mean) <= (a.spread or 0) + (b.spread or 0):
        return f"{text} The difference is within the spread of the seeds."
    return text


def _outcome(results: Results, plots: Plots) -> Element | None:
    if not results.summary:
        return None
    columns: Columns[SummaryRow] = [
        ("entry", lambda row: page.name(row.entry, plots.styles[row.entry])),
        ("variant", lambda row: said(row.variant)),
        ("accuracy", lambda row: measured(row.accuracy, share=True)),
        ("validation loss", lambda row: measured(row.validation_loss)),
        ("seeds", lambda row: f"{row.seeds}"),
        ("learning rate", lambda row: number(row.learning_rate) + (f", {row.at_edge} tried" if row.at_edge else "")),
        ("parameters", lambda row: f"{results.entry_of(row).parameters:,}"),
        ("FLOPs/token", lambda row: number(results.entry_of(row).flops_per_token)),
        ("state", lambda row: state_size(results.entry_of(row))),
        ("tokens/s", lambda row: _number(row.tokens_per_second)),
    ]
    spread = " ± is the standard deviation over seeds." if any(row.seeds > 1 for row in results.summary) else ""
    rates = len({run.learning_rate for run in results.runs}) > 1
    note = f"Best first.{spread}{' Of each entry, the learning rate that did best.' if rates else ''}"
    charts = plots.outcomes()
    return page.section(
        "What came out",
        page.table(*filled(plots.ranked(), columns), "Results of all entries, best first", best=True),
        page.paragraph(f"{note} Loss in nats per token; state is that of one sequence.", "quiet"),
        element("div", page.legend(charts), page.figures(charts), class_="block") if charts else None,
    )


def _figures(heading: str, charts: list[Chart], *more: Element | None) -> Element | None:
    return page.section(heading, page.legend(charts), page.figures(charts), *more) if charts else None


def _skipped(results: Results) -> Element | None:
    """What was not timed, and why."""
    speed = results.speed
    rows = [(row.entry, f"training at {row.length:,}", row.skipped) for row in speed.train if row.skipped]
    rows += [(row.entry, f"decoding after {row.context:,}", row.skipped) for row in speed.decode if row.skipped]
    return page.table(["entry", "what", "why not"], rows, "What was not timed", words=("why not",)) if rows else None


def _paper(results: Results, plots: Plots) -> Element | None:
    if not results.paper:
        return None
    rows = [
        (row.label, page.name(row.entry, plots.styles[row.entry]), f"{row.theirs:g}", _like(row.ours, row.theirs))
        for row in results.paper
    ]
    heads = ["figure", "entry", "paper", "here"]
    table = page.table(heads, rows, "The paper's figures beside ours", words=("figure", "entry"))
    note = (
        "The paper's models and data are larger than those here: what can be compared is the order, and which way "
        "differences go, not the values."
    )
    return page.section("Beside the paper", table, page.paragraph(note, "quiet"))


def _fairness(results: Results, plots: Plots) -> Element:
    same, different = compared({entry.name: entry.config for entry in results.entries})
    matched = [
        (page.name(entry.name, plots.styles[entry.name]), entry.matched) for entry in results.entries if entry.matched
    ]
    parts: list[Element] = [element("ul", [element("li", text) for text in results.fairness])]
    if matched:
        parts.append(page.table(["entry", "made equal"], matched, "What was made equal", words=("made equal",)))
    facts = page.facts(
        seeds=", ".join(map(str, sorted({run.seed for run in results.runs}))),
        learning_rates=", ".join(map(number, sorted({run.learning_rate for run in results.runs}))),
        machine=_machine(results.machine),
    )
    parts.append(facts)
    names = [entry.name for entry in results.entries]
    if different and len(names) > 1:
        rows = [(field, *(shown(values.get(name, "")) for name in names)) for field, values in different.items()]
        table = page.table(["field", *names], rows, "Fields that differ")
        parts.append(page.folded("What differs between the models", table))
    if same and len(names) > 1:
        code = page.code("\n".join(f"{field}: {shown(value)}" for field, value in same.items()))
        parts.append(page.folded("What is the same in all models", code))
    return page.section("What was held equal", *parts)


def _failures(results: Results) -> Element | None:
    failed = [run for run in results.runs if run.status != "finished"]
    if not failed:
        return None
    again = "it has not ended: run the same command again to go on"
    rows = [(run.name, run.status, run.error or again) for run in failed]
    table = page.table(["run", "status", "reason"], rows, "Runs that failed", words=("reason", "status"))
    return page.section("Failures", table)


def _details(results: Results) -> Element:
    columns: Columns[RunResult] = [
        ("run", lambda run: run.name),
        ("status", lambda run: run.status),
        ("seed", lambda run: str(run.seed)),
        ("learning rate", lambda run: number(run.learning_rate)),
        ("accuracy", lambda run: "" if run.accuracy is None else f"{run.accuracy:.1%}"),
        ("validation loss", lambda run: "" if run.validation_loss is None else f"{run.validation_loss:.4f}"),
        ("tokens/s", lambda run: _number(run.tokens_per_second)),
        ("peak memory", lambda run: quantity(run.peak_memory_bytes, "bytes")),
        ("time", lambda run: quantity(run.seconds, "seconds")),
    ]
    machine = results.machine
    facts = page.facts(
        created=results.created,
        machine=_machine(machine),
        versions=", ".join(_versions(machine)),
        commit=machine.commit,
    )
    return page.section(
        "To do it again",
        page.paragraph("All figures are in results.json beside this page; every run's folder has its configuration."),
        page.code(f"seqmix compare {results.name if results.name in shipped() else f'{results.name}.yaml'}"),
        facts,
        page.folded("All runs", page.table(*filled(results.runs, columns), "All runs")),
        *(page.folded(f"Configuration of {entry.name}", page.code(entry.config.rstrip())) for entry in results.entries),
    )


# ---- numbers in words


def measured(value: Statistic | None, *, share: bool = False) -> str:
    """A mean and its spread, in as many digits as one can use."""
    if value is None:
        return ""
    scale, unit, digits = (100, " %", 1) if share else (1, "", 3 if abs(value.mean) < 10 else 2)
    spread = "" if value.spread is None else f" ± {value.spread * scale:.{digits}f}"
    # a line never breaks within a figure
    return f"{value.mean * scale:.{digits}f}{spread}{unit}".replace(" ", "\N{NO-BREAK SPACE}")


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _like(value: float | None, other: float) -> str:
    """A figure in as many decimals as another one, at least two."""
    return "" if value is None else f"{value:.{max(2, len(f'{other:g}'.partition('.')[2]))}f}"


def _machine(machine: Machine) -> str:
    parts = [machine.processor, machine.device, _count(machine.threads, "thread") if machine.threads else None]
    return ", ".join(part for part in parts if part)


def _versions(machine: Machine) -> list[str]:
    return [f"{name} {version}" for name in ("seqmix", "torch") if (version := getattr(machine, name))]


def _count(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one if number == 1 else more or one + 's'}"
