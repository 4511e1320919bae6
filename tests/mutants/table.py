"""Write the tables of mutants into docs/appendix/mutants.md: `python tests/mutants/table.py`."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # the folder above is on the path of tests alone
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants import (  # noqa: F401  importing them registers the mutants
    declarations,
    equations,
    kernels,
    precision,
    states,
    training,
)
from mutants.registry import KERNEL_MUTANTS, MIXER_MUTANTS, Mutant

PAGE = Path(__file__).parents[2] / "docs" / "appendix" / "mutants.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"


def tables() -> str:
    """What stands between the markers of the page."""
    return f"{_table('Wrong mixers', MIXER_MUTANTS)}\n\n{_table('Wrong kernels', KERNEL_MUTANTS)}"


def _table(title: str, mutants: Sequence[Mutant]) -> str:
    rows = [f"| `{mutant.check}` | `{mutant.name}` | {mutant.wrong} | {mutant.after} |" for mutant in mutants]
    return "\n".join([f"### {title}", "", "| check | mutant | what is wrong | after |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")
