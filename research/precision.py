"""Write the tables of docs/explanation/state-precision.md: `python research/precision.py [FOLDER]`.

FOLDER is for trained models. With it, what docs/explanation/state-precision.json lacks, or has for another number of
sequences, is measured first and added to that file; models that FOLDER lacks are trained. Remove the folder of a model
whose training was interrupted. Without FOLDER, the tables are regenerated from the file.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from seqmix import RunConfig, load_config, train
from seqmix.lab.markdown import fill, table
from seqmix.lab.precision.measure import TOLERANCE, FormatResult, rank_correlation, state_precision
from seqmix.lab.precision.state_format import StateFormat
from seqmix.registry import write_file
from seqmix.research import DOCS
from seqmix.training import load_run
from seqmix.training.length_eval import open_text
from seqmix.training.presets import mixer_kind, single_kind_presets

TARGET = DOCS / "explanation" / "state-precision.md"
RESULTS = TARGET.with_suffix(".json")
"""Measurements by table, then by the name of the mixer."""
KEPT = (
    "format", "rounding", "bits", "length", "lost", "lost_error", "state_error", "predicted", "bound", "correlation",
    "accuracy",
)  # fmt: skip
"""Fields of `FormatResult` that are kept in `RESULTS`."""
UNSURE = "≈ "
"""Mark of what another sample of sequences may change."""
TEXT = [
    "model.d_model=64", "model.n_layers=2", "training.steps=200", "training.evaluate_every=200",
    "training.checkpoint_every=200", "training.final_evaluation_batches=16", "training.precision=float32",
]  # fmt: skip
"""Changes of the presets of text models."""
ROUNDED = [StateFormat(name) for name in ("bfloat16", "float16", "int8", "int4")] + [
    StateFormat(name, rounding) for rounding in ("stochastic", "compensated") for name in ("int8", "int4")
]
LONG_ROUNDED = [StateFormat(name) for name in ("bfloat16", "int8", "int4")] + [StateFormat("int8", "compensated")]
"""Formats that are also measured on longer texts."""
LENGTHS = 256, 1024
LONG = 4096
"""Length of the longer texts, for mixers with a constant state: caches of this length take minutes."""
LONGEST = {"retention": (4096, 16_384, 65_536)}
"""Mixers that are measured on the longest texts, and at which lengths."""
KEPT_EXACT = {"mamba3": "angle", "mlstm": "weight"}
"""Mixers with a small float64 tensor that a deployment would not round: measured again, with it exact."""
RECALL = {"attention": 0.002, "retention": 0.006, "delta_net": 0.02}
"""Mixers that also learn associative recall (mqar), with the learning rates that the study recall-accessories found."""

Measured = Mapping[str, Mapping[str, Any]]
"""Measurements by the name of the mixer, as JSON."""


@dataclass(frozen=True)
class Task:
    """One measurement of one model."""

    kind: str
    part: str
    """Table for which it is: `text`, `long`, `longest`, or `recall`."""
    config: RunConfig
    lengths: Sequence[int]
    formats: Sequence[StateFormat] = tuple(ROUNDED)
    sequences: int = 16
    keep_exact: str | None = None

    @property
    def name(self) -> str:
        """Name of the mixer in the tables."""
        return self.kind if self.keep_exact is None else f"{self.kind}, {self.keep_exact} exact"

    def measure(self, folder: Path) -> dict[str, Any]:
        """Train the model, if its folder does not exist, and measure it; return what `RESULTS` keeps."""
        run = folder / f"{self.kind}{'-recall' * (self.part == 'recall')}"
        if not run.exists():
            for _ in train(self.config, run):
                pass
        if self.part == "recall":
            batches = self.config.open_data().evaluation_batches(self.sequences, 1)
        else:
            text = open_text(self.config, run, self.lengths)
            batches = text.evaluation_batches(self.sequences, 1, max(self.lengths))
        batch = next(iter(batches)).batch
        kept = [] if self.keep_exact is None else [self.keep_exact]
        result = state_precision(load_run(run), batch, self.formats, self.lengths, keep_exact=kept)
        return {
            "sequences": self.sequences,
            "exact": [{"length": each.length, "loss": each.loss, "accuracy": each.accuracy} for each in result.exact],
            "results": [
                {name: value for name in KEPT if not _is_missing(value := getattr(each, name))}
                for each in result.results
            ],
        }


def tasks() -> Iterator[Task]:
    """Yield the measurements, in the order of their importance."""
    presets = {mixer_kind(config): name for name, config in single_kind_presets().items()}
    configs = {kind: load_config(name, TEXT) for kind, name in sorted(presets.items())}
    for kind, config in configs.items():
        yield Task(kind, "text", config, LENGTHS)
        if kind in KEPT_EXACT:
            yield Task(kind, "text", config, LENGTHS, keep_exact=KEPT_EXACT[kind])
    for kind, config in configs.items():
        if all(block.mixer.traits.state == "constant" for block in config.model.blocks.values()):
            yield Task(kind, "long", config, [LONG], LONG_ROUNDED)
            if kind in KEPT_EXACT:
                yield Task(kind, "long", config, [LONG], LONG_ROUNDED, keep_exact=KEPT_EXACT[kind])
    for kind, lengths in LONGEST.items():
        yield Task(kind, "longest", configs[kind], lengths, LONG_ROUNDED, sequences=2)
    for kind, rate in RECALL.items():
        mixer = {"kind": kind, "n_heads": 1} | ({} if kind == "attention" else {"short_conv": 4})
        changes = [f"model.blocks.mixer.mixer={json.dumps(mixer)}", f"training.learning_rate={rate}"]
        config = load_config("mqar-tiny", [*changes, "training.precision=float32"])
        yield Task(kind, "recall", config, [config.data.sequence_length], sequences=128)


def measure(folder: Path) -> None:
    """Measure what `RESULTS` lacks, or has for another number of sequences."""
    for task in tasks():
        results = read_results()
        part = results.setdefault(task.part, {})
        if part.get(task.name, {}).get("sequences") != task.sequences:
            sys.stderr.write(f"{task.part} {task.name}\n")
            part[task.name] = task.measure(folder)
            results[task.part] = dict(sorted(part.items()))
            write_file(json.dumps(results, indent=1) + "\n", RESULTS)


def read_results() -> dict[str, dict[str, Any]]:
    """Return the measurements that have been kept."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def bits(text: Measured, long: Measured) -> list[str]:
    """Return the table of the fewest bits with less than `TOLERANCE` nats lost, at each length."""
    rows = []
    for name, result in text.items():
        cells = [_fewest(_results(result, length)) for length in LENGTHS]
        cells.append(_fewest(_results(long[name], LONG)) if name in long else "")
        rows.append([_code(name), f"{result['exact'][-1]['loss']:.3f}", *cells])
    lines = table(["mixer", "exact loss:", *(f"{length:,} tokens" for length in (*LENGTHS, LONG))], rows)
    return [*lines, "", _count_unsure([row[2:] for row in rows])]


def _fewest(results: Sequence[FormatResult]) -> str:
    """Return the format with the fewest bits that loses less than `TOLERANCE`, to nearest if that is enough.

    It is marked if it would be another one with all losses a standard error higher, or lower.
    """
    best, *others = (_best([each for each in results if each.lost + n * _error(each) < TOLERANCE]) for n in (0, 1, -1))
    return best if others == [best, best] else UNSURE + best


def _best(fitting: Sequence[FormatResult]) -> str:
    best = min(fitting, key=lambda each: (each.bits, each.rounding != "nearest", each.lost), default=None)
    return "32" if best is None else f"{best.bits} ({best.name})"


def lost(measured: Measured, length: int, formats: Sequence[StateFormat], *, errors: bool = False) -> list[str]:
    """Return the table of nats lost at a length, optionally with the state's relative errors in brackets."""
    rows = []
    for name, result in measured.items():
        cells = [
            _number(each) + (f" ({each.state_error:.1g})" if errors and math.isfinite(each.lost) else "")
            for each in _results(result, length)
        ]
        rows.append([_code(name), *cells])
    lines = table(["mixer", *(f"{each}:" for each in formats)], rows)
    return [*lines, "", _count_unsure([row[1:] for row in rows])]


def _count_unsure(rows: Sequence[Sequence[str]]) -> str:
    """Return a sentence with the number of marked cells."""
    cells = [cell for row in rows for cell in row if cell]
    return f"{sum(cell.startswith(UNSURE) for cell in cells)} of {len(cells)} cells are marked with {UNSURE.strip()}."


def errors(measured: Measured) -> list[str]:
    """Return the table of errors and predictions of int8, and their rank correlations over mixers in all formats."""
    length = LENGTHS[-1]
    rows = []
    for name, result in measured.items():
        nearest, stochastic, compensated = (each for each in _results(result, length) if each.format == "int8")
        pairs = [value for each in (stochastic, compensated) for value in (each.state_error, each.predicted)]
        numbers = nearest.state_error, nearest.predicted, nearest.bound, *pairs
        ranks = ("" if math.isnan(each.correlation) else f"{each.correlation:.2f}" for each in (nearest, stochastic))
        rows.append([_code(name), *(f"{value:.3f}" for value in numbers), *ranks])
    heads = [
        "mixer", "nearest:", "predicted:", "bound:", "stochastic:", "predicted:", "compensated:", "predicted:",
        "rank correlation over heads, nearest:", "stochastic:",
    ]  # fmt: skip
    lines = [*table(heads, rows), "", f"Rank correlations over the mixers, at {length:,} tokens:", ""]
    over_mixers = []
    for i, each in enumerate(ROUNDED):
        at = [_results(result, length)[i] for result in measured.values()]
        error, predicted, bound, nats = (
            torch.tensor([getattr(one, field) for one in at], dtype=torch.float64)
            for field in ("state_error", "predicted", "bound", "lost")
        )
        pairs = (predicted, error), (bound, error), (predicted, nats), (error, nats)
        over_mixers.append([f"{each}", *(f"{rank_correlation(*pair):.2f}" for pair in pairs)])
    heads = ["format", "predicted, error:", "bound, error:", "predicted, nats lost:", "error, nats lost:"]
    return [*lines, *table(heads, over_mixers)]


def longest(measured: Measured) -> list[str]:
    """Return the table of the longest texts: nats lost, and in brackets the relative error of the state."""
    rows = []
    for name, result in measured.items():
        for i, each in enumerate(LONG_ROUNDED):
            cells = [_results(result, length)[i] for length in LONGEST[name]]
            rows.append([_code(name), f"{each}", *(f"{_number(one)} ({one.state_error:.1g})" for one in cells)])
    lengths = next(iter(LONGEST.values()))
    return table(["mixer", "state stored as", *(f"{length:,} tokens:" for length in lengths)], rows)


def recall(measured: Measured) -> list[str]:
    """Return the table of accuracies on associative recall."""
    rows = []
    for name, result in measured.items():
        (exact,) = result["exact"]
        accuracies = (exact["accuracy"], *(each.accuracy for each in _results(result, exact["length"])))
        rows.append([_code(name), *(f"{accuracy:.1%}" for accuracy in accuracies)])
    return table(["mixer", "exact:", *(f"{each}:" for each in ROUNDED)], rows)


def _results(result: Mapping[str, Any], length: int) -> list[FormatResult]:
    """Return the results at a length; fields that are not kept, or were not finite, are NaN."""
    missing = dict.fromkeys((field.name for field in fields(FormatResult)), math.nan)
    return [FormatResult(**missing | each) for each in result["results"] if each["length"] == length]


def _is_missing(value: str | float) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # JSON has no such numbers


def _code(name: str) -> str:
    kind, comma, rest = name.partition(",")
    return f"`{kind}`{comma}{rest}"


def _error(each: FormatResult) -> float:
    """Return the standard error of nats lost; 0 if it is not known."""
    return 0.0 if math.isnan(each.lost_error) else each.lost_error


def _number(each: FormatResult) -> str:
    """Format nats lost: bold from `TOLERANCE` on, and marked within a standard error of it."""
    if math.isnan(each.lost):
        return "**not finite**"
    text = f"{each.lost:.4f}".replace("-0.0000", "0.0000") if abs(each.lost) < 0.1 else f"{each.lost:.2f}"
    text = f"**{text}**" if each.lost >= TOLERANCE else text
    return UNSURE + text if abs(each.lost - TOLERANCE) < _error(each) else text


def files() -> dict[Path, str]:
    """Return the text of the page, from the measurements that have been kept."""
    parts = read_results()
    lines = {
        "bits": bits(parts["text"], parts["long"]),
        "lost": lost(parts["text"], LENGTHS[-1], ROUNDED),
        "errors": errors(parts["text"]),
        "long": lost(parts["long"], LONG, LONG_ROUNDED, errors=True),
        "longest": longest(parts["longest"]),
        "recall": recall(parts["recall"]),
    }
    return {TARGET: fill(TARGET, lines)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        measure(Path(sys.argv[1]))
    for file, content in files().items():
        write_file(content, file)
