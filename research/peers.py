"""Write the table of layers of other packages in docs/explanation/performance.md: `python research/peers.py`.

Each layer, or function of fla, does the work of a mixer of seqmix: forward and backward of one sequence, in float32
on one CPU thread. Both take turns; times are CPU times. A package that is not installed, or that fails, is left out of
the table, with the reason on standard error.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmix import MIXERS, Paradigm
from seqmix.lab.markdown import fill, table
from seqmix.ops.decay import decay
from seqmix.ops.delta import delta
from seqmix.registry import write_file
from seqmix.research import DOCS

TARGET = DOCS / "explanation" / "performance.md"
D, T, ROUNDS = 256, 1024, 3
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def ours(kind: str, **fields: Any) -> nn.Module:
    """Return a layer of seqmix."""
    config = MIXERS.resolve(kind)
    layer = config(**config.example_fields() | fields).build(D, layer_idx=0, n_layers=1)
    layer.resolve_backend(torch.float32)
    return layer


def layers(theirs: nn.Module, mixer: nn.Module, *arguments: Any) -> Pair:
    """Return the calls of two layers on the same sequence."""
    x = torch.randn(1, T, D, requires_grad=True)

    def output(layer: nn.Module, *arguments: Any) -> Tensor:
        y = layer(x, *arguments)
        return y[0] if isinstance(y, tuple) else y

    return partial(output, theirs, *arguments), partial(output, mixer)


def mambapy() -> Pair:
    """Mamba by a parallel scan in torch."""
    from mambapy.mamba import MambaBlock, MambaConfig

    return layers(MambaBlock(MambaConfig(d_model=D, n_layers=1)), ours("mamba"))


def min_gru() -> Pair:
    """The layer of minGRU-pytorch."""
    from minGRU_pytorch import minGRU

    return layers(minGRU(D, proj_out=True), ours("min_gru"))


def xlstm() -> Pair:
    """The layer of xlstm, parallel over all pairs of tokens."""
    from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

    theirs = mLSTMLayer(mLSTMLayerConfig(embedding_dim=D, context_length=T, num_heads=4, proj_factor=1.0))
    return layers(theirs, ours("mlstm", n_heads=4))


def transformers_mamba() -> Pair:
    """Mamba of transformers, without CUDA kernels."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return layers(MambaMixer(MambaConfig(hidden_size=D, state_size=16), 0), ours("mamba"))


def transformers_mamba2() -> Pair:
    """Mamba-2 of transformers, without CUDA kernels."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(hidden_size=D, num_heads=8, head_dim=64, expand=2, n_groups=1, state_size=64)
    return layers(Mamba2Mixer(config, 0), ours("mamba2", head_dim=64, d_state=64))


def transformers_gated_delta_net() -> Pair:
    """Gated DeltaNet of Qwen3-Next in transformers, with its chunks in torch."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 4}
    config = Qwen3NextConfig(hidden_size=D, linear_key_head_dim=64, linear_value_head_dim=128, **heads)
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):  # not fla's kernels, which need a GPU
        setattr(module, name, unwrap(getattr(module, name)))
    return layers(module.Qwen3NextGatedDeltaNet(config, 0), ours("gated_delta_net", n_heads=4))


def transformers_rwkv() -> Pair:
    """RWKV-4 of transformers, without CUDA kernels."""
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    return layers(RwkvSelfAttention(RwkvConfig(hidden_size=D, attention_hidden_size=D), 0), ours("rwkv4"))


def naive(op: str) -> Any:
    """Return a module of fla's naive functions, without importing fla, which needs a GPU."""
    spec = find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("fla is not installed")
    file = Path(spec.submodule_search_locations[0]) / "ops" / op / "naive.py"
    loader = spec_from_file_location(f"fla_{op}", file)
    assert loader is not None
    assert loader.loader is not None
    module = module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


def inputs(*widths: int) -> list[Tensor]:
    """Return a tensor [1 T 4 width] for each width; 0 for one without a last dimension."""
    return [torch.randn(1, T, 4, *([width] if width else []), requires_grad=True) for width in widths]


def fla_gated_delta_rule() -> Pair:
    """The gated delta rule by fla's chunks in torch."""
    q, k, v, gate, strength = inputs(64, 64, 64, 0, 0)
    theirs = naive("gated_delta_rule").naive_chunk_gated_delta_rule

    def arguments() -> tuple[Tensor, ...]:
        return q, F.normalize(k, dim=-1), v, F.logsigmoid(gate), strength.sigmoid()

    def call() -> Tensor:
        q, k, v, g, beta = arguments()
        return theirs(q, k, v, g, beta)[0]

    def call_ours() -> Tensor:
        q, k, v, g, beta = arguments()
        return delta(q, k, v, beta, g, paradigm=Paradigm.CHUNKWISE, backend="native")[0]

    return call, call_ours


def fla_gla() -> Pair:
    """Gated linear attention by fla's loop over tokens."""
    q, k, v, gate = inputs(64, 64, 64, 64)
    theirs = naive("gla").naive_recurrent_gla
    return (
        lambda: theirs(q, k, v, F.logsigmoid(gate) / 16)[0],
        lambda: decay(q, k, v, F.logsigmoid(gate) / 16, paradigm=Paradigm.CHUNKWISE, backend="native")[0],
    )


PEERS: dict[str, tuple[str, Callable[[], Pair]]] = {
    "mambapy, MambaBlock": ("mamba", mambapy),
    "minGRU-pytorch, minGRU": ("min_gru", min_gru),
    "xlstm, mLSTMLayer": ("mlstm", xlstm),
    "transformers, MambaMixer": ("mamba", transformers_mamba),
    "transformers, Mamba2Mixer": ("mamba2", transformers_mamba2),
    "transformers, Qwen3NextGatedDeltaNet": ("gated_delta_net", transformers_gated_delta_net),
    "transformers, RwkvSelfAttention": ("rwkv4", transformers_rwkv),
    "fla, naive_chunk_gated_delta_rule": ("op delta", fla_gated_delta_rule),
    "fla, naive_recurrent_gla": ("op decay", fla_gla),
}
"""Layers and functions by name, each with the mixer or op of seqmix that does the same."""


def seconds(call: Callable[[], Tensor]) -> float:
    """Return the CPU time of a forward and a backward pass."""
    start = time.process_time()
    call().sum().backward()
    return time.process_time() - start


def rows() -> Iterator[list[str]]:
    """Measure every pair that can run; yield its row of the table."""
    for name, (mixer, build) in PEERS.items():
        try:
            torch.manual_seed(0)
            pair = build()
            for call in pair:
                seconds(call)  # warms up
        except Exception as error:  # other packages may raise anything
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
            continue
        times = [[seconds(call) for call in pair] for _ in range(ROUNDS)]
        theirs, own = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratios = sorted(a / b for a, b in times)
        yield [name, f"`{mixer}`", f"{theirs:,.0f}", f"{own:,.0f}", f"{statistics.median(ratios):.1f}",
               f"{ratios[0]:.1f} - {ratios[-1]:.1f}"]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = []
    for line in rows():
        lines.append(line)
        print(*line, flush=True)  # noqa: T201
    head = ["other", "seqmix", "other, ms:", "seqmix, ms:", "ratio:", "from - to:"]
    write_file(fill(TARGET, {"peers": table(head, lines)}), TARGET)
