"""A registry: the kinds of one family (mixers, ffns, norms), found by name and imported on demand."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializerFunctionWrapHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from .config import Config, refusal
from .errors import ConfigError, choices_hint, nearest_hint, reason_of
from .providers import Provider, entry_points, files, kind_of, load, module_of, path_of, require_kind

C = TypeVar("C", bound=Config)
D = TypeVar("D", bound=Config)

DEFAULT_KIND = "x-default-kind"
"""JSON schema key for the default kind of a registry, which a mapping without a kind gets."""

_warned: dict[Any, Any] = {}
"""Record of warnings already shown, for `warnings.warn_explicit`, so that each is shown once."""

_describing: ContextVar[tuple["Registry[Any]", ...]] = ContextVar("_describing", default=())
"""Registries whose JSON schema is being generated, the outermost first."""


class Registry(Generic[C]):
    """The kinds of one family of configurations, such as all mixers.

    A kind comes from a file of the family's own package, from an entry point of an installed distribution, from a class
    that the program registers, or from a dotted path in place of a kind. It is looked up when a configuration is
    validated, so a kind that is added later is found. If a plug-in uses the kind of a built-in, the built-in wins, with
    a warning; a dotted path selects the plug-in.

    A registry is also the annotation of a field that has a configuration of its family:

        mixer: Annotated[MixerConfig, MIXERS]
    """

    def __init__(
        self,
        family: str,
        base: type[C],
        *,
        package: str,
        entry_points: str | None = None,
        default_kind: str | None = None,
    ) -> None:
        """Create a registry.

        Args:
            family: the noun for a member in errors, e.g. "mixer".
            base: the class that every configuration of the family extends.
            package: full name of the package of the built-in kinds: module `retention` defines the kind `retention` if
                its text has `kind: Literal["retention"]`.
            entry_points: the group in which distributions offer `kind = "module:ConfigClass"`; None for no group.
            default_kind: the kind of a mapping without `kind`; None if every mapping must have one.
        """
        self.family = family
        self.base = base
        self.default_kind = default_kind
        self._package = package
        self._group = entry_points
        self._registered: dict[str, type[C]] = {}

    def register(self, config: type[D]) -> type[D]:
        """Add a class that the running program defines, and return it; usable as a decorator.

        A class with the module and name of an earlier one replaces it, so that a notebook cell can run again.

        Raises:
            ConfigError: the class is not a configuration of the family, or another class provides its kind.
        """
        kind = require_kind(config, self.base)
        added = cast(type[C], config)
        before = self._registered.get(kind, added)
        if path_of(before) != path_of(added):
            raise self._conflict(kind, [path_of(before), path_of(added)])
        modules = dict.fromkeys([*self._providers().get(kind, ()), added.__module__])
        if len(modules) > 1:
            raise self._conflict(kind, modules)
        self._registered[kind] = added
        return config

    def kinds(self) -> list[str]:
        """Return the names of the available kinds, sorted.

        Built-in modules are not imported; plug-ins are, because broken ones are left out.
        """
        built_in = dict(files(self._package))
        broken = self.broken()
        return sorted(kind for kind in self._providers() if kind in built_in or kind not in broken)

    def built_in(self) -> dict[str, type[C]]:
        """Return the classes of the family's own package, by kind, sorted."""
        return {kind: self.resolve(kind) for kind in sorted(kind for kind, _ in files(self._package))}

    def broken(self) -> dict[str, str]:
        """Return for each broken plug-in its kind and the reason: its import fails, or a built-in has the same kind."""
        reasons = {}
        providers = self._providers()
        for kind, _ in entry_points(self._group):
            if (reason := self._shadow_warning(kind, providers[kind])) is not None:
                reasons[kind] = reason
                continue
            try:
                self.resolve(kind)
            except ConfigError as error:
                reasons[kind] = str(error)
        return reasons

    def origin(self, kind: str) -> str:
        """Return the name of the module that provides a kind.

        Raises:
            ConfigError: nothing provides the kind, or several modules do, none of which is built in.
        """
        return module_of(self._provider(kind))

    def resolve(self, kind: str) -> type[C]:
        """Return the configuration class of a kind, or of a dotted path `my_package.my_module:MyConfig`.

        Raises:
            ConfigError: the kind is unknown, provided by several modules none of which is built in, or its module
                cannot be loaded.
        """
        provider = self._provider(kind)
        try:
            config = load(provider, self.base)
            declared = require_kind(config, self.base)
            if ":" not in kind and declared != kind:
                raise ConfigError(f"{path_of(config)} declares kind {declared!r}")
        except Exception as error:  # an import may raise anything, and a broken plug-in must not break the program
            source = f"{self.family} kind {kind!r} of module {module_of(provider)}"
            raise ConfigError(f"{source} cannot be loaded: {reason_of(error)}") from error
        return config

    def _provider(self, kind: str) -> Provider:
        """Return the provider of a kind; a dotted path in place of a kind is returned unchanged."""
        if ":" in kind:
            return kind
        providers = self._providers().get(kind, {})
        if not providers:
            kinds = self.kinds()
            allowed = choices_hint(kind, kinds)
            remedy = "" if nearest_hint(kind, kinds) else ", or your own class, my_module:MyConfig"
            raise ConfigError(f"unknown {self.family} kind {kind!r}{allowed}{remedy}")
        if (sentence := self._shadow_warning(kind, providers)) is not None:
            # shown once, under the name "plug-ins" in place of a file: the line of code would not help
            warnings.warn_explicit(sentence, UserWarning, "plug-ins", 1, registry=_warned)
            return providers[f"{self._package}.{kind}"]
        if len(providers) > 1:
            raise self._conflict(kind, providers)
        return next(iter(providers.values()))

    def _shadow_warning(self, kind: str, providers: Mapping[str, Provider]) -> str | None:
        """Return the text of the warning that a built-in hides plug-ins of the same kind; None if there are none."""
        built_in = f"{self._package}.{kind}"
        plug_ins = [module for module in providers if module != built_in]
        if built_in not in providers or not plug_ins:
            return None
        plug_in = providers[plug_ins[0]]
        path = plug_in if isinstance(plug_in, str) else path_of(plug_in)
        return (
            f"{self.family} kind {kind!r} is provided by {built_in} and by {' and by '.join(plug_ins)}: using the "
            f"first, which is built in; rename the plug-in's kind, or select it by its path, {path}"
        )

    def _providers(self) -> dict[str, dict[str, Provider]]:
        """Return for each kind its providers by module; of several providers in one module, only the first counts."""
        providers: dict[str, dict[str, Provider]] = {}
        for kind, provider in (*self._registered.items(), *files(self._package), *entry_points(self._group)):
            providers.setdefault(kind, {}).setdefault(module_of(provider), provider)
        return providers

    def _conflict(self, kind: str, providers: Iterable[str]) -> ConfigError:
        """Return the error for a kind with several providers."""
        names = " and by ".join(providers)
        return ConfigError(f"{self.family} kind {kind!r} is provided by {names}: rename or remove all but one")

    # ---- the annotation of a field

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # any_schema serialises the fields of the value's own class, not only those of the base
        fields = core_schema.any_schema()
        serialization = core_schema.wrap_serializer_function_ser_schema(self._serialize, schema=fields)
        return core_schema.with_info_plain_validator_function(self._validate, serialization=serialization)

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Config:
        """Validate a field's value: an instance stays as it is, a mapping is validated by the class of its kind.

        The class is looked up here, not when a field is defined, because pydantic's own unions cannot grow.
        """
        if isinstance(value, self.base):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("mapping_with_kind", "Input should be a mapping with a kind")
        kind = value.get("kind", self.default_kind)
        if kind is None and "kind" not in value:
            raise refusal(f"missing key 'kind'{choices_hint('', self.kinds())}")
        if not isinstance(kind, str):
            raise _error_at_kind(kind, "string_type")
        try:
            config = self.resolve(kind)
        except ConfigError as error:
            raise _error_at_kind(kind, "value_error", error=error) from error
        return config.model_validate({**value, "kind": kind_of(config)}, context=info.context)

    def _serialize(self, value: Config, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return all fields of a configuration, with a dotted path as the kind if its kind stands for another class."""
        kind = require_kind(type(value), self.base)
        with suppress(ConfigError):
            if self.resolve(kind) is type(value):
                return {**handler(value), "kind": kind}
        return {**handler(value), "kind": path_of(type(value))}

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema of a field: that of the kind in `kind`, or any mapping if it is a dotted path."""
        configs = {kind: self.resolve(kind).__pydantic_core_schema__ for kind in self.kinds()}
        outer = _describing.get()
        if self in outer:  # a kind that contains kinds of its own family refers to their definitions
            configs = {kind: core_schema.definition_reference_schema(_ref(config)) for kind, config in configs.items()}
        token = _describing.set((*outer, self))
        try:
            union = handler(core_schema.tagged_union_schema(dict(configs), discriminator="kind"))
        finally:
            _describing.reset(token)
        by_path = {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
        default = {} if self.default_kind is None else {DEFAULT_KIND: self.default_kind}
        return {**union, **default, "oneOf": [*union["oneOf"], by_path]}


def _error_at_kind(kind: Any, error_type: str, **context: Any) -> ValidationError:
    """Return a pydantic error that is reported at the key `kind`."""
    details = InitErrorDetails(type=error_type, loc=("kind",), input=kind, ctx=context)
    return ValidationError.from_exception_data("kind", [details])


def _ref(config: Any) -> str:
    """Return the name under which a configuration's core schema is defined."""
    schema = config["schema"] if config["type"] == "definitions" else config
    return schema["schema_ref"] if schema["type"] == "definition-ref" else schema["ref"]
