"""Write the tables of mutants into docs/appendix/mutants.md: `python tests/mutants/table.py`.

It takes minutes. The tests read the tables back and hold them against the mutants.
"""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this folder is on the path, not the one above

from mutants.kernels import KERNEL_MUTANTS
from mutants.kernels import caught as caught_kernel
from mutants.mixers import FEW, MUTANTS, caught

from seqmix.testing import CHECKS, EXAMPLES, KERNEL_CHECKS

PAGE = Path(__file__).parents[2] / "docs" / "appendix" / "mutants.md"
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"

OVERLAPS: dict[str, str] = {}
"""Checks without a mutant that they alone catch, and why they stay."""

HOW = (
    f"A mutant's own check ran with {EXAMPLES} examples, the others with {FEW}; checks that compile ran on their own "
    "mutants alone."
)


class Row(NamedTuple):
    """A mutant in its table."""

    name: str
    wrong: str
    check: str
    also: tuple[str, ...]
    """The other checks that catch it."""


def render(title: str, rows: Collection[Row], checks: Iterable[str]) -> str:
    """A table of mutants, then one of checks with what each alone catches."""
    lines = [
        f"### {title}",
        "",
        "| mutant | what is wrong, and after which bug | its check | caught also by |",
        "|---|---|---|---|",
        *(f"| `{row.name}` | {row.wrong} | `{row.check}` | {_names(row.also)} |" for row in rows),
        "",
        "| check | its mutants | those that it alone catches |",
        "|---|---|---|",
    ]
    for check in checks:
        own = [row for row in rows if row.check == check]
        alone = _names(row.name for row in own if not row.also) or OVERLAPS.get(check, "")
        lines.append(f"| `{check}` | {len(own)} | {alone} |")
    return "\n".join(lines)


def read(title: str, text: str) -> list[Row]:
    """The rows of a rendered table of mutants."""
    _, _, after = text.partition(f"### {title}\n\n")
    table, _, _ = after.partition("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [
        Row(name.strip("`"), wrong, check.strip("`"), tuple(also.replace("`", "").split(", ")) if also else ())
        for name, wrong, check, also in cells
    ]


def generated(page: str) -> str:
    """What stands between the markers."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def of_mixers(rows: Collection[Row]) -> str:
    """The tables of wrong mixers."""
    return f"{render('Wrong mixers', rows, CHECKS)}\n\n{HOW}"


def of_kernels(rows: Collection[Row]) -> str:
    """The tables of wrong kernels."""
    return render("Wrong kernels", rows, KERNEL_CHECKS)


def main() -> None:
    """Run everything, and write the page."""
    mixers = [
        Row(m.name, m.wrong, m.check, tuple(name for name in caught(m) if name != m.check)) for m in MUTANTS.values()
    ]
    kernels = [
        Row(m.name, m.wrong, m.check, tuple(name for name in KERNEL_CHECKS if name in caught_kernel(m) - {m.check}))
        for m in KERNEL_MUTANTS
    ]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{of_mixers(mixers)}\n\n{of_kernels(kernels)}\n\n{END}{after}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
