"""Our mixers in decoders of Hugging Face, in the place of attention."""

import inspect
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..mixers import MIXERS, MixerConfig, SequenceMixer
from ..registry import SeqmixError, explain_fields
from .cache import NAME, StateLayer, mix_cached
from .padding import Rows, mix_rows, rows_of

ROWS = "seqmix_rows"
"""The argument under which a decoder gives its layers padding and packed documents."""

_MIXER = TypeAdapter(Annotated[MixerConfig, MIXERS])


def replace_mixers(
    model: PreTrainedModel, config: MixerConfig | Mapping[str, Any], layers: Collection[int] | None = None
) -> PreTrainedModel:
    """Put new mixers where a decoder has attention (`self_attn` of Llama, Mistral, Qwen and their like), in place.

    The mixers are initialised by torch's global seed, and count positions themselves. The model's own cache holds their
    states; they skip padding.

    Args:
        model: the model.
        config: the mixer, or its fields: {"kind": "gla", "n_heads": 4}.
        layers: which layers, from 0; all when None.

    Returns:
        The model.

    Raises:
        SeqmixError: the model has no such layers, or not these, or the mixer does not fit its width.
    """
    if not isinstance(model, nn.Module):
        raise SeqmixError(
            f"replace_mixers takes a model, from AutoModelForCausalLM.from_pretrained, and was given {model!r:.100}"
        )
    decoder = _decoder_of(model)
    count = len(decoder.layers)
    if isinstance(layers, int):
        raise SeqmixError(f"layers needs a list, such as [{layers}], and was given {layers}")
    able = [index for index, layer in enumerate(decoder.layers) if hasattr(layer, "self_attn")]
    chosen = able if layers is None else list(layers)
    if wrong := [index for index in chosen if index not in able]:
        raise SeqmixError(
            f"{type(model).__name__} has no layer {wrong[0]} with attention; layers with attention, counted from 0: "
            f"{', '.join(map(str, able))}"
        )
    try:
        mixer = config if isinstance(config, MixerConfig) else _MIXER.validate_python(config)
    except ValidationError as error:
        raise SeqmixError(explain_fields(error, config, "the mixer")) from error
    for index in chosen:
        old = decoder.layers[index].self_attn
        like = next(old.parameters())
        new = mixer.build(model.config.get_text_config().hidden_size, layer_idx=index, n_layers=count)
        decoder.layers[index].self_attn = MixerAsAttention(new.to(like.device, like.dtype), index).train(old.training)
    if not any(hook is _give_rows for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_give_rows, with_kwargs=True)
    model._is_stateful = True  # so that assisted decoding is refused
    return model


class MixerAsAttention(nn.Module):
    """A mixer that is called as the attention of layer `layer_idx` of a decoder of Hugging Face."""

    def __init__(self, mixer: SequenceMixer[Any], layer_idx: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx
        self._resolved: tuple[torch.device, torch.dtype] | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Mix hidden states [B T D]; there are no attention weights to return."""
        mixer = self.mixer
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if self._resolved != (asked := (hidden_states.device, hidden_states.dtype)):
            mixer.resolve_backend(hidden_states.dtype)
            self._resolved = asked

        def run(x: Tensor, states: Any, how: Any, cu_seqlens: Tensor | None, return_state: bool) -> tuple[Tensor, Any]:
            y, after = mixer(x, states[0], paradigm=how[0], cu_seqlens=cu_seqlens, return_state=return_state)
            return y, (after,)

        rows = kwargs.get(ROWS, Rows())
        if cache is None:
            return mix_rows(lambda x, _, packed: mixer(x, cu_seqlens=packed), hidden_states, None, rows, [mixer])
        return mix_cached(run, hidden_states, [mixer], [_state_layer(cache, self.layer_idx)], rows), None


def _decoder_of(model: nn.Module) -> Any:
    """The module of a model whose `layers` have attention as `self_attn`."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and any(hasattr(layer, "self_attn") for layer in layers):
            return module
    raise SeqmixError(f"{type(model).__name__} has no decoder layers with attention as self_attn")


def _give_rows(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass a decoder's layers what its own mask of four dimensions does not tell."""
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    tokens = given.get("input_ids")
    cache = given.get(NAME)
    shape = (given["inputs_embeds"] if tokens is None else tokens).shape[:2]
    cached = cache is not None and cache.get_seq_length() > 0
    rows = rows_of(shape, given.get("attention_mask"), given, cached=cached)
    return args, kwargs if rows == Rows() else {**kwargs, ROWS: rows}


def _state_layer(cache: Any, layer_idx: int) -> StateLayer:
    """The layer of a cache that holds states; at the first call it takes the place of one for keys and values."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, StateLayer):
        if layer.get_seq_length():
            raise SeqmixError("the cache holds keys and values from before the mixers were replaced: begin a new one")
        layer = cache.layers[layer_idx] = StateLayer()
    return layer
