"""Loop over the mini-batches of a segment, for any layers in the state and any way to read a batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..runtime.call import Call
from .batches import grid

Layers = TypeVar("Layers", bound=tuple[Any, ...])
"""State of the memory's layers: a tuple of NamedTuples of tensors, batch first."""


class Slot(NamedTuple):
    """Tokens of one slot, heads before tokens."""

    inputs: tuple[Float[Tensor, "B H w _"], ...]
    """Inputs of the tokens; zeros in empty places."""
    place: Int[Tensor, "B w"]
    """Place of each token in its batch, from 0."""
    exists: Bool[Tensor, "B 1 w 1"]
    """False in empty places."""
    complete: Bool[Tensor, "B 1 1 1"]
    """True if the slot ends its batch."""


def read_batches(
    inputs: Sequence[Float[Tensor, "B T H _"]],
    batch: int,
    layers: Layers,
    position: Int[Tensor, " N"],
    call: Call,
    read: Callable[[Slot, Layers], tuple[Float[Tensor, "B H w D"], Layers]],
) -> tuple[Float[Tensor, "B T H D"], Layers | None]:
    """Read the slots of a segment one after another; return the outputs, and the final state if the call wants it.

    Args:
        inputs: inputs of the tokens, in any floating-point dtype; `read` gets them in that of the layers.
        batch: tokens of a mini-batch.
        layers: state before the segment.
        position: number of tokens before the segment.
        call: the call.
        read: the function that reads one slot: its outputs, and the state after it.
    """
    wide = layers[0][0].dtype
    batch_size, length = inputs[0].shape[:2]
    slots = grid(call, batch_size, length, batch, position)
    count, size = slots.token.shape[1:]
    index = slots.token.flatten(1).expand(batch_size, -1)[..., None, None]

    def by_slot(x: Tensor) -> tuple[Tensor, ...]:
        padded = F.pad(x.to(wide), (0, 0, 0, 0, 0, 1))  # an empty place takes the zeros after the last token
        x = padded.gather(1, index.expand(-1, -1, *x.shape[2:]))
        return x.unflatten(1, (count, size)).transpose(2, 3).unbind(1)

    tokens = zip(*map(by_slot, inputs), strict=True)
    places = slots.place.expand(batch_size, -1, -1).unbind(1)
    exist = (slots.token < length).expand(batch_size, -1, -1)[:, :, None, :, None].unbind(1)
    complete = slots.complete.expand(batch_size, -1)[..., None, None, None].unbind(1)
    state = layers if slots.document is None else _rows(layers, slots.document[:1])
    results, states = [], []
    for c, slot in enumerate(map(Slot, tokens, places, exist, complete)):
        if c > 0 and slots.document is not None and slots.first is not None:
            state = where(slots.first[c], _rows(layers, slots.document[c : c + 1]), state)
        output, state = read(slot, state)
        results.append(output)
        states.append(state)
    joined = torch.stack(results, dim=1).transpose(2, 3).flatten(1, 2)
    output = joined.gather(1, slots.slot[..., None, None].expand(-1, -1, *joined.shape[2:])).to(inputs[0].dtype)
    if not call.return_state:
        return output, None
    if slots.last is not None:
        ended = _rows(_map(lambda *leaves: torch.cat(leaves), *states), slots.last.clamp(min=0))
        state = where((slots.last >= 0)[:, None, None, None], ended, layers)
    return output, state


def padded_length(length: int, batch: int, context: int) -> int:
    """Count the places of a segment's slots in the chunkwise paradigm, for a segment after `context` tokens."""
    return -(-(length + (batch - 1 if context else 0)) // batch) * batch


def where(condition: Tensor, first: Layers, second: Layers) -> Layers:
    """Return the state whose rows are those of `first` if the condition is True, else those of `second`."""
    return _map(lambda x, y: torch.where(condition, x, y), first, second)


def _rows(layers: Layers, rows: Tensor) -> Layers:
    return _map(lambda x: x.index_select(0, rows), layers)


def _map(function: Callable[..., Tensor], *states: Layers) -> Layers:
    """Apply a function to each leaf of one or several states."""
    layers = [layer[0]._make(map(function, *layer)) for layer in zip(*states, strict=True)]
    return states[0].__class__(layers)
