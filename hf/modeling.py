"""Models of Hugging Face around a `LanguageModel`: training, and `generate` with a cache of states."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..models import IGNORED, LanguageModel
from ..models.onednn_linear import use_onednn_linear
from ..registry import SeqmixError
from .cache import NAME, SeqmixCache, mix_cached
from .configuration import SeqmixConfig
from .padding import Rows, mix_rows, rows_of


class SeqmixPreTrainedModel(PreTrainedModel):
    """What the models share.

    Args:
        config: the configuration.
        model: the model to wrap, whose parameters are shared; None to build and initialise one.
        trust: whether the modules that the configuration names by dotted paths may be imported.
    """

    config_class = SeqmixConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules: ClassVar = ["Block"]

    def __init__(self, config: SeqmixConfig, model: LanguageModel | None = None, *, trust: bool = False) -> None:
        super().__init__(config)
        if model is None:
            model = LanguageModel(config.read(trust=trust))
            model.reset_parameters()
            use_onednn_linear(model)
        self.model = model
        self.gradient_checkpointing = False
        self._resolved: tuple[torch.device, torch.dtype] | None = None
        names: dict[int, list[str]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        # tied embeddings, and blocks that share their parameters: by name of every copy the name that is saved
        self._tied_weights_keys = {copy: saved for saved, *copies in names.values() for copy in copies}
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, trust_remote_code: bool | None = None, **kwargs: Any
    ) -> Any:
        """Load a model as `PreTrainedModel.from_pretrained` does.

        Modules that config.json names by dotted paths are imported with trust_remote_code=True alone.

        Raises:
            SeqmixError: config.json is not valid or names code that is not imported yet; a tensor is missing, has
                another shape, or is none of the model's.
        """
        if trust_remote_code:
            kwargs["trust"] = True  # what transformers has no use for is given to the constructor
        kwargs["ignore_mismatched_sizes"] = True  # refused below, with names
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
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return {copy: saved for copy, saved in self._tied_weights_keys.items() if copy in parameters}

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        raise SeqmixError("the vocabulary is fixed by the configuration: build a model of another vocab_size")

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, every_n_layers: int = 1, **__: Any) -> None:
        if every_n_layers != 1:
            raise SeqmixError("activation checkpointing is of every block: every_n_layers is 1")
        self.gradient_checkpointing = self.model.activation_checkpointing = enable

    def _hidden(
        self, tokens: Tensor | None, attention_mask: Tensor | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Rows, SeqmixCache | None]:
        """The residual stream after the last block [B T D], what its rows are made of, and the cache."""
        embeddings = options.get("inputs_embeds")
        caches = (options.get("cache"), options.get("past_key_values"))
        if options.get("output_attentions") or options.get("output_hidden_states"):
            raise SeqmixError("a seqmix model returns no attentions and hidden states: use forward hooks")
        if (tokens is None) == (embeddings is None):
            raise SeqmixError("give input_ids or inputs_embeds, and not both")
        if None not in caches:
            raise SeqmixError("cache and past_key_values are two names of one argument, and both are given")
        cache = next((cache for cache in caches if cache is not None), None)
        if not isinstance(cache, SeqmixCache | None):
            raise SeqmixError(f"the cache of a seqmix model is a SeqmixCache, and a {type(cache).__name__} was given")
        model = self.model
        mixers = [block.mixer for block in self.model.blocks]
        x = model.embed(tokens) if embeddings is None else model.dropout(embeddings)
        rows = rows_of(x.shape[:2], attention_mask, options, cached=cache is not None and cache.get_seq_length() > 0)
        if (use_cache := options.get("use_cache")) is None:
            use_cache = self.config.use_cache and not self.training and rows.cu_seqlens is None
            use_cache = use_cache and all(mixer.traits.has_state for mixer in mixers)
        if cache is None and use_cache:
            cache = SeqmixCache(len(mixers))
        narrow = torch.is_autocast_enabled(x.device.type)
        if self._resolved != (asked := (x.device, torch.get_autocast_dtype(x.device.type) if narrow else x.dtype)):
            model.resolve_backends(asked[1])
            self._resolved = asked
        if cache is None:
            x, _ = mix_rows(lambda x, _, packed: model.run_blocks(x, cu_seqlens=packed), x, None, rows, mixers)
        else:
            x = mix_cached(model.run_blocks, x, mixers, cache.layers, rows)
        return x, rows, cache


class SeqmixModel(SeqmixPreTrainedModel):
    """A model without its output projection: hidden states after the last norm."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> BaseModelOutputWithPast:
        """Hidden states [B T D] of tokens [B T]; arguments as those of `SeqmixForCausalLM`."""
        x, _, after = self._hidden(input_ids, attention_mask, options)
        return BaseModelOutputWithPast(last_hidden_state=self.model.norm(x), **{NAME: after})


class SeqmixForCausalLM(SeqmixPreTrainedModel, GenerationMixin):
    """A language model for transformers' `generate` and `Trainer`; its `model` is the `LanguageModel`."""

    @classmethod
    def wrap(cls, model: LanguageModel) -> Self:
        """Our model as one of transformers; they share the parameters."""
        wrapped = cls(SeqmixConfig(model.config), model)
        if (tokenizer := model.tokenizer) is not None and tokenizer.begin < model.config.vocab_size:
            # it opens documents, and so ends them; if it were not the end, `generate` would take it for padding
            for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(wrapped.config, role, tokenizer.begin)
                setattr(wrapped.generation_config, role, tokenizer.begin)
            # as in our generation, only tokens that stand for text
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
        """Logits of the next token after each token of a segment.

        Args:
            input_ids: the segment, [B T].
            attention_mask: which of all tokens so far are real, [B S]. Padding is skipped, wherever it is.
            labels: the tokens again, -100 where no loss is asked; they are shifted here.
            logits_to_keep: only the last so many tokens get logits, or those of these indices; 0 for all.
            options: `cache` (or `past_key_values`) that an earlier call returned; `use_cache`, whether one is returned,
                by default in evaluation; `inputs_embeds` [B T D] in place of tokens; `position_ids` or `cu_seq_lens_q`
                of documents packed in one row; `num_items_in_batch` of the loss; `return_dict`.

        Raises:
            SeqmixError: what is given or asked for does not fit.
        """
        x, rows, after = self._hidden(input_ids, attention_mask, options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])
        loss = None
        if labels is not None:
            if rows.mask is not None:  # nothing predicts the first token of a row
                labels = labels.masked_fill(~(rows.mask & rows.mask.roll(1, dims=1)), IGNORED)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{NAME: after})
        return output.to_tuple() if options.get("return_dict", self.config.return_dict) is False else output

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise SeqmixError("continuous batching needs keys and values in pages, and a seqmix model has states")

    generate_batch = init_continuous_batching

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], _: Any, __: int, max_cache_length: int
    ) -> None:
        if (kind := generation_config.cache_implementation) is not None:
            raise SeqmixError(f"a seqmix model has its own cache: cache_implementation={kind!r} is not for it")
        if model_kwargs.get(NAME) is None and generation_config.use_cache:
            model_kwargs[NAME] = SeqmixCache(len(self.model.blocks), max_cache_length)
