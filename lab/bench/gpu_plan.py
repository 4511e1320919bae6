"""The parts of `seqmix bench-gpu`, most important first, so that a run that ends early has the figures that matter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...mixers import MIXERS
from ...mixers.base.state import nbytes
from ...models import build_meta
from ...ops.runtime.kernel import Probe, all_kernels
from .models import model_to_measure
from .peers import PEERS, Size

GROUPS = {
    "kernels": "Kernels against the definitions of their ops, on the GPU",
    "headline": "The op: 8 sequences of 4,096 tokens at width 2,048",
    "decode-largest": "Decoding at 6.7B parameters after 8,192 tokens, as many sequences as fit",
    "paper-decode": "The paper's Figure 6: decoding at 6.7B parameters, eight sequences after 8,192 tokens",
    "paper-train": "The paper's Table 4: training at 1.3B parameters and 8,192 tokens",
    "op": "The op over lengths, at the paper's head size",
    "recurrence": "Recurrences of every op family",
    "mixers": "Training of every mixer's tiny preset",
    "train": "Training, 200M parameters",
    "decode": "Decoding, 200M parameters",
    "prefill": "Prefill, 200M parameters",
    "paper-train-checkpointed": "The paper's Table 4 with activation checkpointing",
    "references": "References against the definitions of their ops, on the GPU",
    "conformance": "The conformance kit on the GPU",
}
"""Titles of the groups of parts, by name, in the order in which they run."""

HEADS = {"K256-V512": (8, 2.0), "K128-V128": (16, 1.0), "K64-V64": (32, 1.0)}
"""Number of heads and `expand_v` by key and value width per head, at d_model 2,048; the RetNet paper's come first."""
CONTEXT = 8192
ROOM = 2**31
"""Bytes of GPU memory reserved for activations, workspaces of libraries and memory fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command of `seqmix` that runs in its own process."""

    group: str
    name: str
    command: tuple[str, ...]
    """Arguments of `seqmix`."""
    skipped: str | None = None
    """Reason why the part is skipped; None if it runs."""

    @property
    def measures(self) -> bool:
        """True if the part is a benchmark, which writes a report."""
        return self.command[0] == "bench"


def plan(memory: int, *, rehearsal: bool = False) -> Iterator[Part]:
    """Yield all parts for a GPU with `memory` bytes.

    A rehearsal has every kind of part at toy sizes, on a CPU and in Triton's interpreter: it finds misspelt options.
    """
    device = torch.device("cpu" if rehearsal else "cuda")
    where = ("--device", str(device))
    brief = ("--quick",) if rehearsal else ()
    checks: dict[bool, list[Part]] = {True: [], False: []}
    for name, kernel in all_kernels().items():
        least = Probe(device=device, dtype=torch.float32 if rehearsal else torch.bfloat16, key_width=64, value_width=64)
        reasons = "" if kernel.reference else "; ".join(kernel.unsupported(least))
        group = "references" if kernel.reference else "kernels"
        part = Part(group=group, name=name, command=("check", name, *where, *brief), skipped=reasons or None)
        checks[kernel.reference].append(part)
    # first the checks that kernels are correct: without them, figures mean nothing
    yield from checks[False][:1] if rehearsal else sorted(checks[False], key=lambda part: part.skipped is not None)
    yield from _timed_parts(memory, where, rehearsal)
    yield from checks[True][: 1 if rehearsal else None]
    for kind in list(MIXERS.kinds())[: 1 if rehearsal else None]:
        yield Part(group="conformance", name=kind, command=("check", kind, *where, *brief))


def _timed_parts(memory: int, where: tuple[str, ...], rehearsal: bool) -> Iterator[Part]:
    """Yield the parts that are benchmarks."""
    dtype = "float32" if rehearsal else "bfloat16"
    common = (*where, "--dtype", dtype, "--limit", "30")
    tiny = ("model.d_model=64", "model.n_layers=2", "model.vocab_size=257") if rehearsal else ()

    def words(*lengths: int, batch: int | None = None) -> tuple[str, ...]:
        """Return the options for lengths and batch; small values in a rehearsal, since the interpreter is slow."""
        options = [word for length in lengths for word in ("--length", str(8 if rehearsal else length))]
        return (*options, *(() if batch is None else ("--batch", str(1 if rehearsal else batch))))

    for name, (heads, expand) in HEADS.items():
        n_heads = heads // 4 if rehearsal else heads
        shape = f"model.blocks.ret.mixer={{kind: retention, n_heads: {n_heads}, expand_v: {expand}}}"
        only = [word for one in ("chunkwise", "triton", "fla", "sdpa", "copy") for word in ("--only", one)]
        command = ("bench", "op", "retnet-1.3b", shape, *tiny, *words(4096, batch=8), *only, *common)
        yield Part(group="headline", name=name, command=command)
    for kind in ("seqmix", "llama"):
        batch = _largest_batch(kind, memory)
        command = ("decode", "retnet-6.7b", *tiny, *words(CONTEXT, batch=max(1, batch)), *common)
        yield from _paper_parts("decode-largest", command, 2, memory, rehearsal, only=kind)
    train = ("train", "retnet-1.3b", *tiny, *words(8192), "--tokens", "8" if rehearsal else "8192", *common)
    decode = ("decode", "retnet-6.7b", *tiny, *words(2048, CONTEXT, batch=8), *common)
    yield from _paper_parts("paper-decode", decode, 2, memory, rehearsal)
    yield from _paper_parts("paper-train", train, 16, memory, rehearsal)
    # a small vocabulary, so that all implementations fit into memory together
    model = ("retnet-200m", *(tiny or ("model.vocab_size=8192",)))
    longer = words(2048, 8192, 32768)
    for group, options in (
        ("op", ("retnet-1.3b", *tiny, *words(2048, 8192, 32768, batch=2))),
        ("recurrence", (*words(2048), "--only", "chunkwise")),
        ("mixers", (*words(2048), "--tokens", "8" if rehearsal else "16384")),
        ("train", (*model, *words(2048, 8192, 16384), "--tokens", "8" if rehearsal else "16384", "--compile")),
        ("decode", (*model, *longer, *words(batch=8), "--compile")),
        ("prefill", (*model, *longer, "--compile")),
    ):
        # a rehearsal need not compile: it takes half a minute on a CPU and checks no further options
        allowed = tuple(word for word in options if not (rehearsal and word == "--compile"))
        yield Part(group=group, name=group, command=("bench", group, *allowed, *common))
    yield from _paper_parts("paper-train-checkpointed", (*train, "--activation-checkpointing"), 16, memory, rehearsal)


def _largest_batch(kind: str, memory: int) -> int:
    """Return how many sequences' states (a Transformer's KV caches) fit beside the weights, both in bfloat16."""
    config = model_to_measure("retnet-6.7b", ())
    state = nbytes(build_meta(config).init_state(1, max_length=CONTEXT))
    if kind != "seqmix":
        state = 2 * 2 * config.n_layers * config.d_model * CONTEXT
    return (memory - ROOM - 2 * Size(config).parameters) // state


def _paper_parts(
    group: str, words: Sequence[str], bytes_each: int, memory: int, rehearsal: bool, only: str | None = None
) -> Iterator[Part]:
    """Yield one part per peer: two models of this size do not fit into memory together.

    `words` are the arguments of `seqmix bench`; `bytes_each` is the bytes per parameter that the benchmark allocates,
    with gradients and optimizer if it trains.
    """
    benchmark, preset = words[:2]
    size = Size(model_to_measure(preset, ()))
    needed = size.parameters * bytes_each
    gib = 2**30
    device = torch.device("cpu" if rehearsal else "cuda")
    # a rehearsal needs only one peer: the options of the others are the same
    wanted = (only or "seqmix",) if rehearsal else (only,) if only else [kind.name for kind in PEERS]
    for kind in (kind for kind in PEERS if kind.name in wanted and kind.name != "by-hand"):
        reason = kind.unavailable_reason(size, device)
        if reason is None and needed > memory and not rehearsal:
            reason = f"parameters alone take {needed / gib:,.0f} GiB, but the GPU has {memory / gib:,.0f} GiB"
        names = [kind.name] if benchmark in kind.roles else []
        names += [f"{kind.name}-compiled"] if benchmark in kind.compiled_roles and not rehearsal else []
        for name in names:
            one = ("--only", name) if rehearsal else ("--compile", "--only", name)
            yield Part(group=group, name=name, command=("bench", *words, *one), skipped=reason)
