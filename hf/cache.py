"""Cache for `generate` of Hugging Face whose layers hold states of mixers instead of keys and values."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..mixers import Paradigm, SequenceMixer
from ..mixers.state import select
from ..mixers.traits import require_state
from ..registry import SeqmixError
from .padding import RowLayout, mix_rows

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in arguments and outputs of a model; it depends on the installed release of transformers."""


class StateLayer(CacheLayerMixin):
    """Cache layer that holds the state of one mixer after all tokens so far.

    Args:
        max_length: capacity in tokens, so that a KV cache is allocated once; it grows when more is needed.
    """

    is_sliding = False

    def __init__(self, max_length: int = 0) -> None:
        super().__init__()
        self.state: Any = None
        self.length = 0
        self.capacity = max_length

    def reserve(self, mixer: SequenceMixer[Any], batch_size: int, length: int) -> Any:
        """Allocate or enlarge the state for `length` tokens, including the next segment, and return the state."""
        require_state(mixer.traits, mixer.kind)
        if self.state is None:
            self.capacity = max(self.capacity, length)
            self.state = mixer.init_state(batch_size, max_length=self.capacity)
        elif length > self.capacity:
            self.capacity = length + length // 2  # geometric growth: amortised constant cost per token
            self.state = mixer.resize_state(self.state, self.capacity)
        return self.state

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens so far, including padding."""
        return self.length

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Return the number of keys including the query tokens, and their offset 0; masks of other layers need both."""
        return self.length + (query if isinstance(query, int) else len(query)), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state = None
        self.length = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = select(self.state, indices)

    reorder_cache = batch_select_indices

    def crop(self, *_: Any) -> None:
        raise SeqmixError(
            "crop() and assisted decoding are not supported: tokens cannot be removed from a recurrent state"
        )

    def update(self, *_: Any, **__: Any) -> Any:
        raise SeqmixError("this cache layer expects the state of a mixer, got keys and values: start with a new cache")

    lazy_initialization = update


class SeqmixCache(Cache):
    """Cache for `SeqmixForCausalLM`. Pass it from call to call; to continue a prefix twice, copy it with copy.deepcopy.

    Args:
        n_layers: number of layers of the model.
        max_length: capacity in tokens, so that KV caches are allocated once; they grow when more is needed.
    """

    def __init__(self, n_layers: int, max_length: int = 0) -> None:
        super().__init__(layers=[StateLayer(max_length) for _ in range(n_layers)])


def mix_cached(
    run: Callable[..., Any],
    x: Tensor,
    mixers: Sequence[SequenceMixer[Any]],
    layers: Sequence[StateLayer],
    rows: RowLayout,
) -> Tensor:
    """Mix a batch, starting from the states in a cache, and store the states after the batch in the cache.

    Args:
        run: a function of a segment without padding, a state per mixer, a paradigm per mixer, `cu_seqlens` and
            `return_state`, which returns the output and the states after the segment.
        x: the batch, [B T D].
        mixers: the mixers.
        layers: the cache layer of each mixer.
        rows: padding and packed documents of the batch.

    Returns:
        The output [B T D].

    Raises:
        SeqmixError: documents are packed.
    """
    if rows.cu_seqlens is not None:
        raise SeqmixError("packed documents cannot fill a cache: set use_cache=False")
    # a segment of one token is a decoding step, a longer one is a prompt
    count, length, _ = x.shape
    order = (Paradigm.RECURRENT, Paradigm.CHUNKWISE) if length == 1 else (Paradigm.CHUNKWISE, Paradigm.PARALLEL)
    before = tuple(
        layer.reserve(mixer, count, layer.length + length) for layer, mixer in zip(layers, mixers, strict=True)
    )
    paradigms = tuple(mixer.traits.prefer(*order, from_state=True) for mixer in mixers)
    y, after = mix_rows(lambda x, state, packed: run(x, state, paradigms, packed, True), x, before, rows, mixers)
    for layer, state in zip(layers, after, strict=True):
        layer.state = state
        layer.length = layer.length + length
    return y
