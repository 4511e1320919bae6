"""What goes into a layer and what comes out: one value down from model to block to mixer, and one value back."""

from typing import Any, Generic, NamedTuple, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from ...ops.runtime.memo import Memo
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError, choices_hint
from .state import S


class LayerCall(NamedTuple):
    """Everything that a layer is called with besides the vectors; a model passes it to its blocks, they to the mixers.

    With a `cp_group`, everything is that of the whole row; the vectors alone are those of this rank's segment.
    """

    state: Any = None
    """State before the segment, B rows (N rows with `cu_seqlens`); None if no tokens came before."""
    paradigm: Paradigm | None = None
    """The algorithm; the mixer's configured one when None. It is never guessed from T."""
    cu_seqlens: Int[Tensor, "N+1"] | None = None
    """Boundaries of N documents packed into one row (B = 1): document n is tokens cu_seqlens[n] to cu_seqlens[n+1] - 1.
    Empty documents are allowed."""
    return_state: bool = False
    """True to return the state after the segment."""
    donate_state: bool = False
    """True if the next state may be written over `state`, which the caller does not need again; ignored under grad."""
    first_values: Float[Tensor, "B T C"] | None = None
    """Values of the model's first layer of this kind, for the same tokens (value residual)."""
    token_values: Float[Tensor, "B T C"] | None = None
    """Vectors of the tokens that are added to the values (value embeddings)."""
    shared_kv: Any = None
    """Keys and values that an earlier layer returned for the same tokens, with the same states."""
    return_values: bool = False
    """True to return the mixer's values, for later layers."""
    return_kv: bool = False
    """True to return the mixer's keys and values, for later layers."""
    return_loss: bool = False
    """True to return the loss of a mixer with the trait `auxiliary_loss`."""
    memo: Memo | None = None
    """Cache of results that are equal in several layers, such as rotation angles; only for eager calls without
    gradients."""


PLAIN_CALL = LayerCall()
"""Call of a layer on a whole sequence, from which nothing but the output is wanted."""


class MixResult(NamedTuple, Generic[S]):
    """Result of a layer."""

    y: Float[Tensor, "B T D"]
    """Output of the mixer; that of a block is the residual stream, which may be no tensor."""
    state: S | None
    """State after the segment; None unless requested."""
    values: Float[Tensor, "B T C"] | None = None
    """Values, for later layers; None unless requested."""
    kv: Any = None
    """Keys and values, for later layers; None unless requested."""
    loss: Float[Tensor, ""] | None = None
    """Auxiliary loss, summed over the tokens; None unless requested, or if the mixer has none."""


Mixed: TypeAlias = tuple[Float[Tensor, "B T D"], S | None] | MixResult[S]
"""What `SequenceMixer.mix` may return: (y, state), or more."""


def unknown_option(kind: str, name: str) -> SeqmixError:
    """Return the error of a keyword that a mixer does not take, which says where it belongs."""
    if name == "losses":
        remedy = ": pass call=LayerCall(return_loss=True), and read the loss of the result"
    elif name in LayerCall._fields:
        remedy = f": it is a field of LayerCall, pass call=LayerCall({name}=...)"
    else:
        remedy = choices_hint(name, ("paradigm", "cu_seqlens", "return_state", "call"), "arguments")
    return SeqmixError(f"{kind} has no argument {name!r}{remedy}")
