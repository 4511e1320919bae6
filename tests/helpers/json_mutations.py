"""Mutations of valid JSON, for files of strangers: other types, absent fields, huge numbers, other encodings."""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

VALUES = (
    *("null", "true", "0", "-1", "0.5", "1e308", "1e999", "-1e999", "NaN", "1" + "0" * 400, "9" * 5000, str(2**63)),
    *("[]", "{}", '[[1], "x"]', '{"x": {}}', "[" * 10**5, "[" * 400 + "]" * 400, '"x"', '""', '"/etc/passwd"'),
    *('"\\u001b[2J\\u0007"', '"\\ud800"', '"\\n\\r"', '"\\u202e"', '"' + "x" * 10**5 + '"'),
)
"""JSON of one value of each class that a field may not have."""
ABSENT, RENAMED = "absent", "renamed"
ENCODINGS = ("utf-16", "utf-8-sig", "utf-32", "cp037")


def mutated_json(tree: Any, seed: int, cases: int) -> Iterator[tuple[str, bytes]]:
    """Yield a name and the content of as many invalid or unusual files as `cases`; the same seed gives the same."""
    drawn = random.Random(seed)
    text = json.dumps(tree)
    whole = [(f"{value[:20]} for everything", value.encode()) for value in VALUES]
    whole += [(f"in {encoding}", text.encode(encoding)) for encoding in ENCODINGS]
    whole += [("empty", b""), ("half", text.encode()[: len(text) // 2]), ("not UTF-8", b"\xff" + text.encode())]
    yield from drawn.sample(whole, n_whole := min(len(whole), cases // 4))
    places = list(_places(tree))
    for _ in range(cases - n_whole):
        path, value = drawn.choice(places), drawn.choice((ABSENT, RENAMED, *VALUES))
        changed = deepcopy(tree)
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        last = path[-1]
        if value is ABSENT:
            del parent[last]
        elif value is RENAMED and isinstance(parent, dict):
            parent["\x1b[2J\n"] = parent.pop(last)
        else:
            parent[last] = "@"
        yield f"{'.'.join(map(str, path))} = {value[:20]}", json.dumps(changed).replace('"@"', value).encode()


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from _places(value, (*path, key))
