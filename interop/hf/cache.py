"""Cache for `generate` of Hugging Face whose layers hold states of mixers instead of keys and values."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...blocks import Block
from ...mixers import Paradigm, SequenceMixer
from ...mixers.base.state import select
from ...mixers.base.traits import require_state
from ...registry import SeqmixError
from .padding import RowLayout, mix_rows

CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in arguments and outputs of a model; it depends on the installed release of transformers."""


CAN_CROP = hasattr(Cache, "activate_past_recording")
"""True if transformers announces that it will remove tokens from a cache; older releases refuse assisted decoding."""
MAX_RECORDED = 256
"""Maximum number of tokens of one segment that can be removed again."""
MAX_READ_AGAIN = 16
"""Maximum number of tokens that are read again together with the next segment, rather than by a call of their own."""


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
        self.record_past = False
        """True if tokens will be removed again, as in assisted decoding. Set by `activate_past_recording`."""
        self._checkpoint: tuple[Any, int] = (None, 0)
        """State and capacity before the recorded tokens."""
        self._recorded: Tensor | None = None
        """Inputs of the tokens after the checkpoint, [B M D]."""
        self._is_cropped = False
        """True if the recorded tokens are final as soon as another segment is read."""
        self._unread: Tensor | None = None
        """Inputs of tokens that count, although the state does not include them: the next segment begins with them."""

    def reserve(self, mixer: SequenceMixer[Any] | Block, batch_size: int, length: int) -> Any:
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

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the number of keys including the query tokens, and their offset 0; masks of other layers need both."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(self.capacity)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._recorded is not None or self._unread is not None:
            raise SeqmixError(
                "rows of a cache cannot be selected while assisted decoding may remove tokens: crop first"
            )
        if self.state is not None:
            self.state = select(self.state, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def activate_past_recording(self, **_: Any) -> None:
        """Keep what `crop` needs, from the next call on; every further call is expected to be followed by a `crop`."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    def crop(self, tokens: int) -> None:
        """Remove the last -`tokens` tokens: the state before the recorded tokens comes back, and those that remain are
        read again by the next call.

        Raises:
            SeqmixError: the tokens were not recorded.
        """
        if tokens == 0 and not self.record_past:
            return
        recorded = 0 if self._recorded is None else self._recorded.shape[1]
        if tokens > 0 or not self.record_past or -tokens > recorded:
            raise SeqmixError(
                f"crop expects 0 to {-recorded} tokens, the ones since activate_past_recording and the last crop, got "
                f"{tokens}: earlier tokens cannot be removed from a state"
            )
        self._is_cropped = True
        if tokens < 0 and self._recorded is not None:
            self.state, self.capacity = self._checkpoint
            self.length += tokens
            self._recorded = self._recorded[:, :tokens]
            self._unread = self._recorded if -tokens < recorded else None

    def take_unread(self) -> Tensor | None:
        """Return the inputs that the next segment begins with, and forget them."""
        unread, self._unread = self._unread, None
        return unread

    def record(self, x: Tensor, *, restart: bool) -> None:
        """Record the inputs of a segment that is read next; with `restart`, forget the earlier ones."""
        if restart or self._is_cropped or self._recorded is None:
            self._is_cropped = False
            self._checkpoint = self.state, self.capacity
            self._recorded = x
        else:
            self._recorded = torch.cat((self._recorded, x), dim=1)

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
    mixers: Sequence[SequenceMixer[Any] | Block],
    layers: Sequence[Any],
    rows: RowLayout,
) -> Tensor:
    """Mix a batch, starting from the states in a cache, and store the states after the batch in the cache.

    Args:
        run: a function of a segment without padding, a state per mixer, a paradigm per mixer, `cu_seqlens` and
            `return_state`, which returns the output and the states after the segment.
        x: the batch, [B T D].
        mixers: the mixers, or the blocks that contain them.
        layers: the cache layer of each mixer.
        rows: padding and packed documents of the batch.

    Returns:
        The output [B T D].

    Raises:
        SeqmixError: documents are packed.
    """
    if rows.cu_seqlens is not None:
        raise SeqmixError("packed documents cannot fill a cache: set use_cache=False")
    unread, *_ = [layer.take_unread() for layer in layers]  # all layers have the same
    records = layers[0].record_past
    if rows.mask is not None and (records or unread is not None):
        raise SeqmixError("assisted decoding expects a prompt without padding, got an attention_mask with zeros")
    skipped = 0
    if unread is not None and unread.shape[1] <= MAX_READ_AGAIN:
        skipped = unread.shape[1]
        x = torch.cat((unread, x), dim=1)
    elif unread is not None:
        _read(run, unread, mixers, layers, rows)
    if not records:
        return _read(run, x, mixers, layers, rows)[:, skipped:]
    # the first tokens of a long prompt are not recorded: no draft is as long as the rest
    parts = [x[:, :-MAX_RECORDED], x[:, -MAX_RECORDED:]] if x.shape[1] > MAX_RECORDED else [x]
    outputs = []
    for part in parts:
        for layer, mixer in zip(layers, mixers, strict=True):
            layer.reserve(mixer, len(x), layer.length + part.shape[1])
            layer.record(part, restart=part is not parts[-1] or len(parts) > 1)
        outputs.append(_read(run, part, mixers, layers, rows))
    return torch.cat(outputs, dim=1)[:, skipped:]


def _read(
    run: Callable[..., Any],
    x: Tensor,
    mixers: Sequence[SequenceMixer[Any] | Block],
    layers: Sequence[StateLayer],
    rows: RowLayout,
) -> Tensor:
    """Mix a segment from the states of the layers, and store the states after it; the arguments are `mix_cached`'s."""
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
