"""Decoding: one token per step from a state, captured as a CUDA graph or compiled where that is faster."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers import Paradigm
from ..mixers.state import map_state, to_dict
from ..ops.runtime.custom_op import current
from ..ops.runtime.memo import Memo
from .compiling import compiled_for, rows_as_sums
from .language_model import LanguageModel, ModelState

STREAMED = 256
COMPILED_FROM = 8192
"""Tokens that are decoded before a step is compiled unasked, and tokens that must then be left. Compiling takes about
two seconds per layer on a CPU, which 3,000 to 5,000 tokens save again: with more than these left, it gains. The numbers
do not come from a clock, so that a text is a function of its seed."""


def compiled_after(max_new_tokens: int) -> int | None:
    """The token after which compiling the step pays; None where it does not."""
    return STREAMED if max_new_tokens - STREAMED >= COMPILED_FROM else None


class Decoder:
    """A model and its state after a prefix; every step decodes one more token per row.

    On a CUDA device a step with a state of fixed size is captured as a CUDA graph: tokens, state and logits then have
    static buffers, and a step is a single launch.

    Args:
        model: the model; its training mode is the caller's, and its parameters stay as they are from step to step.
        state: the state after the prefix, from `prefill` or `init_state`; donated: the decoder may write into it.
        compiled: whether to compile the step, all layers in one graph.
    """

    def __init__(self, model: LanguageModel, state: ModelState, *, compiled: bool = False) -> None:
        self.model = model
        self.state = state
        self._step = compiled_for(model, decode_step, backend=rows_as_sums) if compiled else decode_step
        self._captured: _Captured | None = None
        self._may_capture = model.device.type == "cuda"
        self._fixed_sizes = False
        # a graph has its constants
        self._memo = None if compiled else Memo()

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N vocab"]:
        """Logits of the next token of each row; they may overwrite those of the previous step."""
        step = partial(self._step, donate_state=True, memo=self._memo)
        if self._fixed_sizes and self._captured is None:
            held = Held(partial(step, self.model), tokens, self.state)
            with current(self.model.device):
                self._captured = _Captured(held)
            self.state = held.state
        if self._captured is not None:
            with current(self.model.device):
                return self._captured.replay(tokens)
        before = self.state
        logits, self.state = step(self.model, tokens, before)
        if self._may_capture:
            # the first step runs uncaptured and shows whether the state grows; only a second step makes sure that the
            # state has room for the calls of a capture
            sizes = [[leaf.shape for leaf in to_dict(state).values()] for state in (before, self.state)]
            self._may_capture = self._fixed_sizes = sizes[0] == sizes[1]
        return logits


def decode_step(
    model: LanguageModel,
    tokens: Int[Tensor, " N"],
    state: ModelState,
    *,
    donate_state: bool = False,
    memo: Memo | None = None,
) -> tuple[Float[Tensor, "N vocab"], ModelState]:
    """One token per row: logits and the next state; options as in `LanguageModel.forward`."""
    paradigms = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE, from_state=True)
    output = model(tokens[:, None], state, paradigm=paradigms, return_state=True, donate_state=donate_state, memo=memo)
    return output.logits[:, 0], output.state


class Held:
    """A step whose tokens, state and logits have static buffers: the state's are the tensors of the given one."""

    def __init__(self, step: Callable[..., tuple[Tensor, ModelState]], tokens: Tensor, state: ModelState) -> None:
        self._step = step
        self.tokens = tokens.clone()
        self.state = _apart(state)
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        """One step from the buffers into the buffers."""
        logits, after = self._step(self.tokens, self.state)
        for place, leaf in zip(to_dict(self.state).values(), to_dict(after).values(), strict=True):
            if place.data_ptr() != leaf.data_ptr():  # else it was written in place
                place.copy_(leaf)
        self.logits = logits if self.logits is None else self.logits.copy_(logits)

    def warm_up(self) -> None:
        """Some calls, each from the same state, which stays as it was: it may have room for only one token.

        It is kept in main memory: a second one may be more than a GPU has room for.
        """
        reached = map_state(lambda leaf: leaf.to("cpu", copy=True), self.state)
        for _ in range(3):
            self()
            for place, leaf in zip(to_dict(self.state).values(), to_dict(reached).values(), strict=True):
                place.copy_(leaf)


def _apart(state: ModelState) -> ModelState:
    """A state whose leaves can be written one after another: those that share memory are copied."""
    seen: set[int] = set()

    def own(leaf: Tensor) -> Tensor:
        place = leaf.untyped_storage().data_ptr()
        shared = place in seen or not leaf.is_contiguous()
        seen.add(place)
        return leaf.clone(memory_format=torch.contiguous_format) if shared else leaf

    return map_state(own, state)


class _Captured:
    """A held step as a CUDA graph."""

    def __init__(self, held: Held) -> None:
        self.held = held
        # compilers and libraries initialise in their first calls, which a capture does not allow
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            held.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            held()

    def replay(self, tokens: Tensor) -> Tensor:
        """One step; returns the buffer of the logits."""
        self.held.tokens.copy_(tokens)
        self.graph.replay()
        assert self.held.logits is not None
        return self.held.logits
