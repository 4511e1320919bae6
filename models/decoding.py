"""Decoding: one token per step from a state, captured as a CUDA graph or compiled where that is faster."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..mixers import Paradigm
from ..mixers.base.state import map_state, to_dict
from ..ops.runtime.custom_op import current
from ..ops.runtime.memo import Memo
from .compiling import compiled_for, rows_as_sums
from .language_model import LanguageModel, ModelState

TOKENS_BEFORE_COMPILING = 256
"""Number of tokens that are generated before the decode step may be compiled."""
COMPILE_SECONDS_PER_LAYER = 15.0
"""CPU time that compiling the decode step takes per layer: 6 to 13 s were measured with an empty compiler cache (4 to
12 layers, retention and hybrids), and up to twice as much where the state grows."""
SAVED_SECONDS_PER_LAYER = 0.4e-3
"""Time that a compiled step saves per token and layer, as fewer operations are dispatched: .3 to 1 ms were measured."""
SAVED_SECONDS_PER_WEIGHT = 0.2e-9
"""Time that a compiled step of one row saves per weight of a linear layer, which it reads at a higher rate: .15 to
.4 ns were measured. With several rows, eager steps read weights at that rate too."""


def compiled_after(model: LanguageModel, rows: int, max_new_tokens: int) -> int | None:
    """Return the number of tokens after which the decode step of a model is compiled; None for never.

    A step is compiled if that takes less time than the remaining tokens save. Both times are estimates from sizes and
    not measured here, because compiled steps round differently: a text must be a function of its seed. On a GPU, where
    a step is captured as a CUDA graph, nothing is compiled.

    Args:
        model: the model.
        rows: number of texts.
        max_new_tokens: maximum number of tokens per text.
    """
    if model.device.type != "cpu" or not all(block.mixer.traits.compiles for block in model.blocks):
        return None
    saved = SAVED_SECONDS_PER_LAYER * len(model.blocks)
    if rows == 1:
        weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        saved += SAVED_SECONDS_PER_WEIGHT * weights
    tokens = max_new_tokens - TOKENS_BEFORE_COMPILING
    return TOKENS_BEFORE_COMPILING if tokens * saved >= COMPILE_SECONDS_PER_LAYER * len(model.blocks) else None


class Decoder:
    """A decoder: a model and its state after a prefix. Every step decodes one more token per row.

    On a CUDA device, a step whose state has a fixed size is captured as a CUDA graph: tokens, state and logits then
    have static buffers, and a step is a single launch.

    Args:
        model: the model. The caller sets its training mode, and must not change its parameters between steps.
        state: the state after the prefix, from `prefill` or `init_state`; donated: the decoder may write into it.
        compiled: True to compile the step, all layers in one graph.
    """

    def __init__(self, model: LanguageModel, state: ModelState, *, compiled: bool = False) -> None:
        self.model = model
        self.state = state
        self._step = compiled_for(model, decode_step, backend=rows_as_sums) if compiled else decode_step
        self._captured: _CapturedStep | None = None
        self._may_capture = model.device.type == "cuda"
        self._has_fixed_sizes = False
        # a compiled graph holds its own constants
        self._memo = None if compiled else Memo()

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N vocab"]:
        """Decode one token per row; return the logits of the next one. A later step may overwrite these logits."""
        step = partial(self._step, donate_state=True, memo=self._memo)
        if self._has_fixed_sizes and self._captured is None:
            static = StaticStep(partial(step, self.model), tokens, self.state)
            with current(self.model.device):
                self._captured = _CapturedStep(static)
            self.state = static.state
        if self._captured is not None:
            with current(self.model.device):
                return self._captured.replay(tokens)
        before = self.state
        logits, self.state = step(self.model, tokens, before)
        if self._may_capture:
            # the first step runs uncaptured and shows whether the state grows; the capture waits for a second step,
            # which shows that the state has room for another token
            sizes = [[leaf.shape for leaf in to_dict(state).values()] for state in (before, self.state)]
            self._may_capture = self._has_fixed_sizes = sizes[0] == sizes[1]
        return logits


def decode_step(
    model: LanguageModel,
    tokens: Int[Tensor, " N"],
    state: ModelState,
    *,
    donate_state: bool = False,
    memo: Memo | None = None,
) -> tuple[Float[Tensor, "N vocab"], ModelState]:
    """Decode one token per row; return the logits of the next token and the next state.

    `donate_state` and `memo` are those of `LanguageModel.forward`.
    """
    paradigms = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE, from_state=True)
    output = model(tokens[:, None], state, paradigm=paradigms, return_state=True, donate_state=donate_state, memo=memo)
    return output.logits[:, 0], output.state


class StaticStep:
    """A decode step that reads tokens and state from fixed buffers, and writes the next state and the logits into them.

    The buffers of the state are the tensors of the given state.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ModelState]], tokens: Tensor, state: ModelState) -> None:
        self._step = step
        self.tokens = tokens.clone()
        self.state = _without_shared_memory(state)
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        """Run one step: read tokens and state from the buffers, write the next state and the logits into them."""
        logits, after = self._step(self.tokens, self.state)
        for buffer, leaf in zip(to_dict(self.state).values(), to_dict(after).values(), strict=True):
            if buffer.data_ptr() != leaf.data_ptr():  # the step may have written in place
                buffer.copy_(leaf)
        self.logits = logits if self.logits is None else self.logits.copy_(logits)

    def warm_up(self) -> None:
        """Run a few steps, restoring the state after each because it may have room for only one more token.

        The first calls initialise compilers and libraries, which must not happen in a capture. The state is copied to
        main memory, because a GPU may not have room for a second state.
        """
        before = map_state(lambda leaf: leaf.to("cpu", copy=True), self.state)
        for _ in range(3):
            self()
            for buffer, leaf in zip(to_dict(self.state).values(), to_dict(before).values(), strict=True):
                buffer.copy_(leaf)


def _without_shared_memory(state: ModelState) -> ModelState:
    """Return a state in which writing one leaf changes no other: leaves that share memory are copied."""
    seen: set[int] = set()

    def unshare(leaf: Tensor) -> Tensor:
        address = leaf.untyped_storage().data_ptr()
        shares_memory = address in seen or not leaf.is_contiguous()
        seen.add(address)
        return leaf.clone(memory_format=torch.contiguous_format) if shares_memory else leaf

    return map_state(unshare, state)


class _CapturedStep:
    """A `StaticStep` captured as a CUDA graph."""

    def __init__(self, step: StaticStep) -> None:
        self.step = step
        # compilers and libraries initialise in their first calls, which a capture does not allow
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def replay(self, tokens: Tensor) -> Tensor:
        """Decode one token per row; return the buffer of the next token's logits, which the next call overwrites."""
        self.step.tokens.copy_(tokens)
        self.graph.replay()
        assert self.step.logits is not None
        return self.step.logits
