"""Replacement of the attention in Hugging Face decoders by seqmix mixers."""

import inspect
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...mixers import MIXERS, MixerConfig, SequenceMixer
from ...mixers.base.contract import build_mixer
from ...registry import SeqmixError, explain_fields
from .cache import CACHE_NAME, StateLayer, mix_cached
from .padding import RowLayout, layout_of, mix_rows

ROWS = "seqmix_rows"
"""Name of the argument by which a decoder passes padding and packed documents to its layers."""

_MIXER = TypeAdapter(Annotated[MixerConfig, MIXERS])


def replace_mixers(
    model: PreTrainedModel, config: MixerConfig | Mapping[str, Any], layers: Collection[int] | None = None
) -> PreTrainedModel:
    """Replace the attention of a decoder (`self_attn` of Llama, Mistral, Qwen and others) by new mixers, in place.

    The mixers are initialised from torch's global seed, count positions themselves and skip padding. The cache of the
    model holds their states.

    Args:
        model: the model.
        config: configuration of the mixer, or its fields: {"kind": "gla", "n_heads": 4}.
        layers: indices of the layers to replace, from 0; all when None.

    Returns:
        The same model.

    Raises:
        SeqmixError: the model has no attention in these layers, or the mixer does not fit the width of the model.
    """
    if not isinstance(model, nn.Module):
        raise SeqmixError(
            f"replace_mixers expects a model, as from AutoModelForCausalLM.from_pretrained, got {model!r:.100}"
        )
    decoder = _decoder_of(model)
    count = len(decoder.layers)
    if isinstance(layers, int):
        raise SeqmixError(f"layers expects a list, such as [{layers}], got {layers}")
    replaceable = [index for index, layer in enumerate(decoder.layers) if hasattr(layer, "self_attn")]
    indices = replaceable if layers is None else list(layers)
    if missing := [index for index in indices if index not in replaceable]:
        raise SeqmixError(
            f"{type(model).__name__} has no layer {missing[0]} with attention; layers with attention, counted from 0: "
            f"{', '.join(map(str, replaceable))}"
        )
    try:
        mixer = config if isinstance(config, MixerConfig) else _MIXER.validate_python(config)
    except ValidationError as error:
        raise SeqmixError(explain_fields(error, config, "the mixer")) from error
    if getattr(mixer, "value_residual", False):
        raise SeqmixError(
            f"value_residual of {mixer.kind} needs values of another layer, which the layers of "
            f"{type(model).__name__} do not pass on: leave it out"
        )
    for index in indices:
        attention = decoder.layers[index].self_attn
        weight = next(attention.parameters())
        replacement = build_mixer(mixer, model.config.get_text_config().hidden_size, layer_idx=index, n_layers=count)
        replacement = replacement.to(weight.device, weight.dtype)
        decoder.layers[index].self_attn = MixerAsAttention(replacement, index).train(attention.training)
    if not any(hook is _pass_rows for hook in decoder._forward_pre_hooks.values()):
        decoder.register_forward_pre_hook(_pass_rows, with_kwargs=True)
    # makes transformers before 5.25 reject assisted decoding; later ones ask the cache
    vars(model)["_is_stateful"] = True
    return model


class MixerAsAttention(nn.Module):
    """Mixer that stands in for the attention of layer `layer_idx` of a Hugging Face decoder."""

    def __init__(self, mixer: SequenceMixer[Any], layer_idx: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx
        self._resolved: tuple[torch.device, torch.dtype] | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Mix hidden states [B T D]; the second result, the attention weights, is None."""
        mixer = self.mixer
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if self._resolved != (device_and_dtype := (hidden_states.device, hidden_states.dtype)):
            mixer.resolve_backend(hidden_states.dtype)
            self._resolved = device_and_dtype

        def run(
            x: Tensor, states: Any, paradigms: Any, cu_seqlens: Tensor | None, return_state: bool
        ) -> tuple[Tensor, Any]:
            y, after = mixer(x, states[0], paradigm=paradigms[0], cu_seqlens=cu_seqlens, return_state=return_state)
            return y, (after,)

        rows = kwargs.get(ROWS, RowLayout())
        if cache is None:
            return mix_rows(
                lambda x, _, cu_seqlens: mixer(x, cu_seqlens=cu_seqlens), hidden_states, None, rows, [mixer]
            )
        return mix_cached(run, hidden_states, [mixer], [_state_layer(cache, self.layer_idx)], rows), None


def _decoder_of(model: nn.Module) -> Any:
    """Return the decoder of a model: the submodule whose `layers` have attention as `self_attn`.

    Raises:
        SeqmixError: no submodule has such layers.
    """
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and any(hasattr(layer, "self_attn") for layer in layers):
            return module
    raise SeqmixError(
        f"replace_mixers expects a decoder whose layers have attention as self_attn, got a {type(model).__name__}"
    )


def _pass_rows(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass padding and packed documents to the layers, because the decoder's mask [B 1 T S] does not have them."""
    arguments = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    tokens = arguments.get("input_ids")
    cache = arguments.get(CACHE_NAME)
    shape = (arguments["inputs_embeds"] if tokens is None else tokens).shape[:2]
    continues_cache = cache is not None and cache.get_seq_length() > 0
    rows = layout_of(shape, arguments.get("attention_mask"), arguments, continues_cache=continues_cache)
    return args, kwargs if rows == RowLayout() else {**kwargs, ROWS: rows}


def _state_layer(cache: Any, layer_idx: int) -> StateLayer:
    """Return the cache layer for the state of a mixer; the first call replaces the layer for keys and values by it.

    Raises:
        SeqmixError: the layer already holds keys and values.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, StateLayer):
        if layer.get_seq_length():
            raise SeqmixError(
                "the cache holds keys and values from before the mixers were replaced: start with a new cache"
            )
        layer = cache.layers[layer_idx] = StateLayer()
    return layer
