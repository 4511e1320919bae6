"""Results of studies for tests: a recall task, text with speed and a paper's figures, few runs, a sweep.

And figures of values that are awkward to draw.
"""

import math
from statistics import fmean
from typing import Any

import numpy as np

from seqmix.lab.figures.figure import ACCURACY, Axis, Figure, Point, Series
from seqmix.lab.study.results import RunResult
from seqmix.lab.study.summary import summarise

MACHINE = {
    "processor": "Intel Xeon",
    "threads": 2,
    "device": "cpu",
    "torch": "2.13.0",
    "seqmix": "0.1",
    "commit": "4f2",
}
MIXERS = {
    "retention": ("retention", 65536, False, 0.81),
    "attention": ("attention", 262144, True, 0.99),
    "linear attention": ("linear_attention", 65536, False, 0.55),
    "gated DeltaNet": ("gated_delta_net", 131072, False, 0.95),
    "Mamba-2": ("mamba2", 98304, False, 0.88),
}


def config(kind: str, width: int = 128, expansion: float = 2.0) -> str:
    return (
        f"d_model: {width}\nn_layers: 4\nvocab_size: 257\nblocks:\n  main:\n    mixer:\n      kind: {kind}\n"
        f"      n_heads: 4\n    ffn:\n      kind: mlp\n      expansion: {expansion}\n    norm:\n      kind: layernorm\n"
        "pattern:\n- main\n"
    )


def entry(name: str, i: int) -> dict[str, Any]:
    kind, state, grows, _ = MIXERS[name]
    return {
        "name": name,
        "config": config(kind, expansion=2.0 + i / 10),
        "mixers": [kind],
        "matched": f"parameters {1_234_000 + 311 * i:,} by blocks.main.ffn.expansion = {2.0 + i / 10} "
        f"(wanted 1,234,000; +0.0{i} %)",
        "parameters": 1_234_000 + 311 * i,
        "flops_per_token": 2.4e6 + 2e5 * i,
        "state_bytes": state,
        "state_grows": grows,
    }


def run(
    name: str,
    seed: int,
    rate: float,
    end: float,
    *,
    steps: int = 400,
    accuracy: float | None = None,
    speed: float = 41000.0,
    variant: dict[str, Any] | None = None,
    tunes: bool = False,
) -> dict[str, Any]:
    """A run whose loss falls to `end`."""
    random = np.random.default_rng([seed, len(name), int(rate * 1e5)])
    begin = 5.5 if accuracy is None else 4.9

    def at(step: int) -> dict[str, Any]:
        return {"step": step, "tokens": step * 4096, "flops": step * 4096 * 7.2e6, "seconds": step * 4096 / speed}

    def loss(step: int) -> float:
        return end + (begin - end) * math.exp(-5 * step / steps) * (1 + 0.03 * random.normal())

    evaluations = [at(step) | {"validation_loss": loss(step)} for step in range(steps // 10, steps + 1, steps // 10)]
    if accuracy is not None:
        for point in evaluations:
            point["accuracy"] = accuracy / (1 + math.exp(-12 * (point["step"] / steps - 0.5)))
    made: dict[str, Any] = {
        "name": f"{name}-lr{rate:g}-seed{seed}",
        "entry": name,
        "seed": seed,
        "learning_rate": rate,
        "tunes": tunes,
        "variant": variant or {},
        "status": "finished",
        "error": None,
        "seconds": steps * 4096 / speed,
        "tokens_per_second": speed,
        "peak_memory_bytes": 900_000_000,
        "validation_loss": evaluations[-1]["validation_loss"],
        "history": [at(step) | {"loss": loss(step)} for step in range(10, steps + 1, 10)],
        "evaluations": evaluations,
    }
    if accuracy is not None:
        by = {
            str(n): min(1.0, max(0.0, accuracy * (1.25 - 0.12 * i) + 0.02 * random.normal()))
            for i, n in enumerate((4, 8, 16, 32, 64))
        }
        made |= {"accuracy": fmean(by.values()), "accuracy_by": {"pairs": by}}
    return made


def study(
    name: str, question: str | None, entries: list[str], runs: list[dict[str, Any]], **more: Any
) -> dict[str, Any]:
    return {
        "format": 1,
        "name": name,
        "question": question,
        "created": "2026-03-02T10:20:30+00:00",
        "machine": MACHINE,
        "x_label": None,
        "entries": [entry(e, i) for i, e in enumerate(entries)],
        "runs": runs,
        "summary": [row.model_dump(mode="json") for row in summarise([RunResult(**found) for found in runs])],
        "fairness": ["With the same seed, all entries see the same batches in the same order."],
        "speed": {"train": [], "decode": []},
        "paper": [],
    } | more


def recall() -> dict[str, Any]:
    """Five mixers, three seeds, two learning rates that are tuned, a task with slices of difficulty."""
    runs = []
    for i, (name, (_, _, _, best)) in enumerate(MIXERS.items()):
        for rate, worse, share in ((3e-4, 1.3, 0.9), (1e-3, 1.0, 1.0)):
            loss, how = 0.02 + 2 * (1 - best) * worse, {"accuracy": best * share, "speed": 30000.0 + 4000 * i}
            runs.append(run(name, 3, rate, loss, **how, tunes=True))
        runs += [run(name, seed, rate, loss, **how) for seed in range(3)]
    return study("recall", "Which mixer recalls the most pairs of key and value?", list(MIXERS), runs)


def text() -> dict[str, Any]:
    """Three mixers on text, with lengths, speed, and what a paper has."""
    names = ["retention", "attention", "Mamba-2"]
    runs = []
    for i, name in enumerate(names):
        for seed in range(3):
            made = run(name, seed, 1e-3, 1.6 + 0.05 * i, steps=2000)
            far = 0.6 if name == "attention" else 0.0
            made["validation_loss_by_length"] = {
                str(n): made["validation_loss"] - 0.03 * k + far * max(0, k - 1)
                for k, n in enumerate((256, 512, 1024, 2048, 4096))
            }
            runs.append(made)
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    slow = {"retention": 0.0, "attention": 1.0, "Mamba-2": 0.05}
    train, decode = [], []
    for n in names:
        for t in lengths:
            speed, memory = 42000 / (1 + slow[n] * t / 3000), 4e8 + 3e4 * t * (1 + slow[n] * t / 8000)
            train.append({"entry": n, "length": t, "tokens_per_second": speed, "memory_bytes": memory})
            step, memory = 0.0021 * (1 + slow[n] * t / 2000), 1e8 + 2e3 * t * slow[n]
            state = {"state_bytes": 512 * t if n == "attention" else 65536}
            decode.append({"entry": n, "context": t, "seconds": step, "memory_bytes": memory} | state)
    best = "Perplexity of the best transformer of the same size"
    paper = [
        {"label": "In-domain perplexity", "entry": "retention", "theirs": 26.05, "ours": 4.95},
        {"label": best, "entry": "attention", "theirs": 27.0, "ours": 5.2},
    ]
    question = "Does retention reach attention's loss, and at what cost?"
    return study("text", question, names, runs, speed={"train": train, "decode": decode}, paper=paper)


def few() -> dict[str, Any]:
    """One run that finished, one that failed, one that was not run, and no question."""
    runs = [run("retention", 0, 1e-3, 1.9)]
    problem = "the loss is not finite at step 31: blocks.0.mixer is the first module whose output is not finite"
    for status, error, seed in (("failed", problem, 1), ("missing", None, 2)):
        made = {"name": f"Mamba-2-lr0.001-seed{seed}", "entry": "Mamba-2", "seed": seed, "learning_rate": 1e-3}
        runs.append(made | {"variant": {}, "status": status, "error": error})
    return study("few", None, ["retention", "Mamba-2"], runs)


def varied() -> dict[str, Any]:
    """Two mixers at four values of one field."""
    runs = []
    for i, name in enumerate(("attention", "retention")):
        for k, pairs in enumerate((8, 16, 32, 64)):
            accuracy, variant = max(0.1, 0.98 - 0.12 * k * (1 + i)), {"data.pairs": pairs}
            loss = 0.05 + 0.2 * i * (1 + k)
            runs += [run(name, seed, 1e-3, loss, accuracy=accuracy, variant=variant) for seed in range(2)]
    return study("varied", "How many pairs does each recall?", ["attention", "retention"], runs, x_label="pairs")


STUDIES = {"recall": recall, "text": text, "few": few, "varied": varied}


X, Y = Axis("x"), Axis("y")


def figure(*columns, name="some", x=X, y=Y, **more) -> Figure:
    """A figure of one series with the columns x and y, and those of a spread."""
    return Figure(name, "Some", "c", x, y, [Series("a", [Point(*p) for p in zip(*columns, strict=True)])], **more)


SLICES = [f"a slice with a long name, number {i}" for i in range(26)]
AWKWARD = [
    figure([1, 2, 3], [1e-9, 2e-9, 1.5e-9], name="tiny"),
    figure([1, 1e6, 1e14], [1e15, 5e15, 9e15], name="huge", x=Axis("x", unit="bytes")),
    figure([1, 1e3, 1e9], [1e-12, 1.0, 1e12], name="decades"),
    figure([1, 2, 3], [7, 7, 7], name="flat"),
    figure([1, 2, 3], [0, 0, 0], name="zero", y=ACCURACY),
    figure([-5, 2, 3], [-4, 0, -8], name="below"),
    figure([1], [2], [1], [3], name="one"),
    figure([1, 4], [2, 3], name="marked", marks={2.0: "trained"}),
    figure(["easy", "hard"], [0.1, 1.0], [0.0, 0.9], [0.2, 1.0], name="names", x=Axis("x", names=["easy", "hard"])),
    Figure("many", "t", "c", X, Y, [Series(f"s{i}", [Point(k, k + i) for k in range(99)], i) for i in range(20)]),
    figure([1], [2], [1], [3], name="curve", smooth=True),
    figure(SLICES, [0.5] * 26, name="slices", x=Axis("x", names=SLICES), y=ACCURACY),
    figure([0] * 16 + [1] * 16, [*range(16)] * 2, name="heads", joined=False),
]
