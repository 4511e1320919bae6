"""Write the table of decoding times in docs/how-to/onnx.md: `OMP_NUM_THREADS=1 python docs/onnx_speed.py`.

Greedy decoding of one text by torch and by ONNX Runtime, from the same random weights. Times are CPU time of one
thread; the implementations take turns, and a ratio is the median over the rounds.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch

from seqmix import build_model, load_config
from seqmix.deploy.graph import build_graph
from seqmix.deploy.metadata import add_metadata
from seqmix.deploy.quantize import quantize
from seqmix.deploy.session import OnnxModel
from seqmix.deploy.states import layout_of
from seqmix.experiments.pages import fill, table
from seqmix.models import Decoder, LanguageModel
from seqmix.registry import write_file

TARGET = Path(__file__).with_name("how-to") / "onnx.md"
SIZES = {"retnet-tiny": [], "attention-tiny": [], "retnet-tiny, width 512": ["model.d_model=512", "model.n_layers=6"]}
CONTEXT, TOKENS, ROUNDS = 256, 64, 7


def torch_run(model: LanguageModel, compiled: bool) -> Callable[[], None]:
    """Return a function that decodes with torch, after a context."""
    with torch.no_grad():
        after = model(torch.zeros(1, CONTEXT, dtype=torch.int64), return_state=True).state
    room = model.resize_state(after, CONTEXT + TOKENS)

    def run() -> None:
        decoder = Decoder(model, tuple(type(s)(*(x.clone() for x in s)) for s in room), compiled=compiled)
        token = torch.tensor([1])
        for _ in range(TOKENS):
            token = decoder.step(token).argmax(-1)

    return run


def onnx_run(graph: onnx.ModelProto) -> Callable[[], None]:
    """Return a function that decodes with ONNX Runtime, after a context."""
    model = OnnxModel.from_bytes(graph.SerializeToString())
    _, before = model(np.zeros((1, CONTEXT), dtype=np.int64), model.init_state(1))

    def run() -> None:
        token, state = np.ones((1, 1), dtype=np.int64), before
        for _ in range(TOKENS):
            logits, state = model(token, state)
            token = logits.argmax(-1)

    return run


def row(name: str) -> list[str]:
    """Measure one model; return its row of the table."""
    model = build_model(load_config(name.partition(",")[0], SIZES[name]).model).eval()
    layout = layout_of(model)
    graph = build_graph(model, layout)
    add_metadata(graph, model, layout, name=name)
    content = graph.SerializeToString()
    runs = {"eager": torch_run(model, False), "compiled": torch_run(model, True), "float32": onnx_run(graph)}
    runs |= {weights: onnx_run(quantize(onnx.load_from_string(content), weights)) for weights in ("int8", "int4")}
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(ROUNDS + 1):  # the first round compiles and warms up
        for kind, run in runs.items():
            start = time.process_time()
            run()
            if number:
                seconds[kind].append(time.process_time() - start)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ratios = [
        statistics.median(x / eager for x, eager in zip(each, seconds["eager"], strict=True))
        for each in seconds.values()
    ]
    milliseconds = 1e3 * statistics.median(seconds["eager"]) / TOKENS
    return [f"`{name}`", f"{millions:.1f}M", f"{milliseconds:.2f} ms", *(f"{ratio:.2f}" for ratio in ratios[1:])]


if __name__ == "__main__":
    torch.set_num_threads(1)
    head = ["model", "parameters:", "torch:", "torch, compiled:", "ONNX Runtime:", "int8:", "int4:"]
    rows = []
    for name in SIZES:
        rows.append(row(name))
        print(rows[-1], flush=True)  # noqa: T201
    write_file(fill(TARGET, {"speed": table(head, rows)}), TARGET)
