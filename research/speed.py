"""Write the table of all mixers in docs/explanation/performance.md: `python research/speed.py mixers.json`.

The argument is what `seqmix bench mixers --cpu-time --json mixers.json` has written.
"""

import sys
from pathlib import Path

from seqmix.lab.bench.report import from_json
from seqmix.lab.markdown import fill, table
from seqmix.registry import write_file
from seqmix.research import DOCS

TARGET = DOCS / "explanation" / "performance.md"
SUFFIX = "-reference"
EXPECTED = "one file that `seqmix bench mixers --cpu-time --json FILE` has written"


def speeds(text: str) -> list[str]:
    """Return the table: speed relative to retention's, and gain by native kernels, at each length."""
    rows = {(row.name, row.length): row for row in from_json(text).rows if row.seconds is not None}
    lengths = sorted({length for _, length in rows})
    lines = []
    for name in dict.fromkeys(name for name, _ in rows if not name.endswith(SUFFIX)):
        cells = [f"`{name}`"]
        for length in lengths:
            row, reference = rows[name, length], rows.get((name + SUFFIX, length))
            assert row.ratio is not None
            assert row.seconds is not None
            cells += [f"{1e3 * row.seconds.median:,.0f}", f"{1 / row.ratio.median:.2f}"]
            gain = None if reference is None else reference.seconds
            cells.append("" if gain is None else f"{gain.median / row.seconds.median:.2f}")
        lines.append(cells)
    head = ["mixer", *(f"{what}:" for length in lengths for what in (f"T={length:,}, ms", "speed", "gain"))]
    return table(head, lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"expected {EXPECTED}, got {len(sys.argv) - 1} arguments")
    try:
        table_lines = speeds(Path(sys.argv[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[1]} cannot be read ({str(error).splitlines()[0]}): expected {EXPECTED}")
    write_file(fill(TARGET, {"speeds": table_lines}), TARGET)
