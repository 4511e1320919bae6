"""Try all hostile input of some groups, or of all, and print what held: see tally.py."""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from abuse.groups import ALONE, GROUPS
from abuse.tally import Tally


def main(names: list[str]) -> None:
    for name in names or GROUPS:
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder:
            for case in GROUPS[name](Path(folder), random.Random(0)):
                tally.add(case, 15, alone=name in ALONE)
        print(f"{name}: tried {tally.tried}, held {tally.held}", *tally.faults, sep="\n    ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
