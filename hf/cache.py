"""The cache of Hugging Face's `generate`, whose layers hold states of mixers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..mixers import Paradigm, SequenceMixer
from ..mixers.state import select
from ..mixers.traits import require_state
from ..registry import SeqmixError
from .padding import Rows, mix_rows

NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this release of transformers calls the cache, in arguments and outputs."""


class StateLayer(CacheLayerMixin):
    """The state of one layer after all tokens so far.

    Args:
        max_length: the capacity in tokens, so that a KV cache is allocated once; more is allocated when needed.
    """

    is_sliding = False

    def __init__(self, max_length: int = 0) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0
        self.capacity = max_length

    def before(self, mixer: SequenceMixer[Any], rows: int, needed: int) -> Any:
        """The state of so many rows before a segment, with room for so many tokens in all."""
        require_state(mixer.traits, mixer.kind)
        if self.state is None:
            self.capacity = max(self.capacity, needed)
            self.state = mixer.init_state(rows, max_length=self.capacity)
        elif needed > self.capacity:
            self.capacity = needed + needed // 2  # a token is then copied a constant number of times on average
            self.state = mixer.resize_state(self.state, self.capacity)
        return self.state

    def get_seq_length(self, *_: Any) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys, as if it were attention: what the masks of other layers are made for."""
        return self.seen + (query if isinstance(query, int) else len(query)), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state = None
        self.seen = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = select(self.state, indices)

    reorder_cache = batch_select_indices

    def crop(self, *_: Any) -> None:
        raise SeqmixError("a recurrent state cannot take tokens back, as assisted decoding and crop() need")

    def update(self, *_: Any, **__: Any) -> Any:
        raise SeqmixError("this layer of the cache holds the state of a mixer, and was given keys and values")

    lazy_initialization = update


class SeqmixCache(Cache):
    """A cache for `SeqmixForCausalLM`: pass it from call to call, copy.deepcopy it to continue a prefix twice.

    Args:
        n_layers: layers of the model.
        max_length: as in `StateLayer`.
    """

    def __init__(self, n_layers: int, max_length: int = 0) -> None:
        super().__init__(layers=[StateLayer(max_length) for _ in range(n_layers)])


def mix_cached(
    run: Callable[..., Any], x: Tensor, mixers: Sequence[SequenceMixer[Any]], layers: Sequence[StateLayer], rows: Rows
) -> Tensor:
    """Mix a batch [B T D] from the states of a cache, which then holds those after it; returns the output [B T D].

    `run` takes a segment without padding, a state and a paradigm per mixer, `cu_seqlens` and `return_state`; each mixer
    has a layer of the cache.
    """
    if rows.cu_seqlens is not None:
        raise SeqmixError("packed documents leave no cache: give use_cache=False")
    # decoding is by one token; a longer segment is a prompt
    count, length, _ = x.shape
    order = (Paradigm.RECURRENT, Paradigm.CHUNKWISE) if length == 1 else (Paradigm.CHUNKWISE, Paradigm.PARALLEL)
    before = tuple(layer.before(mixer, count, layer.seen + length) for layer, mixer in zip(layers, mixers, strict=True))
    how = tuple(mixer.traits.prefer(*order, from_state=True) for mixer in mixers)
    y, after = mix_rows(lambda x, state, packed: run(x, state, how, packed, True), x, before, rows, mixers)
    for layer, state in zip(layers, after, strict=True):
        layer.state = state
        layer.seen = layer.seen + length
    return y
