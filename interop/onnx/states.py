"""The state of a model as named tensors: which of them an exported graph takes and returns, and how they begin."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...mixers import Paradigm
from ...mixers.base.state import from_dict, to_dict
from ...models import LanguageModel
from ...models.language_model import ModelState
from ...registry import SeqmixError


class Leaf(NamedTuple):
    """A tensor of the state, as an input and an output of the graph."""

    name: str
    """Name of the input, `state.LAYER.PATH`; the output is `new_` and this."""
    layer: int
    """Index of the layer."""
    shape: tuple[int | str, ...]
    """Shape; `batch`, and `past` for the tokens so far in a cache that grows, are symbolic."""
    dtype: torch.dtype
    initial: Tensor
    """Values of one row before the first token; of no dimension if all elements have the same."""


class StateLayout(NamedTuple):
    """Tensors of a model's state: which of them the graph takes, and how the others are made."""

    like: ModelState
    """A state, for its structure."""
    leaves: Mapping[str, Leaf]
    """Tensors that the graph takes and returns, by name in the state."""
    empty: Mapping[str, tuple[int | str, ...]]
    """Shapes of the tensors without elements, by name in the state: they are made inside the graph."""

    def build(self, tensors: Mapping[str, Tensor], batch: Any, past: Any) -> ModelState:
        """Return the state with these tensors, and the empty ones."""
        sizes = {"batch": batch, "past": past}
        every = {}
        for name, leaf in to_dict(self.like).items():
            if name in tensors:
                every[name] = tensors[name]
            else:  # not by new_zeros: an exporter would take sizes of the example
                shape = [size if isinstance(size, int) else sizes[size] for size in self.empty[name]]
                every[name] = torch.zeros(shape, dtype=leaf.dtype)
        return from_dict(self.like, every)


def layout_of(model: LanguageModel) -> StateLayout:
    """Return the layout of a model's state, found by comparing the states before and after a few tokens.

    Raises:
        SeqmixError: the rows of an initial state differ.
    """
    batch, length = 2, 3
    before = to_dict(model.init_state(batch))
    with torch.no_grad():
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
        after = model(tokens, model.init_state(batch), paradigm=recurrent_paradigms(model), return_state=True).state
    assert after is not None
    leaves = {}
    empty = {}
    for name, leaf in to_dict(after).items():
        layer = int(name.partition(".")[0])
        shape = ["batch", *leaf.shape[1:]]
        if before[name].shape != leaf.shape:
            shape[1] = "past"
        if leaf.numel() == 0:
            empty[name] = tuple(shape)
            continue
        row = before[name][0]
        if not torch.equal(before[name], row.expand_as(before[name])):
            kind = model.blocks[layer].mixer.kind
            raise SeqmixError(
                f"{kind} cannot be exported to ONNX: expected an initial state with equal rows, got {name} with others"
            )
        values = row.unique()
        initial = row if len(values) > 1 else values.sum()  # an empty cache has no values: 0
        leaves[name] = Leaf(f"state.{name}", layer, tuple(shape), leaf.dtype, initial)
    return StateLayout(after, leaves, empty)


def recurrent_paradigms(model: LanguageModel) -> tuple[Paradigm, ...]:
    """Return the paradigm of each layer in an exported graph: recurrent, if the layer declares it."""
    return model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE, from_state=True)
