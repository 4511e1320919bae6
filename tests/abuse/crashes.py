"""Commands that write folders and files, killed at every moment at which they change one: whole, absent, or what stood
there before; begun again, they end as if nothing had been.
"""

import json
import random
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import killed_commands
from abuse.lock import PROCESSES
from abuse.tally import Case

REPLACING = {
    "evaluate": (["evaluate", "run", "--length", "16", "--tokens", "16", "--json", "new.json"], ["new.json"]),
    "inspect": (
        ["inspect", "run", "--text", "text.txt", "--tokens", "9", "--out", "new.html", "--json", "new.json"],
        ["new.html", "new.json"],
    ),
}
"""Commands that replace what they have written."""
NEEDS = {"export-hf": "transformers", "inspect": "altair"}


def crashes(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Each kill is a case."""
    base = killed_commands.made_base(folder / "base")
    for name, (arguments, new) in (killed_commands.COMMANDS | REPLACING).items():
        if name not in NEEDS or find_spec(NEEDS[name]) is not None:
            where, replaced = folder / name, name in REPLACING
            given = (f"{base}", f"{where}", arguments, new, replaced, killed_commands.KINDS)
            process = PROCESSES.Process(target=killed_commands.attempt, args=given)
            process.start()
            process.join()
            assert process.exitcode == 0, f"{name}: {process.exitcode}"
            for moment, fault in json.loads(where.with_suffix(".json").read_text()).items():
                yield Case(f"{name}, {moment}", partial(_require_none, fault), refused=False)


def _require_none(fault: str | None) -> None:
    assert fault is None, fault
