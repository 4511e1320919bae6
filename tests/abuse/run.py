"""Try all hostile input of some groups, or of all, and print what held: see tally.py.

python tests/abuse/run.py [GROUP[=CASES] ...]    with CASES, as many drawn ones
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from abuse.groups import ALONE, GROUPS
from abuse.tally import Tally


def main(asked: list[str]) -> None:
    for name, _, sample in (group.partition("=") for group in asked or GROUPS):
        tally = Tally()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            cases = list(GROUPS[name](Path(folder), random.Random(0)))
            if sample:
                cases = random.Random(0).sample(cases, min(int(sample), len(cases)))
            for case in cases:
                before = len(tally.faults)
                tally.add(case, 250 if name in ("full_disk", "kills") else 30, alone=name in ALONE)
                print(*(f"    {fault}\n" for fault in tally.faults[before:]), sep="", end="", flush=True)
        print(f"{name}: tried {tally.tried}, held {tally.held}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
