"""Layers, mixers and models of Hugging Face transformers, with their caches.

A cache becomes a state: its tensors are the leaves, and a call gets a new cache that holds them. A module whose
`forward` takes no cache has no state. Models are called with `inputs_embeds`, and make masks and positions themselves;
for a layer they are made as its model does.
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

from ...mixers.traits import ContractError, Traits
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError, import_named, load, nearest
from ...registry.yaml import parse, write
from .module import AdaptedConfig, Result

D_MODEL = 16
"""The width, where `config` has none."""

SMALL = {"hidden_size": D_MODEL, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"vocab_size": 32, "pad_token_id": 0, "max_position_embeddings": 4096}
SMALL |= {"num_heads": 4, "n_groups": 1, "state_size": 4, "chunk_size": 4}
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
SMALL |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
"""Fields of configurations, where they are not given; an `intermediate_size` and a `head_dim` follow the width."""

CACHES = ("cache", "past_key_values", "cache_params")
"""What releases call the cache."""


class HFConfig(AdaptedConfig):
    """A layer, a mixer or a model of transformers."""

    kind: Literal["hf"] = "hf"
    path: str = Field(pattern=r"^[\w.]+:\w+$", examples=["transformers.models.llama.modeling_llama:LlamaAttention"])
    """Its class, `transformers.models.llama.modeling_llama:LlamaAttention`."""
    config: Mapping[str, Any] = {}
    """Fields of its configuration; those not given are small."""
    layer_idx: int = Field(default=0, ge=0)
    """The layer's index."""
    mask: bool = True
    """True if a layer is given the mask that its model makes, where it takes one."""
    use: Literal["training", "packed", "decoding"] = "training"
    """What is checked: the call of training, without a cache; the same with packed documents, as
    `DataCollatorWithFlattening` gives them; or calls with a cache, which has no gradients."""

    not_varied: ClassVar[tuple[str, ...]] = ("path", "config", "layer_idx", "mask", "use")

    @property
    def fixed_d_model(self) -> int:
        given = self.config.get("hidden_size")
        return given if isinstance(given, int) else D_MODEL

    @property
    def traits(self) -> Traits:
        self._config()  # refuses what it does not know
        decoding, paradigms = self.use == "decoding", {Paradigm.PARALLEL}
        state = "none"
        if decoding:
            state = _state_kind(self.path, json.dumps(dict(self.config)), self.layer_idx, self.mask)
            paradigms.add(Paradigm.RECURRENT)
        # a cache is a Python object, made in every call
        declared = {"state": state, "compiles": not decoding, "differentiable": not decoding}
        packed = self.use == "packed"
        return Traits(paradigms=frozenset(paradigms), packing=packed, shift_invariant=False, **declared)

    def module(self, d_model: int) -> nn.Module:  # noqa: ARG002
        cls, config = _class(self.path), self._config()
        parameters = inspect.signature(cls).parameters
        layer = cls(config, **{name: self.layer_idx for name in ("layer_idx",) if name in parameters})
        if isinstance(layer, _neighbours(layer).get("PreTrainedModel", ())):  # its tokens come embedded
            layer.get_input_embeddings().requires_grad_(False)
        elif config._attn_implementation is None:
            config._attn_implementation = "sdpa"  # which its model would choose
        return _Layer(layer, config)

    def undeclared(self, module: Any) -> dict[str, str]:
        sliding = self.use == "decoding" and any(
            getattr(layer, "is_sliding", 0) for layer in module.template()[0].layers
        )
        windows = {"size": "the cache of a window grows until it is full"} if sliding else {}
        return windows | super().undeclared(module.layer)

    def _config(self) -> Any:
        cls = _config_class(_class(self.path))
        known = [*(name for name in inspect.signature(cls).parameters if name != "kwargs"), *cls.attribute_map]
        for name in self.config:
            if name not in (allowed := [*known, "attn_implementation"]):
                end = nearest(name, allowed)
                raise ContractError(f"{cls.__name__} has no field {name!r}; allowed: {', '.join(allowed)}{end}")
        width = self.fixed_d_model
        usual = {**SMALL, "intermediate_size": 2 * width, "head_dim": width // 2}
        usual |= {name: 0.0 for name in known if "drop" in name}  # its layers read their fields, which no kit can set
        small = {name: value for name, value in usual.items() if name in known}
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in self.config.items()}
        try:
            made = cls(**(small | given))
        except Exception as error:  # every release has its own
            reason = str(error).strip().splitlines()[-1].strip()
            raise ContractError(f"{cls.__name__} refuses {dict(self.config)}: {reason}") from error
        if made.hidden_size != width:
            raise ContractError(f"{cls.__name__} has a width of {made.hidden_size}: give it as hidden_size")
        return made

    def state(self, module: Any, batch_size: int) -> Any:
        return module.initial(batch_size)

    def call(self, module: Any, x: Tensor, state: Any, cu_seqlens: Tensor | None, return_state: bool) -> Result:
        cache = module.cache_of(state) if state is not None or return_state else None
        y = module(x, cache, cu_seqlens, self.mask)
        return y, module.state_of(cache) if return_state else None


class _Layer(nn.Module):
    """A module of transformers, what its model would give it, and its cache as a state."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.parameters_of_forward = frozenset(inspect.signature(layer.forward).parameters)
        if "position_embeddings" in self.parameters_of_forward:
            kinds = [kind for name, kind in _neighbours(layer).items() if name.endswith("RotaryEmbedding")]
            self.rotary = kinds[0](config)
        self.templates: dict[Any, tuple[Any, dict[str, tuple[Tensor, Tensor]]]] = {}

    @property
    def cache_name(self) -> str | None:
        return next((name for name in CACHES if name in self.parameters_of_forward), None)

    def forward(self, x: Tensor, cache: Any, cu_seqlens: Tensor | None, masked: bool) -> Tensor:
        known, given = self.parameters_of_forward, self._packed(cu_seqlens)
        if self.cache_name is not None:
            given[self.cache_name] = cache
        if "inputs_embeds" in known:  # a model
            given |= {"inputs_embeds": x, "use_cache": cache is not None}
            return self.layer(**given)[0]
        read = 0 if cache is None else cache.get_seq_length() if "position_embeddings" in known else 0
        positions = given.pop("position_ids", torch.arange(read, read + x.shape[1], device=x.device)[None])
        if "position_embeddings" in known:
            given["position_embeddings"] = self.rotary(x, positions)
            if masked:
                given["attention_mask"] = self._mask(x, cache, positions)
        result = self.layer(x, **given)
        return result[0] if isinstance(result, tuple) else result

    def _packed(self, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Documents as `DataCollatorWithFlattening` gives them: empty ones are none."""
        if cu_seqlens is None:
            return {}
        cuts = cu_seqlens.unique().to(torch.int32)
        lengths = cuts.diff()
        given: dict[str, Any] = {
            "position_ids": torch.cat([torch.arange(n, device=cuts.device) for n in lengths])[None]
        }
        for end in "qk":
            given |= {f"cu_seq_lens_{end}": cuts, f"max_length_{end}": int(lengths.max())}
        return given

    def _mask(self, x: Tensor, cache: Any, positions: Tensor) -> Any:
        from transformers import masking_utils  # pyright: ignore[reportMissingImports]

        make = masking_utils.create_causal_mask
        if getattr(self.layer, "sliding_window", None) is not None:
            make = masking_utils.create_sliding_window_causal_mask
        given = {"config": self.config, "inputs_embeds": x, "attention_mask": None, "position_ids": positions}
        given |= {name: cache for name in CACHES if name in inspect.signature(make).parameters}
        return make(**given)

    # ---- the cache as a state

    def template(self) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
        """A cache after one token, and its tensors after one and after two; made once for every dtype and device."""
        like = next(self.parameters())
        if (key := (like.dtype, like.device)) not in self.templates:
            from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

            found, training = [], self.training
            self.eval()
            for length in (1, 2):
                made, x = DynamicCache(config=self.config), like.new_zeros(1, length, self.config.hidden_size)
                with torch.no_grad():
                    self(x, made, None, True)
                found.append(made)
            self.train(training)
            one, two = (dict(_named(made)) for made in found)
            self.templates[key] = found[0], {name: (one[name], two[name]) for name in one}
        return self.templates[key]

    def initial(self, batch_size: int) -> Any:
        leaves = {}
        for name, (one, two) in self.template()[1].items():
            shape = [n if n == m else 0 for n, m in zip(one.shape, two.shape, strict=True)]  # what grows is empty
            leaves[name] = one.new_zeros(batch_size, *shape[1:])
        return _state_class(*leaves)(**leaves)

    def cache_of(self, state: Any) -> Any:
        """A new cache that holds a state."""
        if state is None:
            from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

            return DynamicCache(config=self.config)
        made = copy.deepcopy(self.template()[0])
        for name, (holder, key) in _places(made):
            leaf = getattr(state, name)
            # a cache writes into its tensors, and counts all rows as one
            holder[key] = leaf.clone() if isinstance(holder[key], Tensor) else int(leaf[0])
        return made

    def state_of(self, cache: Any) -> Any:
        leaves = dict(_named(cache))
        return _state_class(*leaves)(**leaves)


def _places(cache: Any) -> Iterator[tuple[str, tuple[dict[Any, Any], Any]]]:
    """Where a cache holds its tensors, by name."""
    for number, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            if (isinstance(value, Tensor) and value.ndim > 1) or name == "cumulative_length":
                yield f"{name}_{number}", (vars(layer), name)
            elif isinstance(value, dict):
                for key in (key for key, held in value.items() if isinstance(held, Tensor)):
                    yield f"{name}_{number}_{key}", (value, key)


def _named(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a cache by name; what it counts is one per row."""
    found = {name: holder[key] for name, (holder, key) in _places(cache)}
    rows = next(leaf for leaf in found.values() if isinstance(leaf, Tensor))
    for name, leaf in found.items():
        yield name, leaf if isinstance(leaf, Tensor) else rows.new_full((len(rows),), leaf, dtype=torch.int64)


@cache
def _state_class(*names: str) -> Any:
    return namedtuple("CacheState", names)


@cache
def _state_kind(path: str, config: str, layer_idx: int, mask: bool) -> Any:
    """What the state of a module is: measured."""
    adapted = HFConfig.model_construct(path=path, config=json.loads(config), layer_idx=layer_idx, mask=mask)
    layer: Any = adapted.module(adapted.fixed_d_model)
    if layer.cache_name is None:
        raise ContractError(
            f"{path.partition(':')[2]}.forward takes no cache, so it does not decode: check use=training"
        )
    return "growing" if any(one.shape != two.shape for one, two in layer.template()[1].values()) else "constant"


def named(path: str, config: str, changes: Sequence[str], *, presets: Path) -> list[HFConfig]:
    """What `seqmix check hf:PATH --config CONFIG KEY=VALUE` checks: training, and decoding where there is a cache.

    `config` has fields of the class's configuration, as YAML or JSON, or names a file of them; `changes` are of
    `HFConfig`.

    Raises:
        SeqmixError: what is wrong, in one sentence.
    """
    if not re.fullmatch(r"[\w.]+:\w+", path):
        example = "hf:transformers.models.llama.modeling_llama:LlamaModel"
        raise SeqmixError(f"write hf:MODULE:CLASS, such as {example}; hf:{path} was given")
    is_file = not {"{", ":"} & {*config} and Path(config).is_file()
    tree = parse(Path(config).read_text(encoding="utf-8") if is_file else config, "--config")
    fields = {} if tree is None else tree.plain()
    if not isinstance(fields, dict):
        raise SeqmixError(f"--config needs fields of a configuration, or a file of them, and was given {config!r}")
    given = [f"path={path}", f"config={write(fields, in_one_line=True)}", *changes]
    made = load(HFConfig, None, given, presets=presets)
    if "cache" not in _takes(path) or any(change.startswith("use=") for change in changes):
        return [made]
    return [made, load(HFConfig, None, [*given, "use=decoding"], presets=presets)]


def _takes(path: str) -> set[str]:
    """What the module's `forward` takes, a cache by this name."""
    parameters = inspect.signature(_class(path).forward).parameters
    return {"cache" if name in CACHES else name for name in parameters}


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        found = import_named(module)
    except ImportError as error:
        if module.partition(".")[0] == "transformers" and error.name == "transformers":
            raise ContractError("transformers is not installed: pip install transformers") from None
        raise ContractError(f"{module} cannot be imported: {error}") from None
    if not _is_module(kind := getattr(found, name, None)):
        classes = [name for name, kind in vars(found).items() if _is_module(kind)]
        raise ContractError(
            f"{module} has no nn.Module {name!r}; it has: {', '.join(classes) or 'none'}{nearest(name, classes)}"
        )
    return kind


def _is_module(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _neighbours(layer: nn.Module) -> dict[str, Any]:
    return vars(sys.modules[type(layer).__module__])


def _config_class(cls: type) -> Any:
    hint = get_type_hints(cls.__init__).get("config")
    if not isinstance(hint, type):
        raise ContractError(f"{cls.__name__} is made of no configuration of transformers: use seqmix.testing.adapt")
    return hint
