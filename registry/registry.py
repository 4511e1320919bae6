"""A registry: the kinds of one family (mixers, ffns, norms), found by name and loaded when asked for."""

from typing import Any, Generic, TypeVar, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from .config import Config
from .errors import ConfigError, nearest
from .field import checked, described
from .providers import Provider, dotted, entry_points, files, kind_of, path_of, require_config

C = TypeVar("C", bound=Config)
D = TypeVar("D", bound=Config)


class Registry(Generic[C]):
    """The kinds of one family.

    A kind comes from a file of the family's own package, from an entry point of an installed distribution, from a class
    that the program registers, or from a dotted path written in place of a kind. It is looked up when a configuration
    is validated, so whatever joins late is found.

    A registry is also the annotation of a field that holds a configuration of its family:

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
        """Open a registry.

        Args:
            family: what errors call a member, e.g. "mixer".
            base: the class that every configuration of the family extends.
            package: full name of the package of the built-in kinds: module `retention` is the kind `retention` if its
                text says `kind: Literal["retention"]`.
            entry_points: the group in which distributions offer `kind = "module:ConfigClass"`; None for no group.
            default_kind: the kind of a mapping that says none; None where each must say its own.
        """
        self.family = family
        self.base = base
        self.default_kind = default_kind
        self._package = package
        self._group = entry_points
        self._registered: dict[str, type[C]] = {}

    def register(self, config: type[D]) -> type[D]:
        """Add a class of the running program; usable as a decorator.

        A class of the same module and name replaces the one before, as when a notebook's cell runs again.

        Raises:
            ConfigError: the class is no configuration of the family, or another class provides its kind.
        """
        require_config(config, self.base)
        kind, added = kind_of(config), cast(type[C], config)
        before = self._registered.get(kind, added)
        if path_of(before) != path_of(added):
            raise ConfigError(self._conflict(kind, [path_of(before), path_of(added)]))
        others = (provider.module for provider in self._providers().get(kind, []))
        modules = list(dict.fromkeys([*others, added.__module__]))
        if len(modules) > 1:
            raise ConfigError(self._conflict(kind, modules))
        self._registered[kind] = added
        return config

    def kinds(self) -> list[str]:
        """The kinds that can be had, sorted.

        Built-in files are not imported for it; plug-ins are, for the broken ones to be left out.
        """
        broken = self.broken()
        return sorted(kind for kind in self._providers() if kind not in broken)

    def broken(self) -> dict[str, str]:
        """The plug-ins that cannot be had, by kind, each with its reason: its import fails, or its kind is taken."""
        reasons = {}
        for kind in self._plug_ins():
            try:
                self.resolve(kind)
            except ConfigError as error:
                reasons[kind] = str(error)
        return reasons

    def origin(self, kind: str) -> str:
        """The module that provides a kind.

        Raises:
            ConfigError: nothing provides the kind, or several modules do.
        """
        return self._provider(kind).module

    def resolve(self, kind: str) -> type[C]:
        """The configuration class of a kind, or of a dotted path `my_package.my_module:MyConfig`.

        Raises:
            ConfigError: the kind is unknown, provided by several modules, or its module cannot be loaded.
        """
        provider = self._provider(kind)
        try:
            config = provider.load()
            require_config(config, self.base)
            if ":" not in kind and kind_of(config) != kind:
                raise ConfigError(f"{path_of(config)} says kind {kind_of(config)!r}")
        except Exception as error:  # an import may raise anything, and a broken plug-in must break nothing else
            source = f"{self.family} kind {kind!r} of module {provider.module}"
            raise ConfigError(f"{source} cannot be loaded: {_reason(error)}") from error
        return config

    def _provider(self, kind: str) -> Provider:
        if ":" in kind:
            return dotted(kind)
        found = self._providers().get(kind, [])
        if not found:
            kinds = self.kinds()
            end = nearest(kind, kinds) or ", or a class of your own, my_module:MyConfig"
            raise ConfigError(f"unknown {self.family} kind {kind!r}; allowed: {', '.join(kinds)}{end}")
        if len(found) > 1:
            raise ConfigError(self._conflict(kind, [provider.module for provider in found]))
        return found[0]

    def _providers(self) -> dict[str, list[Provider]]:
        """Who provides each kind. A module counts once, in whatever ways it offers the kind."""
        found: dict[str, dict[str, Provider]] = {}
        for kind, config in self._registered.items():
            found.setdefault(kind, {})[config.__module__] = Provider(config.__module__, lambda config=config: config)
        for kind, provider in files(self._package, self.base).items():
            found.setdefault(kind, {}).setdefault(provider.module, provider)
        for kind, providers in self._plug_ins().items():
            for provider in providers:
                found.setdefault(kind, {}).setdefault(provider.module, provider)
        return {kind: list(by_module.values()) for kind, by_module in found.items()}

    def _plug_ins(self) -> dict[str, list[Provider]]:
        return entry_points(self._group) if self._group else {}

    def _conflict(self, kind: str, providers: list[str]) -> str:
        return f"{self.family} kind {kind!r} is provided by {' and by '.join(providers)}: rename or remove all but one"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return checked(self)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return described(self, handler)


def _reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ConfigError):
        return str(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
