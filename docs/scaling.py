"""Write what docs/how-to/multi-gpu.md and docs/appendix/estimates.md compute: `python docs/scaling.py`.

What context parallelism sends is counted in a layer of each tiny preset, on meta tensors. Memory, traffic and time of
the large model follow from `seqmix.account` by the formulas of the page.
"""

import math
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from seqmix import account, load_config
from seqmix.experiments.pages import fill, table
from seqmix.models import ModelConfig, build_meta
from seqmix.ops.context_parallel import ContextParallel
from seqmix.registry import write_file
from seqmix.training.presets import mixer_kind, single_kind_presets

CONTEXT = Path(__file__).with_name("how-to") / "multi-gpu.md"
ESTIMATES = Path(__file__).with_name("appendix") / "estimates.md"
PRESET, LENGTH, SEQUENCES = "retnet-6.7b", 2048, 4
"""What is trained, tokens of a sequence, and sequences that a GPU computes at once."""
LAYOUTS = (1, 8), (8, 8), (1, 64)
"""`distributed.data` and `distributed.shard`."""
TOKENS = 2**22
"""Of a step: the preset's own."""
RATE = 0.4 * 989e12
"""Operations a second of an H100 in bfloat16: the share that is assumed of what its data sheet has."""
INSIDE, BETWEEN = 300e9, 40e9
"""Bytes a second that a GPU is assumed to get from the 8 of its machine, and from other machines."""


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


def received(config: ModelConfig, tokens: int, *, ranks: int) -> int:
    """Bytes that a model's first layer receives for a sequence of so many tokens, forward and backward."""
    counted = []

    def gather(_: ContextParallel, x: Tensor) -> Tensor:
        """Count what is gathered, and what of it comes back as gradients, in place of sending it."""
        counted.append((1 + x.is_floating_point()) * (ranks - 1) * x.nbytes)
        return x.expand(ranks, *x.shape)

    mixer = build_meta(config).blocks[0].mixer
    mixer.cp_group = ContextParallel("", rank=ranks - 1, size=ranks)
    with mock.patch.object(ContextParallel, "gather", gather):
        mixer(torch.empty(1, tokens // ranks, config.d_model, device="meta"))
    return sum(counted)


def estimates() -> list[str]:
    """Memory, traffic and time of a step, by layout."""
    model = load_config(PRESET).model
    cost, narrow = account(model, length=LENGTH), account(model, length=LENGTH, dtype=torch.bfloat16)
    # of two blocks, and of embedding and output projection with their gradients
    gathered = 4 * (2 * max(layer.parameters for layer in cost.layers) + 2 * cost.embedding_parameters)
    # the blocks' inputs, and what is inside of the one that is recomputed
    kept = 4 * model.d_model * LENGTH * len(cost.layers) + max(layer.activation_bytes for layer in narrow.layers)
    logits = 2 * 4 * 2**24
    rows = []
    for data, shard in LAYOUTS:
        gpus = data * shard
        parts = TOKENS // (gpus * SEQUENCES * LENGTH)
        # parameters, gradients and two moments in pieces
        memory = 16 * cost.parameters / shard + gathered + SEQUENCES * kept + logits
        # parameters are gathered twice and gradients scattered once, in float32; pieces are added up over copies
        pieces = 3 * 4 * cost.parameters * (shard - 1) / shard
        copies = 2 * 4 * cost.parameters / shard * (data - 1) / data
        # forward, once more, and twice that backward
        computing = 4 * cost.flops_per_token * TOKENS / (gpus * RATE)
        sending = parts * (pieces / (INSIDE if shard <= 8 else BETWEEN) + copies / BETWEEN)
        sent = _size(pieces) + (f" + {_size(copies)}" if copies else "")
        cells = [gpus, f"`data: {data}, shard: {shard}`", parts, _size(memory), sent]
        rows.append([*cells, f"{computing:.1f} s", f"{sending:.1f} s"])
    heads = ["GPUs", "`distributed`", "`grad_accum_steps`", "memory", "received per micro-batch"]
    return table([*heads, "computing per step", "sending per step"], rows)


def _size(count: float) -> str:
    unit = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
