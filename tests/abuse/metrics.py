"""Measurements of anyone's making: metrics.jsonl of runs, results.json of studies, drawn as pages and on paper."""

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from abuse.tally import Case

from seqmix import load_config
from seqmix.cli.commands.plot import plot
from seqmix.registry import dump

NUMBERS = (
    *("1e308", "-1e308", "1e-320", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "0", "-1", "-0.0", "5e-324"),
    *("1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, str(2**53), str(2**63), str(-(2**63)), "true", "null", '"x"'),
    *("[]", "{}", "[" * 10**5, '"' + "x" * 10**5 + '"', '"\\u0000\\u001b[2J"', '"</script><script>"', "1e400"),
)
KEYS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "memory_bytes",
    "validation_loss",
    "accuracy",
)


def metrics(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every number of a run's lines and of a study's results replaced: one of them, or all."""
    number = count()
    for key in KEYS:
        for value in NUMBERS:
            for everywhere in (False, True):
                where = folder / f"run-{next(number)}"
                name = f"{key} = {value[:12]} {'everywhere' if everywhere else 'once'}"
                ending = "svg" if next(number) % 40 == 0 else "html"
                yield Case(name, partial(_draw_run, where, key, value, everywhere, ending), refused=False)
    for text in ("[]", "1", "{}", '{"step": 1}', "\x00", "\ud800", '{"step": 1, "loss": {"a": 1}}', ""):
        yield Case(
            f"lines of {text!r}",
            partial(_draw_run, folder / f"run-{next(number)}", "", text, True, "html"),
            refused=False,
        )
    good = _results()
    for path, value in _places(good):
        for changed in drawn.sample(NUMBERS, 5):
            where = folder / f"study-{next(number)}"
            name = f"results.json {'.'.join(map(str, path))} = {changed[:12]} for {value!r:.12}"
            yield Case(name, partial(_draw_study, where, good, path, changed), refused=False)


def _draw_run(run: Path, key: str, value: str, everywhere: bool, ending: str) -> None:
    run.mkdir()
    (run / "config.yaml").write_text(dump(load_config("retnet-tiny")))
    lines = []
    for step in range(1, 9):
        line = {"step": step * 10, "loss": 5.0 / step, "learning_rate": 1e-3 * step, "gradient_norm": 1.0 * step}
        line |= {"tokens_per_second": 1e4 + step, "memory_bytes": 10**9 + step}
        if step % 4 == 0:
            line = {"step": step * 10, "validation_loss": 4.0 / step, "accuracy": 0.1 * step, "final": step == 8}
        text = json.dumps(line)
        if key in line and (everywhere or step in (4, 5)):
            text = json.dumps(line | {key: "@"}).replace('"@"', value)
        lines.append(value if not key else text)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", errors="replace")
    _draw(run, ending)


def _draw(folder: Path, ending: str) -> None:
    out = folder / f"drawn.{ending}"
    plot([folder], figure=None, out=out, width=3.25)
    drawn = out.read_text()
    assert drawn
    assert "NaN" not in drawn.partition("<svg")[2] if ending == "svg" else '"y": NaN' not in drawn


def _draw_study(folder: Path, good: dict[str, Any], path: tuple[Any, ...], value: str) -> None:
    folder.mkdir()
    tree = deepcopy(good)
    place: Any = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "@"
    (folder / "results.json").write_text(json.dumps(tree).replace('"@"', value))
    _draw(folder, "html")
    plot([folder], figure=None, out=None, width=3.25)


def _results() -> dict[str, Any]:
    """The results of a small study."""
    moments = [{"step": s, "tokens": s * 100, "flops": s * 1e9, "seconds": s * 0.1} for s in range(1, 4)]
    summary, runs, entries = [], [], []
    for number, name in enumerate(("a", "b")):
        entries.append({"name": name, "config": "x: 1", "mixers": ["retention"], "parameters": 1000 + number})
        entries[-1] |= {"flops_per_token": 2e3, "state_bytes": 100 + number, "state_grows": bool(number)}
        run = {"name": f"{name}-0", "entry": name, "seed": 0, "learning_rate": 1e-3, "status": "finished"}
        run |= {"sequence_length": 16, "alone": True, "seconds": 3.0, "tokens_per_second": 1e3, "validation_loss": 2.0}
        run |= {"accuracy": 0.5, "accuracy_by": {"pairs": {"1": 0.5, "2": 0.25}}, "peak_memory_bytes": 10**8}
        run |= {"validation_loss_by_length": {"16": 2.0, "32": 2.5}, "tokens_per_second_range": [900.0, 1100.0]}
        run["history"] = [moment | {"loss": 3.0 / moment["step"]} for moment in moments]
        run["evaluations"] = [moment | {"validation_loss": 3.0, "accuracy": 0.2} for moment in moments]
        runs.append(run)
        mean = {"mean": 0.5, "spread": 0.1}
        row = {"entry": name, "learning_rate": 1e-3, "seeds": 1, "validation_loss": mean, "accuracy": mean}
        row |= {"accuracy_by": {"pairs": {"1": mean, "2": mean}}, "validation_loss_by_length": {"16": mean, "32": mean}}
        summary.append(row | {"tokens_per_second": 1e3, "tokens_per_second_range": [900.0, 1100.0]})
    speed = {"repeat": 3, "threads": 1, "train": [], "decode": []}
    speed["train"] = [{"entry": "a", "length": n, "tokens_per_second": 1e3, "memory_bytes": 1e8} for n in (64, 128)]
    speed["decode"] = [{"entry": "a", "context": n, "seconds": 1e-3, "state_bytes": 100} for n in (64, 128)]
    whole = {"format": 1, "name": "study", "created": "2026-01-01T00:00:00+00:00", "entries": entries, "runs": runs}
    return whole | {"summary": summary, "speed": speed}


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _places(value, (*path, key))
