"""Adapter for layers, mixers and models of Hugging Face transformers, with their caches.

A cache becomes a state: its tensors are the leaves, and every call gets a new cache with these tensors. A module whose
`forward` has no argument for a cache has no state. Models are called with `inputs_embeds` and create masks and
positions themselves; for a layer, the adapter creates them as the layer's model does.
"""

import copy
import inspect
import json
import re
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from pydantic import Field
from torch import Tensor, nn

from ...mixers.base.traits import ContractError, Traits
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError, choices_hint, import_named, load
from ...registry.yaml import parse, write
from .module import AdaptedConfig, Result

D_MODEL = 16
"""Default width, if `config` has no hidden_size."""

SMALL = {"hidden_size": D_MODEL, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"vocab_size": 32, "pad_token_id": 0, "max_position_embeddings": 4096}
SMALL |= {"num_heads": 4, "n_groups": 1, "state_size": 4, "chunk_size": 4}
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
SMALL |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
"""Small defaults for fields of transformers' configurations; `intermediate_size` and `head_dim` follow the width."""

CACHES = ("cache", "past_key_values", "cache_params")
"""Names of the cache argument in different classes and releases."""


class HFConfig(AdaptedConfig):
    """Configuration of a layer, a mixer or a model of transformers."""

    kind: Literal["hf"] = "hf"
    path: str = Field(pattern=r"^[\w.]+:\w+$", examples=["transformers.models.llama.modeling_llama:LlamaAttention"])
    """Path of the class: `transformers.models.llama.modeling_llama:LlamaAttention`."""
    config: Mapping[str, Any] = {}
    """Fields of the class's configuration; missing fields get small values."""
    layer_idx: int = Field(default=0, ge=0)
    """Index of the layer in its model, for a class that takes `layer_idx`."""
    mask: bool = True
    """True to pass the mask that the model would create, if the layer takes one."""
    use: Literal["training", "packed", "decoding"] = "training"
    """Kind of call to check. `training`: without a cache. `packed`: the same with packed documents, as
    `DataCollatorWithFlattening` gives them. `decoding`: with a cache, and without gradients."""

    not_varied: ClassVar[tuple[str, ...]] = ("path", "config", "layer_idx", "mask", "use")

    @property
    def fixed_d_model(self) -> int:
        hidden_size = self.config.get("hidden_size")
        return hidden_size if isinstance(hidden_size, int) else D_MODEL

    @property
    def traits(self) -> Traits:
        self._config()  # refuses unknown fields
        decoding, paradigms = self.use == "decoding", {Paradigm.PARALLEL}
        state = "none"
        if decoding:
            state = _state_kind(self.path, json.dumps(dict(self.config)), self.layer_idx, self.mask)
            paradigms.add(Paradigm.RECURRENT)
        # a cache is a Python object that every call creates, so the mixer does not compile
        declared = {"state": state, "compiles": not decoding, "differentiable": not decoding}
        packed = self.use == "packed"
        return Traits(paradigms=frozenset(paradigms), packing=packed, shift_invariant=False, **declared)

    def module(self, d_model: int) -> nn.Module:  # noqa: ARG002
        cls, config = _class(self.path), self._config()
        parameters = inspect.signature(_written_init(cls)).parameters
        layer = cls(config, **({"layer_idx": self.layer_idx} if "layer_idx" in parameters else {}))
        if isinstance(layer, _module_globals(layer).get("PreTrainedModel", ())):  # a model: it gets embedded tokens
            layer.get_input_embeddings().requires_grad_(False)
        elif config._attn_implementation is None:
            config._attn_implementation = "sdpa"  # the default of models
        return _Layer(layer, config)

    def undeclared(self, module: Any) -> dict[str, str]:
        sliding = self.use == "decoding" and any(
            getattr(layer, "is_sliding", 0) for layer in module.template()[0].layers
        )
        windows = {"size": "the cache of a sliding window grows until it is full"} if sliding else {}
        return windows | super().undeclared(module.layer)

    def _config(self) -> Any:
        """Return transformers' configuration: small defaults, and the fields of `config`."""
        cls = _config_class(_class(self.path))
        known = [*(name for name in inspect.signature(cls).parameters if name != "kwargs"), *cls.attribute_map]
        allowed = [*known, "attn_implementation"]
        for name in self.config:
            if name not in allowed:
                raise ContractError(f"{cls.__name__} has no field {name!r}{choices_hint(name, allowed)}")
        width = self.fixed_d_model
        defaults = {**SMALL, "intermediate_size": 2 * width, "head_dim": width // 2}
        # layers read dropout from fields of the configuration, which the kit cannot set on the modules
        defaults |= {name: 0.0 for name in known if "drop" in name}
        small = {name: value for name, value in defaults.items() if name in known}
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in self.config.items()}
        try:
            config = cls(**(small | fields))
        except Exception as error:  # releases raise different classes
            reason = str(error).strip().splitlines()[-1].strip()
            raise ContractError(f"{cls.__name__} refuses {dict(self.config)}: {reason}") from error
        if config.hidden_size != width:
            raise ContractError(
                f"{cls.__name__} must have hidden_size = {width}, got {config.hidden_size}: set hidden_size in config"
            )
        return config

    def state(self, module: Any, batch_size: int) -> Any:
        return module.initial(batch_size)

    def call(self, module: Any, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        cache = module.cache_of(state) if state is not None or return_state else None
        y = module(x, cache, cu_seqlens, self.mask)
        return y, module.state_of(cache) if return_state else None


class _Layer(nn.Module):
    """A module of transformers that gets the arguments its model would pass, and whose cache is a state."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.parameters_of_forward = frozenset(inspect.signature(layer.forward).parameters)
        if "position_embeddings" in self.parameters_of_forward:
            kinds = [kind for name, kind in _module_globals(layer).items() if name.endswith("RotaryEmbedding")]
            self.rotary = kinds[0](config)
        self.templates: dict[Any, tuple[Any, dict[str, tuple[Tensor, Tensor]]]] = {}
        """Results of `template` by dtype and device."""

    @property
    def cache_name(self) -> str | None:
        """Name of `forward`'s argument for the cache; None if it has none."""
        return next((name for name in CACHES if name in self.parameters_of_forward), None)

    def forward(self, x: Tensor, cache: Any, cu_seqlens: Tensor | None, masked: bool) -> Tensor:
        known, arguments = self.parameters_of_forward, self._packed(cu_seqlens)
        if self.cache_name is not None:
            arguments[self.cache_name] = cache
        if "inputs_embeds" in known:  # a model
            arguments |= {"inputs_embeds": x, "use_cache": cache is not None}
            return self.layer(**arguments)[0]
        needs_positions = "position_embeddings" in known
        processed = cache.get_seq_length() if needs_positions and cache is not None else 0
        positions = arguments.pop(
            "position_ids", torch.arange(processed, processed + x.shape[1], device=x.device)[None]
        )
        if needs_positions:
            arguments["position_embeddings"] = self.rotary(x, positions)
            if masked:
                arguments["attention_mask"] = self._mask(x, cache, positions)
        result = self.layer(x, **arguments)
        return result[0] if isinstance(result, tuple) else result

    def _packed(self, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Return the arguments for packed documents, as `DataCollatorWithFlattening` gives them: without empty ones."""
        if cu_seqlens is None:
            return {}
        cuts = cu_seqlens.unique().to(torch.int32)
        lengths = cuts.diff()
        arguments: dict[str, Any] = {
            "position_ids": torch.cat([torch.arange(n, device=cuts.device) for n in lengths])[None]
        }
        for side in "qk":
            arguments |= {f"cu_seq_lens_{side}": cuts, f"max_length_{side}": int(lengths.max())}
        return arguments

    def _mask(self, x: Tensor, cache: Any, positions: Tensor) -> Any:
        """Return the mask that the layer's model would create."""
        from transformers import masking_utils  # pyright: ignore[reportMissingImports]

        make = masking_utils.create_causal_mask
        if getattr(self.layer, "sliding_window", None) is not None:
            make = masking_utils.create_sliding_window_causal_mask
        arguments = {"config": self.config, "inputs_embeds": x, "attention_mask": None, "position_ids": positions}
        arguments |= {name: cache for name in CACHES if name in inspect.signature(make).parameters}
        return make(**arguments)

    # ---- the cache as a state

    def template(self) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
        """Return a cache after one token, and its tensors after one and after two tokens.

        The result is computed once for every dtype and device.
        """
        like = next(self.parameters())
        if (key := (like.dtype, like.device)) not in self.templates:
            from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

            caches, training = [], self.training
            self.eval()
            for length in (1, 2):
                cache, x = DynamicCache(config=self.config), like.new_zeros(1, length, self.config.hidden_size)
                with torch.no_grad():
                    self(x, cache, None, True)
                caches.append(cache)
            self.train(training)
            one, two = (dict(_named(cache)) for cache in caches)
            self.templates[key] = caches[0], {name: (one[name], two[name]) for name in one}
        return self.templates[key]

    def initial(self, batch_size: int) -> Any:
        """Return the initial state: zeros, with length 0 in the dimensions that grow."""
        leaves = {}
        for name, (one, two) in self.template()[1].items():
            shape = [n if n == m else 0 for n, m in zip(one.shape, two.shape, strict=True)]
            leaves[name] = one.new_zeros(batch_size, *shape[1:])
        return _state_class(*leaves)(**leaves)

    def cache_of(self, state: Any) -> Any:
        """Return a new cache with the tensors of a state; an empty cache for None."""
        if state is None:
            from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

            return DynamicCache(config=self.config)
        cache = copy.deepcopy(self.template()[0])
        for name, (owner, key) in _places(cache):
            leaf = getattr(state, name)
            # a cache writes into its tensors, so clone them; it counts the tokens of all rows in one number
            owner[key] = leaf.clone() if isinstance(owner[key], Tensor) else int(leaf[0])
        return cache

    def state_of(self, cache: Any) -> Any:
        """Return the tensors of a cache as a state."""
        leaves = dict(_named(cache))
        return _state_class(*leaves)(**leaves)


def _places(cache: Any) -> Iterator[tuple[str, tuple[dict[Any, Any], Any]]]:
    """Yield for each tensor and count of a cache its name, and the dictionary and key that hold it."""
    for number, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            if (isinstance(value, Tensor) and value.ndim > 1) or name == "cumulative_length":
                yield f"{name}_{number}", (vars(layer), name)
            elif isinstance(value, dict):
                for key in (key for key, entry in value.items() if isinstance(entry, Tensor)):
                    yield f"{name}_{number}_{key}", (value, key)


def _named(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a cache by name; a count becomes a tensor with one entry per row."""
    values = {name: owner[key] for name, (owner, key) in _places(cache)}
    rows = next(leaf for leaf in values.values() if isinstance(leaf, Tensor))
    for name, leaf in values.items():
        yield name, leaf if isinstance(leaf, Tensor) else rows.new_full((len(rows),), leaf, dtype=torch.int64)


@cache
def _state_class(*names: str) -> Any:
    """Return the class of states with these leaves."""
    return namedtuple("CacheState", names)


@cache
def _state_kind(path: str, config: str, layer_idx: int, mask: bool) -> Any:
    """Return the kind of a module's state, "growing" or "constant", measured from its cache after one and two tokens.

    Raises:
        ContractError: the module's `forward` has no argument for a cache.
    """
    adapted = HFConfig.model_construct(path=path, config=json.loads(config), layer_idx=layer_idx, mask=mask)
    layer: Any = adapted.module(adapted.fixed_d_model)
    if layer.cache_name is None:
        raise ContractError(
            f"{path.partition(':')[2]}.forward has no argument for a cache, so it cannot decode: "
            "check it with use=training"
        )
    return "growing" if any(one.shape != two.shape for one, two in layer.template()[1].values()) else "constant"


def load_configs(path: str, config: str, changes: Sequence[str], *, presets: Path) -> list[HFConfig]:
    """Return the configurations that `seqmix check hf:PATH --config CONFIG KEY=VALUE` checks.

    There is one for training, and one for decoding if the module has a cache.

    Args:
        path: `module:Class` of the layer, mixer or model.
        config: fields of the class's configuration as YAML or JSON, or the name of a file that contains them.
        changes: changes to `HFConfig`, as `key=value`.
        presets: the folder of the presets.

    Raises:
        SeqmixError: an argument is wrong, or the class cannot be imported.
    """
    if not re.fullmatch(r"[\w.]+:\w+", path):
        example = "hf:transformers.models.llama.modeling_llama:LlamaModel"
        raise SeqmixError(f"expected hf:MODULE:CLASS, such as {example}, got hf:{path}")
    is_file = not {"{", ":"} & {*config} and Path(config).is_file()
    tree = parse(Path(config).read_text(encoding="utf-8") if is_file else config, "--config")
    fields = {} if tree is None else tree.plain()
    if not isinstance(fields, dict):
        raise SeqmixError(f"--config must be fields of a configuration, or a file that contains them, got {config!r}")
    overrides = [f"path={path}", f"config={write(fields, in_one_line=True)}", *changes]
    training = load(HFConfig, None, overrides, presets=presets)
    if not _has_cache(path) or any(change.startswith("use=") for change in changes):
        return [training]
    return [training, load(HFConfig, None, [*overrides, "use=decoding"], presets=presets)]


def _has_cache(path: str) -> bool:
    """Return True if the module's `forward` has an argument for a cache."""
    parameters = inspect.signature(_class(path).forward).parameters
    return any(name in CACHES for name in parameters)


def _class(path: str) -> Any:
    """Import the class at a path.

    Raises:
        ContractError: the module cannot be imported, or does not have this class.
    """
    module, _, name = path.partition(":")
    try:
        imported = import_named(module)
    except ImportError as error:
        if module.partition(".")[0] == "transformers" and error.name == "transformers":
            raise ContractError("transformers is not installed: pip install transformers") from None
        raise ContractError(f"{module} cannot be imported: {error}") from None
    if not _is_module_class(cls := getattr(imported, name, None)):
        classes = [name for name, value in vars(imported).items() if _is_module_class(value)]
        allowed = choices_hint(name, classes or ["none"], "classes")
        raise ContractError(f"{module} has no nn.Module {name!r}{allowed}")
    return cls


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _module_globals(layer: nn.Module) -> dict[str, Any]:
    """Return the globals of the Python module that defines the layer's class."""
    return vars(sys.modules[type(layer).__module__])


def _config_class(cls: type) -> Any:
    """Return the class of a module's configuration, from the type hint of its `config` argument."""
    hint = get_type_hints(_written_init(cls)).get("config")
    if not isinstance(hint, type):
        raise ContractError(
            f"{cls.__name__} has no argument `config` that is a configuration of transformers: use seqmix.testing.adapt"
        )
    return hint


def _written_init(cls: type) -> Any:
    """Return `__init__` as the class's author wrote it: decorators of the `kernels` package put a function of
    `*args, **kwargs` in its place and keep it as `orig_init`."""
    init = cls.__init__
    while inspect.isfunction(init) and "orig_init" in (nonlocals := inspect.getclosurevars(init).nonlocals):
        init = nonlocals["orig_init"]
    return init
