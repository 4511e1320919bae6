"""The report of a study: one page with the answer to its question, the results, and the way to reproduce them."""

from pathlib import Path

from ...registry import write_file
from ..figures import page
from ..units import number, quantity
from .columns import summary_table
from .conclusion import conclusion, has_accuracy, variant_text
from .config_differences import compare_configs, format_value
from .results import Machine, Results
from .study import shipped
from .study_figures import Plots
from .tables import cautions, difference_tables, speed_note, uncertainty

REPORT_FILE = "report.html"


def write_report(results: Results, folder: Path) -> Path:
    """Write the report of a study to `folder`/report.html: one self-contained file that needs no network.

    Raises:
        SeqmixError: the packages for figures are not installed, or the file cannot be written.
    """
    return write_file(render(results), folder / REPORT_FILE)


def render(results: Results) -> str:
    """Return the report of a study as HTML."""
    plots = Plots(results)
    same, different = compare_configs({entry.name: entry.config for entry in results.entries})
    names = [entry.name for entry in results.entries]
    counts = (
        f"{len(names)} entr{'y' if len(names) == 1 else 'ies'}, {len(results.runs)} run{'s' * (len(results.runs) != 1)}"
    )
    machine = _machine(results.machine)
    differences = plots.differences()
    sections = [
        ("Results", plots.outcomes()),
        ("Training", plots.curves()),
        ("Speed and memory", plots.speed()),
    ]
    return page.render(
        [*differences, *(figure for _, figures in sections for figure in figures)],
        template=Path(__file__).with_name("report.html"),
        title=results.question or results.name,
        results=results,
        entry_styles=plots.styles,
        facts=" · ".join(
            filter(None, [results.name if results.question else "", counts, results.created[:10], *machine])
        ),
        setup=results.setup,
        first_variant=variant_text(results.first_variant),
        answer=conclusion(results),
        forests=differences,
        differences=[
            (variant_text(variant), heads, rows)
            for variant, heads, rows in difference_tables(results.differences, results.about)
        ],
        cautions=list(cautions(results)),
        unfinished=[run for run in results.runs if run.status != "finished"],
        sections=sections,
        summary=summary_table(results, "report"),
        notes=_notes(results),
        skipped=[row for row in (*results.speed.train, *results.speed.decode) if row.skipped],
        paper=[(row.label, row.entry, f"{row.theirs:g}", _format_like(row.ours, row.theirs)) for row in results.paper],
        matched=[(entry.name, entry.matched) for entry in results.entries if entry.matched],
        different=[
            (field, *(format_value(values.get(name, "")) for name in names)) for field, values in different.items()
        ],
        same="\n".join(f"{field}: {format_value(value)}" for field, value in same.items()),
        number=number,
        quantity=quantity,
        again={
            "seeds": ", ".join(map(str, sorted({run.seed for run in results.runs}))),
            "learning rates": ", ".join(map(number, results.learning_rates)),
            "results collected": results.created,
            "machine": ", ".join(filter(None, machine)),
            "commit": results.machine.commit,
        },
        command="seqmix plot STUDY",
        study=results.name if results.name in shipped() else f"{results.name}.yaml",
    )


def _notes(results: Results) -> str:
    """Return the notes below the summary table."""
    several = any(row.variant != results.first_variant for row in results.summary)
    notes = ["Best first within each variant." if several else "Best first.", *uncertainty(results)]
    tokens = "answer token" if has_accuracy(results) else "token"
    notes.append(f"Losses are in nats per {tokens}; the state is that of one sequence.")
    return " ".join(filter(None, [*notes, speed_note(results)]))


# ---- numbers in words


def _format_like(value: float | None, other: float) -> str:
    """Format a number with as many decimals as another one, at least two; empty for None."""
    return "" if value is None else f"{value:.{max(2, len(f'{other:g}'.partition('.')[2]))}f}"


def _machine(machine: Machine) -> list[str]:
    """Return texts on the machine of a study and on the versions of seqmix and torch, as far as they are known."""
    threads = f"{machine.threads} thread{'s' * (machine.threads > 1)}" if machine.threads else ""
    products = f"{machine.precision} products" if machine.precision else ""
    versions = [f"{name} {version}" for name in ("seqmix", "torch", "python") if (version := getattr(machine, name))]
    return [", ".join(filter(None, [machine.processor, machine.device, threads, products])), *versions]
