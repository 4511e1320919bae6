"""Prefill: prompts are read all tokens at once, or in segments where they are many.

Prompts of different lengths are packed into one row and come out as a batch of states, so nothing is padded, and no
result depends on its neighbours.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers import Paradigm
from ..mixers.state import concatenate, select
from ..registry import SeqmixError
from .compiling import compiled_for
from .decoding import decode_step
from .language_model import LanguageModel, ModelState

SEGMENT = 8192
"""Tokens that are read at once, where no state grows with them: prefill needs the memory of these, however many there
are. A state that grows needs more than they do, and segments after it would need masks that one does not."""


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompts: Sequence[Int[Tensor, " T"]],
    *,
    state: ModelState | None = None,
    max_length: int | None = None,
    compiled: bool = False,
) -> tuple[Float[Tensor, "N vocab"], ModelState]:
    """Read prompts; the logits of each one's next token, and their states as one batch.

    Args:
        model: the model.
        prompts: N prompts of any lengths >= 1.
        state: what came before, N rows, which may be written into; None means nothing.
        max_length: tokens that a row will hold at most, prompt included; lets caches be allocated once. A state that is
            given has its room already.
        compiled: whether prefill is compiled, for all lengths together, by itself: neither the graphs of training nor
            those of decoding are used. It takes seconds per layer, which many prompts on a GPU may be worth; on a CPU
            it gains nothing, since almost all the time is matrix products.

    Raises:
        SeqmixError: there is no prompt, or an empty one; or a state grows, and prefill is to be compiled.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise SeqmixError("a prompt has no tokens: give at least one")
    if state is not None and all(len(prompt) == 1 for prompt in prompts):
        return decode_step(model, torch.cat(list(prompts)).to(model.device), state)
    traits = [block.mixer.traits for block in model.blocks]
    if len(prompts) > 1 and not all(mixer.packing for mixer in traits):
        index = torch.arange(len(prompts), device=model.device).split(1)
        rows = [None if state is None else select(state, row) for row in index]
        alone = [
            prefill(model, [prompt], state=row, max_length=max_length, compiled=compiled)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        return torch.cat([logits for logits, _ in alone]), concatenate([state for _, state in alone])
    ends = list(accumulate(len(prompt) for prompt in prompts))
    tokens, boundaries = torch.cat(list(prompts)).to(model.device)[None], torch.tensor([0, *ends], device=model.device)
    constant = all(mixer.state == "constant" for mixer in traits)
    if compiled and not constant:
        raise SeqmixError("prefill is compiled for all lengths where no state grows, and a layer's here does")
    size = SEGMENT if constant else ends[-1]
    if state is None and max_length is not None:
        state = model.init_state(len(prompts), max_length=max_length)
    logits = []
    for start in range(0, ends[-1], size):
        stop = min(start + size, ends[-1])
        wanted = torch.tensor([end - 1 - start for end in ends if start < end <= stop], device=model.device).long()
        documents = boundaries.clamp(start, stop) - start if len(prompts) > 1 else None
        segment = compiled_prefill(model) if compiled else prefill_segment
        # prompts have any length, and blocks may have been compiled for those of training
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            found, state = segment(model, tokens[:, start:stop], state, documents, wanted)
        logits.append(found)
    assert state is not None
    return torch.cat(logits), state


def prefill_segment(
    model: LanguageModel, tokens: Tensor, state: ModelState | None, cu_seqlens: Tensor | None, wanted: Tensor
) -> tuple[Tensor, ModelState | None]:
    """One segment [B T]: the logits of the tokens that are selected, and the state after it."""
    paradigms = model.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL)
    output = model(tokens, state, paradigm=paradigms, cu_seqlens=cu_seqlens, return_state=True, select=wanted)
    return output.logits, output.state


def compiled_prefill(model: LanguageModel) -> Callable[..., tuple[Tensor, ModelState]]:
    """`prefill_segment` as one graph of all layers, for any T."""
    return compiled_for(model, prefill_segment, dynamic=True)
