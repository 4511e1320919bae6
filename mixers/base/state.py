"""Operations on states: nested tuples (NamedTuples) of tensors, batch first in every leaf. None has no leaves.

A model's state is a tuple with one opaque entry per layer, so all functions work on one layer and on a whole model.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .traits import ContractError

S = TypeVar("S", bound=tuple[Any, ...])
"""Type variable of a mixer's state."""


def map_state(function: Callable[[Tensor], Tensor], state: S) -> S:
    """Return the state with `function` applied to every tensor."""
    return _zip_map(lambda tensors: function(tensors[0]), (state,))


def detach(state: S) -> S:
    """Return the state detached from its autograd graph, for truncated backpropagation through time."""
    return map_state(Tensor.detach, state)


def clone(state: S) -> S:
    """Return a copy of the state, which stays valid when a call overwrites the original (donation)."""
    return map_state(Tensor.clone, state)


def select(state: S, rows: Tensor) -> S:
    """Return the rows (sequences) with these indices [R], in this order; indices may repeat.

    Use it to reorder beams or to split a batch.
    """
    return map_state(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), state)


def concatenate(states: list[S]) -> S:
    """Join the states of several batches into one batch; leaves must agree in all but the first dimension.

    Raises:
        ContractError: the list is empty, or the states do not agree.
    """
    if not states:
        raise ContractError("concatenate expects at least one state, got none")
    return _zip_map(_join, tuple(states))


def where(rows: Tensor, first: S, second: S) -> S:
    """Return the state whose row n is that of `first` if rows[n] is True, else that of `second`.

    A leaf that both states share, such as the keys of a cache that a call has written in place, is not copied.

    Raises:
        ContractError: the states do not agree in structure or sizes.
    """
    return _zip_map(lambda leaves: _where(rows, *leaves), (first, second))


def _where(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    if first.shape != second.shape:
        raise ContractError(
            f"rows of two states need leaves of the same shape, got {list(first.shape)} and {list(second.shape)}: let "
            "growing states start from init_state with the same max_length"
        )
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride():
        return first
    return torch.where(rows.view(-1, *[1] * (first.ndim - 1)), first, second)


def nbytes(state: tuple[Any, ...]) -> int:
    """Return the size of a state in bytes, all leaves together."""
    return sum(leaf.numel() * leaf.element_size() for leaf in to_dict(state).values())


def to_dict(state: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the leaves of a state by name ("0.memory"), contiguous; complex ones as pairs of real numbers."""
    return {".".join(path): as_real(leaf).contiguous() for path, leaf in _leaves(state, ())}


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    # not a nested function: it would refer to itself, and so keep tensors alive until garbage collection
    if isinstance(node, Tensor):
        yield path, node
        return
    for name, child in zip(_names(node), node, strict=True) if node is not None else ():
        yield from _leaves(child, (*path, name))


def from_dict(like: S, leaves: dict[str, Tensor]) -> S:
    """Build a state with the structure of `like` from leaves that `to_dict` returned.

    Raises:
        ContractError: the names differ from those of `like`.
    """
    expected = to_dict(like)
    if expected.keys() != leaves.keys():
        raise ContractError(
            f"expected a state with leaves {', '.join(expected) or 'none'}, got {', '.join(leaves) or 'none'}"
        )
    return _fill(like, leaves, ())


def _fill(node: Any, leaves: dict[str, Tensor], path: tuple[str, ...]) -> Any:
    if isinstance(node, Tensor):
        leaf = leaves[".".join(path)]
        return torch.view_as_complex(leaf) if node.is_complex() and not leaf.is_complex() else leaf
    return _like(node, [_fill(child, leaves, (*path, name)) for name, child in zip(_names(node), node, strict=True)])


def is_inexact(x: Tensor) -> bool:
    """True if the dtype is real or complex, so that the tensor can have gradients."""
    return x.is_floating_point() or x.is_complex()


def as_real(x: Tensor) -> Tensor:
    """View a complex tensor as real, with a new last dimension of 2; return any other tensor unchanged."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _join(leaves: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(leaf.shape[1:]) for leaf in leaves})
    if len(shapes) > 1:
        row_shapes = " and ".join(map(str, shapes))
        raise ContractError(
            f"states in one batch must have leaves of the same shape per row, got {row_shapes}: "
            "let growing states read the same number of tokens, or start each from init_state with the same max_length"
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
        raise ContractError(f"states in one batch must have the same structure, got {kinds}")
    return _like(first, [_zip_map(function, children) for children in zip(*states, strict=True)])


def _names(node: tuple[Any, ...]) -> tuple[str, ...]:
    return getattr(node, "_fields", tuple(str(i) for i in range(len(node))))


def _like(node: Any, children: list[Any]) -> Any:
    return tuple(children) if type(node) is tuple else type(node)._make(children)
