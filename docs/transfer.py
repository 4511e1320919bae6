"""Write the table of learning rates in docs/how-to/training.md: `python docs/transfer.py studies/width-transfer`.

The argument is the folder of the study `width-transfer`, after `seqmix compare width-transfer`.
"""

import sys
from pathlib import Path

from seqmix.experiments.pages import fill, table
from seqmix.experiments.results import Results, read_results
from seqmix.registry import write_file

TARGET = Path(__file__).with_name("how-to") / "training.md"
NAMES = {"standard": "standard", "mup": "muP"}


def transfer(results: Results) -> list[str]:
    """Return the table of validation losses by learning rate; the best of each model is bold."""
    losses: dict[tuple[str, str, int], dict[float, float]] = {}
    for run in results.runs:
        if run.tunes and run.validation_loss is not None and run.learning_rate is not None:
            kind = run.variant["model.parametrization"]["kind"]
            model = run.entry, kind, run.variant["model.d_model"]
            losses.setdefault(model, {})[run.learning_rate] = run.validation_loss
    rates = sorted({rate for row in losses.values() for rate in row})
    rows = []
    for (entry, kind, width), row in losses.items():
        best = min(row, key=row.__getitem__)
        cells = ["" if rate not in row else f"{row[rate]:.3f}" for rate in rates]
        cells[rates.index(best)] = f"**{row[best]:.3f}**"
        rows.append([f"`{entry}`", NAMES[kind], f"{width}", *cells])
    return table(["mixer", "parametrization", "width:", *(f"{rate:g}:" for rate in rates)], rows)


if __name__ == "__main__":
    write_file(fill(TARGET, {"transfer": transfer(read_results(sys.argv[1]))}), TARGET)
