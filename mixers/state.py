"""What can be done with any state: nested tuples (NamedTuples) of tensors, batch first in every leaf; None has no leaf.

A model's state is a tuple with one opaque entry per layer, so everything here works on one layer and on a whole model.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .traits import ContractError

S = TypeVar("S", bound=tuple[Any, ...])
"""The type of a mixer's state."""


def map_state(function: Callable[[Tensor], Tensor], state: S) -> S:
    """A state with `function` applied to every tensor."""
    return _zip_map(lambda tensors: function(tensors[0]), (state,))


def detach(state: S) -> S:
    """Cut the state from the graph that made it: truncated backpropagation through time."""
    return map_state(Tensor.detach, state)


def clone(state: S) -> S:
    """A copy that stays valid when the original is donated."""
    return map_state(Tensor.clone, state)


def select(state: S, rows: Tensor) -> S:
    """The rows (sequences) of a state by index, in that order, repeated if asked: beams, splitting a batch."""
    return map_state(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), state)


def concatenate(states: list[S]) -> S:
    """One batch of states from several batches; their leaves must agree in all but the first dimension.

    Raises:
        ContractError: there are none, or they do not agree.
    """
    if not states:
        raise ContractError("there is no state to concatenate: at least one is needed")
    return _zip_map(_join, tuple(states))


def nbytes(state: tuple[Any, ...]) -> int:
    """Bytes of all leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in to_dict(state).values())


def to_dict(state: tuple[Any, ...]) -> dict[str, Tensor]:
    """All leaves by name ("0.memory"), contiguous, complex ones as pairs of real numbers, as safetensors takes them."""
    return {".".join(path): as_real(leaf).contiguous() for path, leaf in _leaves(state, ())}


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    # not a closure, which would refer to itself and so keep tensors until garbage is collected
    if isinstance(node, Tensor):
        yield path, node
        return
    for name, child in zip(_names(node), node, strict=True) if node is not None else ():
        yield from _leaves(child, (*path, name))


def from_dict(like: S, leaves: dict[str, Tensor]) -> S:
    """A state of the structure of `like` from the leaves that `to_dict` gave.

    Raises:
        ContractError: the names are not those of `like`.
    """
    expected = to_dict(like)
    if expected.keys() != leaves.keys():
        raise ContractError(
            f"the state needs the leaves {', '.join(expected) or 'none'}; given are {', '.join(leaves) or 'none'}"
        )
    return _filled(like, leaves, ())


def _filled(node: Any, leaves: dict[str, Tensor], path: tuple[str, ...]) -> Any:
    if isinstance(node, Tensor):
        leaf = leaves[".".join(path)]
        return torch.view_as_complex(leaf) if node.is_complex() and not leaf.is_complex() else leaf
    return _like(node, [_filled(child, leaves, (*path, name)) for name, child in zip(_names(node), node, strict=True)])


def is_inexact(x: Tensor) -> bool:
    """Whether its numbers are real or complex, so that they have gradients."""
    return x.is_floating_point() or x.is_complex()


def as_real(x: Tensor) -> Tensor:
    """The same numbers, a complex one as a pair of real ones in a last dimension."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _join(leaves: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(leaf.shape[1:]) for leaf in leaves})
    if len(shapes) > 1:
        found = " and ".join(map(str, shapes))
        raise ContractError(
            f"states in one batch differ in their rows alone, and these have leaves of {found} a row: "
            "give growing states equally many tokens, or begin each with init_state of one max_length"
        )
    return torch.cat(leaves)


def _zip_map(function: Callable[[list[Tensor]], Tensor], states: tuple[Any, ...]) -> Any:
    first = states[0]
    if isinstance(first, Tensor):
        return function(list(states))
    if all(state is None for state in states):
        return None
    if any(type(other) is not type(first) or len(other) != len(first) for other in states):
        kinds = " and ".join(sorted({f"{type(state).__name__} of {len(state)}" for state in states}))
        raise ContractError(f"states in one batch are of one kind, and these are {kinds}")
    return _like(first, [_zip_map(function, children) for children in zip(*states, strict=True)])


def _names(node: tuple[Any, ...]) -> tuple[str, ...]:
    return getattr(node, "_fields", tuple(str(i) for i in range(len(node))))


def _like(node: Any, children: list[Any]) -> Any:
    return tuple(children) if type(node) is tuple else type(node)._make(children)
