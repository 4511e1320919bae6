"""Write what docs/how-to/multi-gpu.md and docs/appendix/estimates.md compute: `python docs/scaling.py`.

What context parallelism sends is counted in a layer of each tiny preset, on meta tensors. Memory, traffic and time of
the large model are those of `seqmix plan`.
"""

import math
from pathlib import Path

from seqmix import load_config
from seqmix.experiments.pages import fill, table
from seqmix.registry import write_file
from seqmix.training.distributed.layouts import Planner, received
from seqmix.training.presets import mixer_kind, single_kind_presets

CONTEXT = Path(__file__).with_name("how-to") / "multi-gpu.md"
ESTIMATES = Path(__file__).with_name("appendix") / "estimates.md"
PRESET, LENGTH, SEQUENCES = "retnet-6.7b", 2048, 4
"""What is trained, tokens of a sequence, and sequences that a GPU computes at once."""
LAYOUTS = (1, 8), (8, 8), (1, 64)
"""`distributed.data` and `distributed.shard`."""
TOKENS = 2**22
"""Of a step: the preset's own."""


def files() -> dict[Path, str]:
    """The pages, with what is computed."""
    return {
        CONTEXT: fill(CONTEXT, {"context": context_table()}),
        ESTIMATES: fill(ESTIMATES, {"estimates": estimates()}),
    }


def context_table() -> list[str]:
    """What a process receives for a sequence, with two of them, by mixer."""
    rows = []
    for config in single_kind_presets().values():
        kind = mixer_kind(config)
        short, long = (received(config.model, tokens, ranks=2) for tokens in (2**12, 2**20))
        grows = {"attention": "keys and values", "latent_attention": "latents"}.get(kind, "inputs")
        how = "states" if short == long else grows
        rows.append((f"`{kind}`", how, _size(short), _size(long)))
    return table(["mixer", "how segments meet", "4,096 tokens", "1,048,576 tokens"], rows)


def estimates() -> list[str]:
    """Memory, traffic and time of a step, by layout."""
    config = load_config(
        PRESET,
        [
            f"data.sequence_length={LENGTH}",
            f"training.batch_size={TOKENS // LENGTH}",
            "training.activation_checkpointing=true",
        ],
    )
    planner, rows = Planner(config, "h100"), []
    for data, shard in LAYOUTS:
        found = planner.layout(data=data, shard=shard, sequences=SEQUENCES)
        sent = _size(found.received) + (f" + {_size(found.copied)}" if found.copied else "")
        cells = [data * shard, f"`data: {data}, shard: {shard}`", found.grad_accum_steps, _size(found.memory), sent]
        rows.append([*cells, f"{found.computing:.1f} s", f"{found.sending:.1f} s"])
    heads = ["GPUs", "`distributed`", "`grad_accum_steps`", "memory", "received per micro-batch"]
    return table([*heads, "computing per step", "sending per step"], rows)


def _size(count: float) -> str:
    unit = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
