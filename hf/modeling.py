"""Models of Hugging Face around a `LanguageModel`: training, and `generate` with a cache of states."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..mixers import Paradigm
from ..models import IGNORED, LanguageModel
from ..models.onednn_linear import use_onednn_linear
from ..registry import SeqmixError
from .cache import NAME, SeqmixCache, the_cache
from .configuration import SeqmixConfig
from .padding import Rows, mix_rows, rows_of


class SeqmixPreTrainedModel(PreTrainedModel):
    """What the models share.

    Args:
        config: the configuration.
        model: the model to wrap, whose parameters are shared; None to build and initialise one.
    """

    config_class = SeqmixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules: ClassVar = ["Block"]

    def __init__(self, config: SeqmixConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        if model is None:
            model = LanguageModel(config.model_config)
            model.reset_parameters()
            use_onednn_linear(model)
        self.model = model
        self.gradient_checkpointing = False
        self._resolved: tuple[torch.device, torch.dtype] | None = None
        # by name of every copy the name that is saved: tied embeddings, and blocks that share their parameters
        self._tied_weights_keys = _duplicates(self)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does.

        Raises:
            SeqmixError: a tensor is missing, has another shape, or is none of the model's.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what in ("missing", "unexpected", "mismatched"):
            if wrong := sorted(map(str, info[f"{what}_keys"])):
                raise SeqmixError(f"the file of weights has {what} tensors: {', '.join(wrong)}")
        model.restore_buffers()
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Initialise the buffers that are not saved."""
        for block in self.model.distinct_blocks:
            if any(module._non_persistent_buffers_set for module in block.modules()):
                saved = {name: tensor.clone() for name, tensor in block.state_dict().items()}
                with torch.random.fork_rng():
                    block.reset_parameters()
                block.load_state_dict(saved)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the constructor initialises, and a file of weights is complete."""

    def get_expanded_tied_weights_keys(self, *_: Any, **__: Any) -> dict[str, str]:
        """The names of copied parameters, each with the saved one's."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return {copy: saved for copy, saved in self._tied_weights_keys.items() if copy in parameters}

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output projection."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the output projection."""
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        raise SeqmixError("the vocabulary is fixed by the configuration: build a model of another vocab_size")

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, every_n_layers: int = 1, **__: Any) -> None:
        if every_n_layers != 1:
            raise SeqmixError("activation checkpointing is of every block: every_n_layers is 1")
        self.gradient_checkpointing = self.model.activation_checkpointing = enable

    def _hidden(
        self, x: Tensor, rows: Rows, cache: SeqmixCache | None, use_cache: bool | None
    ) -> tuple[Tensor, SeqmixCache | None]:
        """The residual stream after the last block from that before the first [B T D], and the cache."""
        model, traits = self.model, [block.mixer.traits for block in self.model.blocks]
        packing = all(mixer.packing for mixer in traits)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and rows.cu_seqlens is None
            use_cache = use_cache and all(mixer.has_state for mixer in traits)
        if cache is None and use_cache:
            cache = SeqmixCache(len(traits))
        if cache is None:
            return mix_rows(
                lambda x, _, packed: model.run_blocks(x, None, None, packed), x, None, rows, packing=packing
            )
        if rows.cu_seqlens is not None:
            raise SeqmixError("packed documents leave no cache: give use_cache=False")
        # decoding is by one token; a longer segment is a prompt
        count, length, _ = x.shape
        order = (Paradigm.RECURRENT, Paradigm.CHUNKWISE) if length == 1 else (Paradigm.CHUNKWISE, Paradigm.PARALLEL)
        how = model.prefer(*order, from_state=True)
        layers = list(zip(model.blocks, cache.layers, strict=True))
        state = tuple(layer.before(block.mixer, count, length) for block, layer in layers)
        x, after = mix_rows(
            lambda x, before, packed: model.run_blocks(x, before, how, packed, True), x, state, rows, packing=packing
        )
        for (_, layer), final in zip(layers, after, strict=True):
            layer.after(final, length)
        return x, cache

    def _embedded(self, tokens: Tensor | None, embeddings: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        """The residual stream before the first block [B T D]."""
        if options.get("output_attentions") or options.get("output_hidden_states"):
            raise SeqmixError("a seqmix model returns no attentions and hidden states: use forward hooks")
        if (tokens is None) == (embeddings is None):
            raise SeqmixError("give input_ids or inputs_embeds, and not both")
        x = self.model.embed(tokens) if embeddings is None else self.model.dropout(embeddings)
        self._resolve(x.dtype)
        return x

    def _resolve(self, dtype: torch.dtype) -> None:
        """Choose the kernels for where the model is now."""
        device = self.model.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if self._resolved != (asked := (self.model.device, dtype)):
            self.model.resolve_backends(dtype)
            self._resolved = asked


class SeqmixModel(SeqmixPreTrainedModel):
    """A model without its output projection: hidden states after the last norm."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SeqmixCache | None = None,
        cache: SeqmixCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [B T D] of tokens [B T]; arguments as those of `SeqmixForCausalLM`."""
        given, x = the_cache(past_key_values, cache), self._embedded(input_ids, inputs_embeds, kwargs)
        rows = rows_of(x.shape[:2], attention_mask, kwargs, cached=bool(given and given.get_seq_length()))
        x, after = self._hidden(x, rows, given, use_cache)
        output = BaseModelOutputWithPast(last_hidden_state=self.model.norm(x), **{NAME: after})
        return output if _as_dict(return_dict, self.config) else output.to_tuple()


class SeqmixForCausalLM(SeqmixPreTrainedModel, GenerationMixin):
    """A language model for transformers' `generate` and `Trainer`; its `model` is the `LanguageModel`."""

    @classmethod
    def wrap(cls, model: LanguageModel) -> Self:
        """A model of ours as one of transformers; they share the parameters."""
        wrapped = cls(SeqmixConfig(model.config), model)
        tokenizer, ids = model.tokenizer, range(model.config.vocab_size)
        if tokenizer is not None and tokenizer.begin in ids:
            # one token opens documents, so that it ends them too, and pads; with other roles generate would take the
            # first token of a prompt for padding
            for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(wrapped.config, role, tokenizer.begin)
                setattr(wrapped.generation_config, role, tokenizer.begin)
            # as in our generation, only tokens that stand for text
            last = tokenizer.begin == tokenizer.vocab_size - 1
            wrapped.generation_config.suppress_tokens = list(ids[tokenizer.vocab_size - last :]) or None
        return wrapped.train(model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SeqmixCache | None = None,
        cache: SeqmixCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the next token after each token of a segment.

        Args:
            input_ids: the segment, [B T].
            attention_mask: which of all tokens so far are real, [B S]; padding is skipped wherever it is, its logits
                mean nothing.
            past_key_values: the cache that an earlier call returned, under its old name.
            cache: the same under its new name.
            inputs_embeds: embeddings [B T D] in place of tokens.
            labels: the tokens themselves, -100 where no loss is asked; they are shifted here.
            use_cache: whether the cache is returned; by the configuration when None, and never in training.
            logits_to_keep: only the last so many tokens get logits, or those of these indices; 0 for all.
            return_dict: whether the result has names.
            kwargs: `position_ids` or `cu_seq_lens_q` of documents packed in one row; `num_items_in_batch` of the loss.

        Raises:
            SeqmixError: what is given or asked for does not fit, in one sentence.
        """
        given, x = the_cache(past_key_values, cache), self._embedded(input_ids, inputs_embeds, kwargs)
        rows = rows_of(x.shape[:2], attention_mask, kwargs, cached=bool(given and given.get_seq_length()))
        x, after = self._hidden(x, rows, given, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(self.model.norm(x[:, kept]))
        loss = None
        if labels is not None:
            if rows.mask is not None:  # nothing predicts the first token of a row
                labels = labels.masked_fill(~(rows.mask & rows.mask.roll(1, dims=1)), IGNORED)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{NAME: after})
        return output if _as_dict(return_dict, self.config) else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], _: Any, __: int, max_cache_length: int
    ) -> None:
        """Give `generate` a cache with room for all tokens."""
        if (kind := generation_config.cache_implementation) is not None:
            raise SeqmixError(f"a seqmix model has its own cache: cache_implementation={kind!r} is not for it")
        if model_kwargs.get(NAME) is None and generation_config.use_cache:
            model_kwargs[NAME] = SeqmixCache(len(self.model.blocks), max_cache_length)


def _as_dict(return_dict: bool | None, config: SeqmixConfig) -> bool:
    return config.return_dict if return_dict is None else return_dict


def _duplicates(module: torch.nn.Module) -> dict[str, str]:
    """The names of tensors that have an earlier name, each with that one."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if (saved := first.setdefault(id(tensor), name)) != name:
            found[name] = saved
    return found
