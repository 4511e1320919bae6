"""Write the tables of docs/explanation/state-precision.md: `python docs/precision.py studies/precision`.

The argument is a folder for models and measurements. What it lacks is trained and measured first, one after another, in
about 30 minutes on one core; what it has is read. Remove the folder of a model whose training was interrupted.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seqmix import MIXERS, RunConfig, load_config, train
from seqmix.experiments.pages import fill, table
from seqmix.experiments.precision import FormatResult, rank_correlation, state_precision
from seqmix.experiments.state_format import StateFormat
from seqmix.registry import write_file
from seqmix.training import PRESETS, load_run
from seqmix.training.length_eval import open_text

TARGET = Path(__file__).with_name("explanation") / "state-precision.md"
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
    sequences: int = 2
    keep_exact: str | None = None

    @property
    def name(self) -> str:
        """Name of the mixer in the tables."""
        return self.kind if self.keep_exact is None else f"{self.kind}, {self.keep_exact} exact"

    def measure(self, folder: Path) -> dict[str, Any]:
        """Train the model, if its folder does not exist, and measure it; the errors of single heads are left out."""
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
        result = asdict(state_precision(load_run(run), batch, self.formats, self.lengths, keep_exact=kept))
        return {key: value for key, value in result.items() if key != "tensors"}


def tasks() -> Iterator[Task]:
    """Yield the measurements, in the order of their importance."""
    configs = {kind: load_config(preset, TEXT) for kind, preset in presets().items()}
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
        yield Task(kind, "longest", configs[kind], lengths, LONG_ROUNDED)
    for kind, rate in RECALL.items():
        mixer = {"kind": kind, "n_heads": 1} | ({} if kind == "attention" else {"short_conv": 4})
        changes = [f"model.blocks.mixer.mixer={json.dumps(mixer)}", f"training.learning_rate={rate}"]
        config = load_config("mqar-tiny", [*changes, "training.precision=float32"])
        yield Task(kind, "recall", config, [config.data.sequence_length], sequences=128)


def presets() -> dict[str, str]:
    """Return for each built-in mixer the first preset all of whose layers are of this kind."""
    found: dict[str, str] = {}
    for name in sorted(file.stem for file in PRESETS.glob("*-tiny.yaml")):
        config = load_config(name)
        kinds = {config.model.blocks[layer].mixer.kind for layer in config.model.layers}
        if config.data.kind == "text" and len(kinds) == 1:
            found.setdefault(kinds.pop(), name)
    return {kind: found[kind] for kind in sorted(MIXERS.built_in())}


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Measure what the folder lacks; return all measurements by part, then by the name of the mixer."""
    results: dict[str, dict[str, Any]] = {}
    for task in tasks():
        file = folder / f"{task.part} {task.name}.json"
        if not file.exists():
            sys.stderr.write(f"{file.stem}\n")
            write_file(json.dumps(task.measure(folder), indent=1) + "\n", file)
        results.setdefault(task.part, {})[task.name] = json.loads(file.read_text(encoding="utf-8"))
    return results


def bits(text: Measured, long: Measured) -> list[str]:
    """Return the table of the fewest bits with less than 0.01 nats lost, at each length."""
    rows = []
    for name, result in text.items():
        cells = [_fewest(_results(result, length)) for length in LENGTHS]
        cells.append(_fewest(_results(long[name], LONG)) if name in long else "")
        rows.append([_code(name), f"{result['exact'][-1]['loss']:.3f}", *cells])
    return table(["mixer", "exact loss:", *(f"{length:,} tokens" for length in (*LENGTHS, LONG))], rows)


def _fewest(results: Sequence[FormatResult]) -> str:
    """Return the format with the fewest bits that loses less than 0.01 nats, to nearest if that is enough."""
    fitting = [each for each in results if each.lost < 0.01]
    best = min(fitting, key=lambda each: (each.bits, each.rounding != "nearest", each.lost), default=None)
    return "32" if best is None else f"{best.bits} ({best.name})"


def lost(measured: Measured, length: int, formats: Sequence[StateFormat], *, errors: bool = False) -> list[str]:
    """Return the table of nats lost at a length, optionally with the state's relative errors in brackets."""
    rows = []
    for name, result in measured.items():
        cells = [
            _number(each.lost) + (f" ({each.state_error:.1g})" if errors and math.isfinite(each.lost) else "")
            for each in _results(result, length)
        ]
        rows.append([_code(name), *cells])
    return table(["mixer", *(f"{each}:" for each in formats)], rows)


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
            rows.append([_code(name), f"{each}", *(f"{_number(one.lost)} ({one.state_error:.1g})" for one in cells)])
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
    return [
        FormatResult(**{key: math.nan if value is None else value for key, value in each.items()})
        for each in result["results"]
        if each["length"] == length
    ]


def _code(name: str) -> str:
    kind, comma, rest = name.partition(",")
    return f"`{kind}`{comma}{rest}"


def _number(value: float) -> str:
    """Format nats lost: bold from 0.01 on."""
    if math.isnan(value):
        return "**not finite**"
    text = f"{value:.4f}".replace("-0.0000", "0.0000") if abs(value) < 0.1 else f"{value:.2f}"
    return f"**{text}**" if value >= 0.01 else text


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    parts = measure(Path(sys.argv[1]))
    lines = {
        "bits": bits(parts["text"], parts["long"]),
        "lost": lost(parts["text"], LENGTHS[-1], ROUNDED),
        "errors": errors(parts["text"]),
        "long": lost(parts["long"], LONG, LONG_ROUNDED, errors=True),
        "longest": longest(parts["longest"]),
        "recall": recall(parts["recall"]),
    }
    write_file(fill(TARGET, lines), TARGET)
