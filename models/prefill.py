"""Prefill: prompts are processed in one pass, or in segments if they are long.

Prompts of different lengths are packed into one row (varlen), without padding. The result is a batch of states, and the
prompts do not affect each other.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers import Paradigm
from ..mixers.base.state import concatenate, select
from ..registry import SeqmixError
from .compiling import compiled_for
from .decoding import decode_step
from .language_model import LanguageModel, ModelState

SEGMENT = 8192
"""Number of tokens per segment if all states have a constant size, which bounds the memory of prefill.
Prompts of a model with a growing state (a KV cache) are processed in a single pass: the cache needs more memory than
segments would save, and later segments would need masks."""


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompts: Sequence[Int[Tensor, " T"]],
    *,
    state: ModelState | None = None,
    max_length: int | None = None,
    compiled: bool = False,
) -> tuple[Float[Tensor, "N vocab"], ModelState]:
    """Process N prompts; return the logits of each prompt's next token, and the states after the prompts as one batch.

    Args:
        model: the model.
        prompts: N prompts of any lengths >= 1.
        state: the state after a prefix, with N rows; donated: it may be overwritten. None for no prefix.
        max_length: the capacity of the state in tokens per row, prompt included, so that a KV cache is allocated once;
            ignored if `state` is given.
        compiled: True to compile prefill: one graph for all lengths, separate from the graphs of training and decoding.
            Compiling takes seconds per layer, which pays for many prompts on a GPU. On a CPU, where almost all the time
            is spent in matrix products, it does not pay.

    Raises:
        SeqmixError: `prompts` is empty, a prompt is empty, or `compiled` is True and a state grows.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise SeqmixError("prefill expects at least one prompt, each of at least one token")
    if state is not None and all(len(prompt) == 1 for prompt in prompts):
        return decode_step(model, torch.cat(list(prompts)).to(model.device), state)
    traits = [block.mixer.traits for block in model.blocks]
    if len(prompts) > 1 and not all(mixer.packing for mixer in traits):
        index = torch.arange(len(prompts), device=model.device).split(1)
        rows = [None if state is None else select(state, row) for row in index]
        results = [
            prefill(model, [prompt], state=row, max_length=max_length, compiled=compiled)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        return torch.cat([logits for logits, _ in results]), concatenate([state for _, state in results])
    ends = list(accumulate(len(prompt) for prompt in prompts))
    tokens = torch.cat(list(prompts)).to(model.device)[None]
    boundaries = torch.tensor([0, *ends], device=model.device)
    has_constant_size = all(mixer.state == "constant" for mixer in traits)
    if compiled and not has_constant_size:
        raise SeqmixError(
            "compiled prefill needs states of constant size, got a layer whose state grows: set compiled=False"
        )
    size = SEGMENT if has_constant_size else ends[-1]
    if state is None and max_length is not None:
        state = model.init_state(len(prompts), max_length=max_length)
    logits = []
    for start in range(0, ends[-1], size):
        stop = min(start + size, ends[-1])
        wanted = torch.tensor([end - 1 - start for end in ends if start < end <= stop], device=model.device).long()
        documents = boundaries.clamp(start, stop) - start if len(prompts) > 1 else None
        segment = compiled_prefill(model) if compiled else prefill_segment
        # blocks compiled for the length of training would be recompiled for the prompts' lengths
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            ends_logits, state = segment(model, tokens[:, start:stop], state, documents, wanted)
        logits.append(ends_logits)
    assert state is not None
    return torch.cat(logits), state


def prefill_segment(
    model: LanguageModel, tokens: Tensor, state: ModelState | None, cu_seqlens: Tensor | None, wanted: Tensor
) -> tuple[Tensor, ModelState | None]:
    """Process one segment [B T]; return the logits of the tokens whose indices are `wanted`, and the next state."""
    paradigms = model.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL, from_state=state is not None)
    output = model(tokens, state, paradigm=paradigms, cu_seqlens=cu_seqlens, return_state=True, select=wanted)
    return output.logits, output.state


def compiled_prefill(model: LanguageModel) -> Callable[..., tuple[Tensor, ModelState]]:
    """Return `prefill_segment`, compiled as one graph of all layers for any T."""
    return compiled_for(model, prefill_segment, dynamic=True)
