"""Hugging Face model classes around a `LanguageModel`: training, and `generate` with a cache of states."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...models import IGNORED, LanguageModel
from ...models.cpu_linear import use_fast_linear
from ...registry import SeqmixError
from .cache import CACHE_NAME, CAN_CROP, SeqmixCache, mix_cached
from .configuration import SeqmixConfig
from .padding import RowLayout, layout_of, mix_rows


class SeqmixPreTrainedModel(PreTrainedModel):
    """Base class of the seqmix models for transformers.

    Args:
        config: the configuration.
        model: the model to wrap, whose parameters are shared; None to build and initialise one.
        trust: True to import modules that the configuration names by dotted paths.
    """

    config_class = SeqmixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = not CAN_CROP
    _no_split_modules = ["Block"]  # noqa: RUF012  transformers declares it without ClassVar

    def __init__(self, config: SeqmixConfig, model: LanguageModel | None = None, *, trust: bool = False) -> None:
        super().__init__(config)
        if model is None:
            model = LanguageModel(config.read(trust=trust))
            model.reset_parameters()
            use_fast_linear(model)
        self.model = model
        self.gradient_checkpointing = False
        self._resolved: tuple[torch.device, torch.dtype] | None = None
        names: dict[int, list[str]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        # maps the name of each tied or shared tensor to the name under which it is saved
        self._tied_weights_keys = {copy: saved for saved, *copies in names.values() for copy in copies}
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, trust_remote_code: bool | None = None, **kwargs: Any
    ) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does.

        Modules that config.json names by dotted paths are imported only with trust_remote_code=True.

        Raises:
            SeqmixError: config.json is not valid, or names code that is not imported yet; a tensor is missing,
                unexpected, or has the wrong shape.
        """
        if trust_remote_code:
            kwargs["trust"] = True  # transformers passes unknown arguments to the constructor
        kwargs["ignore_mismatched_sizes"] = True  # rejected below with the names of the tensors
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing", "unexpected", "mismatched"):
            if names := sorted(map(str, info[f"{problem}_keys"])):
                raise SeqmixError(
                    f"the weights do not fit the model of config.json: {problem} tensors {', '.join(names)}"
                )
        model.restore_buffers()
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Initialise the buffers that checkpoints do not contain; parameters and other buffers stay unchanged."""
        for block in self.model.distinct_blocks:
            if any(module._non_persistent_buffers_set for module in block.modules()):
                saved = {name: tensor.clone() for name, tensor in block.state_dict().items()}
                with torch.random.fork_rng():
                    block.reset_parameters()
                block.load_state_dict(saved)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: the constructor has initialised all parameters, and a file of weights has all of them."""

    def get_expanded_tied_weights_keys(self, *_: Any, **__: Any) -> dict[str, str]:
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return {copy: saved for copy, saved in self._tied_weights_keys.items() if copy in parameters}

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        raise SeqmixError("the vocabulary is fixed by the configuration: build a model with another vocab_size")

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, every_n_layers: int = 1, **__: Any) -> None:
        if every_n_layers != 1:
            raise SeqmixError(
                f"activation checkpointing covers every block: expected every_n_layers = 1, got {every_n_layers}"
            )
        self.gradient_checkpointing = self.model.activation_checkpointing = enable

    def _hidden(
        self, tokens: Tensor | None, attention_mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, RowLayout, SeqmixCache | None]:
        """Return the residual stream after the last block [B T D], the padding and packing of rows, and the cache."""
        embeddings = options.get("inputs_embeds")
        caches = (options.get("cache"), options.get("past_key_values"))
        if options.get("output_attentions") or options.get("output_hidden_states"):
            raise SeqmixError("output_attentions and output_hidden_states are not supported: use forward hooks")
        if (tokens is None) == (embeddings is None):
            raise SeqmixError("expected either input_ids or inputs_embeds, got both or neither: give exactly one")
        if None not in caches:
            raise SeqmixError("cache and past_key_values are two names for the same argument, got both: give one")
        cache = next((cache for cache in caches if cache is not None), None)
        if not isinstance(cache, SeqmixCache | None):
            raise SeqmixError(
                f"expected a SeqmixCache as the cache, got a {type(cache).__name__}: pass that of an earlier call"
            )
        model = self.model
        layers = list(self.model.blocks)
        x = model.dropout(embeddings) if tokens is None else model.embed(tokens)
        continues_cache = cache is not None and cache.get_seq_length() > 0
        rows = layout_of((x.shape[0], x.shape[1]), attention_mask, options, continues_cache=continues_cache)
        if (use_cache := options.get("use_cache")) is None:
            use_cache = self.config.use_cache and not self.training and rows.cu_seqlens is None
            use_cache = use_cache and all(layer.traits.has_state for layer in layers)
        if cache is None and use_cache:
            cache = SeqmixCache(len(layers))
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if self._resolved != (x.device, dtype):
            model.resolve_backends(dtype)
            self._resolved = (x.device, dtype)
        if cache is None:
            x, _ = mix_rows(lambda x, _, packed: model.run_blocks(x, cu_seqlens=packed), x, None, rows, layers)
        else:
            x = mix_cached(model.run_blocks, x, layers, cache.layers, rows)
        return x, rows, cache


class SeqmixModel(SeqmixPreTrainedModel):
    """seqmix model without its output projection: it returns the hidden states after the final norm."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> BaseModelOutputWithPast:
        """Return the hidden states [B T D] of tokens [B T]; arguments are those of `SeqmixForCausalLM.forward`."""
        x, _, after = self._hidden(input_ids, attention_mask, options)
        cache: dict[str, Any] = {CACHE_NAME: after}
        return BaseModelOutputWithPast(last_hidden_state=self.model.norm(x), **cache)


class SeqmixForCausalLM(SeqmixPreTrainedModel, GenerationMixin):
    """seqmix language model for `generate` and `Trainer` of transformers; its `model` is the `LanguageModel`."""

    @classmethod
    def wrap(cls, model: LanguageModel) -> Self:
        """Wrap a `LanguageModel` for transformers; both share the parameters."""
        wrapped = cls(SeqmixConfig(model.config), model)
        if (tokenizer := model.tokenizer) is not None and tokenizer.begin < model.config.vocab_size:
            # the begin token separates documents, so it ends them too; otherwise `generate` would treat it as padding
            for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(wrapped.config, role, tokenizer.begin)
                setattr(wrapped.generation_config, role, tokenizer.begin)
            # as in seqmix's own generation, only tokens that stand for text are sampled
            wrapped.generation_config.suppress_tokens = (
                list(range(tokenizer.text_tokens, model.config.vocab_size)) or None
            )
        return wrapped.train(model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """Return the logits of the next token after each token of a segment.

        Args:
            input_ids: the segment, [B T].
            attention_mask: True for real tokens and False for padding, for all tokens so far, [B S]. Padding is skipped
                wherever it is.
            labels: target tokens, -100 for no loss. Pass the tokens of the segment: this method shifts them.
            logits_to_keep: compute logits only for the last `logits_to_keep` tokens, or for these indices; 0 for all.
            options: `cache` (or `past_key_values`) from an earlier call; `use_cache`, True to return a cache (the
                default in evaluation); `inputs_embeds` [B T D] instead of tokens; `position_ids` or `cu_seq_lens_q` of
                documents packed in one row; `num_items_in_batch` for the loss; `return_dict`.

        Raises:
            SeqmixError: an argument has the wrong shape or is not supported.
        """
        x, rows, after = self._hidden(input_ids, attention_mask, options)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, positions])
        loss = None
        if labels is not None:
            if rows.mask is not None:  # nothing predicts the first token of a row
                labels = labels.masked_fill(~(rows.mask & rows.mask.roll(1, dims=1)), IGNORED)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        cache: dict[str, Any] = {CACHE_NAME: after}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **cache)
        return output.to_tuple() if options.get("return_dict", self.config.return_dict) is False else output

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise SeqmixError(
            "continuous batching is not supported: it needs pages of keys and values, and a seqmix model has states"
        )

    generate_batch = init_continuous_batching

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  it does not return a bool
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
        max_cache_length: int,
    ) -> None:
        if (implementation := generation_config.cache_implementation) is not None:
            raise SeqmixError(
                f"a seqmix model has its own cache, got cache_implementation = {implementation!r}: leave it out"
            )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache:
            model_kwargs[CACHE_NAME] = SeqmixCache(len(self.model.blocks), max_cache_length)
            if getattr(generation_config, "is_assistant", False):  # tokens that the other model rejects are removed
                model_kwargs[CACHE_NAME].activate_past_recording()
