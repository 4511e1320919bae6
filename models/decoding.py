"""One token after another: a model, the state it has reached, and the quickest way from one token to the next."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers import Paradigm
from ..mixers.state import clone, to_dict
from ..ops.donation import donate_state
from .compiling import compiled_for, rows_as_sums
from .language_model import LanguageModel, ModelState

COMPILED_FROM = 4096
"""Tokens from which on compiling pays on a CPU: it costs about two seconds a layer, and saves some 1.4 ms a token and
layer at width 512, less where layers are narrow."""


class Decoder:
    """A model after some tokens; every step reads one more of each row.

    On a CUDA device a step is captured as one graph, if its state has a fixed size: the tokens, the state and the
    logits then have fixed places, and a step is a single launch.

    Args:
        model: the model; its training mode is the caller's.
        state: what it has read, from `prefill` or `init_state`; the decoder's from now on, which may write into it.
        compiled: whether the step is compiled as a whole, all layers in one graph.
    """

    def __init__(self, model: LanguageModel, state: ModelState, *, compiled: bool = False) -> None:
        self.model, self.state = model, state
        self._step = compiled_for(model, decode_step, backend=rows_as_sums) if compiled else decode_step
        self._captured: _Captured | None = None
        self._may_capture = model.device.type == "cuda"
        self._fixed_sizes = False

    @torch.no_grad()
    @donate_state()
    def step(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N vocab"]:
        """Logits of the next token of each row; those of the step before may be overwritten."""
        if self._fixed_sizes and self._captured is None:
            held = Held(partial(self._step, self.model), tokens, self.state)
            self._captured, self.state = _Captured(held), held.state
        if self._captured is not None:
            return self._captured.replay(tokens)
        before = self.state
        logits, self.state = self._step(self.model, tokens, before)
        if self._may_capture:
            # the first step goes the plain way, and shows whether the state grows; after it there may be no room left
            # for a capture's calls, which a second step is sure to have
            sizes = [[leaf.shape for leaf in to_dict(state).values()] for state in (before, self.state)]
            self._may_capture = self._fixed_sizes = sizes[0] == sizes[1]
        return logits


def decode_step(
    model: LanguageModel, tokens: Int[Tensor, " N"], state: ModelState
) -> tuple[Float[Tensor, "N vocab"], ModelState]:
    """One token a row, in plain operations."""
    paradigms = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE)
    output = model(tokens[:, None], state, paradigm=paradigms, return_state=True)
    return output.logits[:, 0], output.state


class Held:
    """A step whose tokens, state and logits have fixed places."""

    def __init__(self, step: Callable[..., tuple[Tensor, ModelState]], tokens: Tensor, state: ModelState) -> None:
        self._step = step
        self.tokens, self.state = tokens.clone(), clone(state)
        self.logits: Tensor | None = None

    def __call__(self) -> None:
        """One step from what the places hold, into them."""
        logits, after = self._step(self.tokens, self.state)
        for place, leaf in zip(to_dict(self.state).values(), to_dict(after).values(), strict=True):
            if place.data_ptr() != leaf.data_ptr():  # what could be written in place has been
                place.copy_(leaf)
        self.logits = logits if self.logits is None else self.logits.copy_(logits)

    def warm_up(self) -> None:
        """Some calls that leave the state as it was, each from there: it may have room for one token alone."""
        reached = clone(self.state)
        for _ in range(3):
            self()
            for place, leaf in zip(to_dict(self.state).values(), to_dict(reached).values(), strict=True):
                place.copy_(leaf)


class _Captured:
    """A held step as a CUDA graph."""

    def __init__(self, held: Held) -> None:
        self.held = held
        # compilers and libraries set themselves up in the first calls, which a capture does not allow
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            held.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            held()

    def replay(self, tokens: Tensor) -> Tensor:
        """One step; the logits' place."""
        self.held.tokens.copy_(tokens)
        self.graph.replay()
        assert self.held.logits is not None
        return self.held.logits
