"""Write the table of learning rates in docs/how-to/training.md: `python research/transfer.py studies/width-transfer`.

The argument is the folder of the study `width-transfer`, after `seqmix compare width-transfer`.
"""

import sys

from seqmix.lab.markdown import fill, table
from seqmix.lab.study.results import Results
from seqmix.lab.study.results_file import read_results
from seqmix.registry import write_file
from seqmix.research import DOCS

TARGET = DOCS / "how-to" / "training.md"
NAMES = {"standard": "standard", "mup": "muP"}
Losses = dict[float, float]
"""Validation losses of the tuning runs of a model, by learning rate."""


def transfer(results: Results) -> list[str]:
    """Return the table of validation losses by mixer, width, parametrization and learning rate.

    The best loss of a model is bold. The last column is for the rate that is best at the smallest width: the loss at
    that rate, minus the lowest loss of the row. Parametrizations with the same losses share a row.
    """
    models: dict[tuple[str, int], dict[str, Losses]] = {}
    for run in results.runs:
        if run.tunes and run.validation_loss is not None and run.learning_rate is not None:
            kind = NAMES[run.variant["model.parametrization"]["kind"]]
            of_width = models.setdefault((run.entry, run.variant["model.d_model"]), {})
            of_width.setdefault(kind, {})[run.learning_rate] = run.validation_loss
    rates = sorted({rate for kinds in models.values() for losses in kinds.values() for rate in losses})
    narrowest = min(width for _, width in models)
    order = [entry.name for entry in results.entries]
    rows = []
    for (entry, width), kinds in sorted(models.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        shared: dict[str, list[str]] = {}
        for kind, losses in kinds.items():
            shared.setdefault(repr(sorted(losses.items())), []).append(kind)
        for names in shared.values():
            losses = kinds[names[0]]
            excess = ""
            if width > narrowest:
                narrow = models[entry, narrowest][names[0]]
                excess = f"{losses[_best(narrow)] - min(losses.values()):.3f}"
            cells = ["" if rate not in losses else f"{losses[rate]:.3f}" for rate in rates]
            cells[rates.index(_best(losses))] = f"**{min(losses.values()):.3f}**"
            rows.append([f"`{entry}`", f"{width}", " and ".join(names), *cells, excess])
    heads = ["mixer", "width:", "parametrization", *(f"{rate:g}:" for rate in rates)]
    return table([*heads, f"excess at width {narrowest}'s rate:"], rows)


def _best(losses: Losses) -> float:
    return min(losses, key=losses.__getitem__)


if __name__ == "__main__":
    write_file(fill(TARGET, {"transfer": transfer(read_results(sys.argv[1]))}), TARGET)
