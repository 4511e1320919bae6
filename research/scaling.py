"""Write the computed tables of docs/how-to/multi-gpu.md and docs/appendix/estimates.md: `python research/scaling.py`.

The traffic of context parallelism is counted in one layer of each tiny preset, on meta tensors. Memory, traffic and
time of the large model are the estimates of `seqmix plan`.
"""

import math
from pathlib import Path

from seqmix import load_config
from seqmix.lab.markdown import fill, table
from seqmix.models.builder import build_meta
from seqmix.registry import write_file
from seqmix.research import DOCS
from seqmix.training.distributed.layouts import Planner, received
from seqmix.training.presets import mixer_kind, single_kind_presets

CONTEXT = DOCS / "how-to" / "multi-gpu.md"
ESTIMATES = DOCS / "appendix" / "estimates.md"
PRESET = "retnet-6.7b"
"""Preset of the large model."""
LENGTH = 2048
"""Sequence length of the large model in tokens."""
SEQUENCES = 4
"""Sequences per micro-batch of a GPU."""
LAYOUTS = (1, 8), (8, 8), (1, 64)
"""Values of `distributed.data` and `distributed.shard`."""
TOKENS = 2**22
"""Tokens per step, as in the preset."""


def files() -> dict[Path, str]:
    """Return the text of both pages with their computed tables."""
    return {
        CONTEXT: fill(CONTEXT, {"context": context_table()}),
        ESTIMATES: fill(ESTIMATES, {"estimates": estimates()}),
    }


def context_table() -> list[str]:
    """Return the table of the bytes that one of two processes receives for a sequence, by mixer."""
    rows = []
    for config in single_kind_presets().values():
        kind = mixer_kind(config)
        mixer = build_meta(config.model).blocks[0].mixer
        if mixer.traits.state == "growing" and not mixer.supports_context_parallel:
            rows.append((f"`{kind}`", "not supported", "", ""))
            continue
        short, long = (received(config.model, tokens, ranks=2) for tokens in (2**12, 2**20))
        growing = {"attention": "keys and values", "latent_attention": "latents"}.get(kind, "inputs")
        exchanged = (
            growing
            if short != long
            else "states"
            if mixer.supports_context_parallel
            else "states, one rank after another"
        )
        rows.append((f"`{kind}`", exchanged, _size(short), _size(long)))
    return table(["mixer", "exchanged", "4,096 tokens", "1,048,576 tokens"], rows)


def estimates() -> list[str]:
    """Return the table of memory, traffic and time of a step, by layout."""
    config = load_config(
        PRESET,
        [
            f"data.sequence_length={LENGTH}",
            f"training.batch_size={TOKENS // LENGTH}",
            "training.activation_checkpointing=true",
        ],
    )
    planner = Planner(config, "h100")
    rows = []
    for data, shard in LAYOUTS:
        layout = planner.layout(data=data, shard=shard, sequences=SEQUENCES)
        traffic = _size(layout.received) + (f" + {_size(layout.copied)}" if layout.copied else "")
        cells = [data * shard, f"`data: {data}, shard: {shard}`", layout.grad_accum_steps, _size(layout.memory)]
        rows.append([*cells, traffic, f"{layout.computing:.1f} s", f"{layout.sending:.1f} s"])
    heads = ["GPUs", "`distributed`", "`grad_accum_steps`", "memory", "received per micro-batch"]
    return table([*heads, "computation per step", "communication per step"], rows)


def _size(count: float) -> str:
    """Format a number of bytes with a binary unit."""
    unit = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
