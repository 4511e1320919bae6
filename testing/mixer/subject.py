"""A mixer under test: its configuration, and the modules that are built of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from random import Random
from typing import Any

import torch

from ...mixers.contract import MixerConfig, SequenceMixer
from ...mixers.traits import ContractError, Traits, require_paradigm
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..compare import LOW_PRECISION
from ..engine.search import where_raised
from .case import LAYERS
from .options import changed, drawn_options, require_examples, shared, singly

D_MODELS = (12, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
"""Widths to try for a configuration that comes without one."""

BACKEND = "aot_eager"
"""What the checks that compile use by default."""


class BuildError(ContractError):
    """A mixer cannot be built, and not because its configuration refuses something: that is a `SeqmixError`."""


class Subject:
    """A configuration under test, and the mixers built of it.

    The arguments are those of `check_mixer`. Where the default paradigm is not under test, the first one
    that is under test becomes the default.

    Raises:
        SeqmixError: an argument is wrong: the configuration fits no width, or not the one given; a paradigm is not
            declared; a field refuses its own examples; the device does not exist.
    """

    def __init__(
        self,
        config: MixerConfig,
        *,
        d_model: int | None = None,
        device: str | torch.device = "cpu",
        paradigms: tuple[Paradigm, ...] | None = None,
        vary: bool = True,
        tolerances: Mapping[torch.dtype, float] | None = None,
        compile_backend: str = BACKEND,
    ) -> None:
        if not isinstance(config, MixerConfig):
            hint = ", which is a class: call it" if isinstance(config, type) else ""
            raise ContractError(f"what is checked is the configuration of a mixer, and was given as {config!r}{hint}")
        self.device, self.vary, self.compile_backend = _require_device(device), vary, compile_backend
        for dtype in tolerances or {}:
            if dtype not in LOW_PRECISION:
                allowed = ", ".join(map(str, LOW_PRECISION))
                raise SeqmixError(f"tolerances has no dtype {dtype!r}; allowed: {allowed}")
        self.tolerances = {**LOW_PRECISION, **(tolerances or {})}
        self.paradigms = None if paradigms is None else _require_paradigms(paradigms, config)
        if vary:
            require_examples(config)
        if self.paradigms is not None and config.paradigm not in (*self.paradigms, reference_paradigm(config)):
            config = changed(config, {"paradigm": self.paradigms[0]}) or config
        self.config = config
        self.d_model = _width(config, d_model)
        self.arguments: dict[str, Any] = {"d_model": self.d_model, "device": str(self.device), "vary": vary}
        """What makes the same of its configuration."""
        self.arguments |= {"paradigms": self.paradigms, "tolerances": tolerances or None}
        self.arguments["compile_backend"] = compile_backend
        self._built: dict[Any, SequenceMixer | None] = {}
        self._accepted: dict[str, bool] = {}

    def renewed(self) -> "Subject":
        """The same with mixers of its own, that have not been called."""
        return Subject(self.config, **self.arguments)

    @property
    def traits(self) -> Traits:
        """Those of the mixer, with no other paradigms than those under test and the reference."""
        declared = self.config.traits
        if self.paradigms is None:
            return declared
        return replace(declared, paradigms=frozenset((*self.paradigms, reference_paradigm(self.config))))

    @cached_property
    def options(self) -> Callable[[Random, bool], dict[str, Any]]:
        """Changes of the configuration."""
        return drawn_options(self.config, vary=self.vary, accepts=self.accepts)

    @cached_property
    def single_options(self) -> list[dict[str, Any]]:
        """Changes of the configuration in which every value of every option comes once."""
        return singly(self.config, self.accepts) if self.vary else []

    @cached_property
    def shared_options(self) -> list[dict[str, Any]]:
        """Changes of the configuration in which heads share something."""
        return shared(self.config, self.accepts) if self.vary else []

    def accepts(self, options: dict[str, Any]) -> bool:
        """True if a mixer with these options is one: neither the configuration nor `build` refuses them."""
        key = repr(sorted(options.items()))
        if key not in self._accepted:  # without the mixer, of hundreds that are asked for few are used
            try:
                self._accepted[key] = self._unmoved(options, 0, self.d_model) is not None
            except BuildError:  # a case of it shows what is broken
                self._accepted[key] = True
        return self._accepted[key]

    def mixer(
        self, options: Mapping[str, Any], dtype: torch.dtype = torch.float64, layer: int = 0, d_model: int | None = None
    ) -> SequenceMixer | None:
        """The mixer of a layer with these options, in evaluation mode; None where they do not go together.

        Parameters are those of initialisation, moved a little: a zero or a one of initialisation would hide errors.
        """
        d_model = self.d_model if d_model is None else d_model
        key = (repr(sorted(options.items())), dtype, layer, d_model)
        if key not in self._built:
            self._built[key] = self._build(dict(options), dtype, layer, d_model)
        return self._built[key]

    def _build(self, options: dict[str, Any], dtype: torch.dtype, layer: int, d_model: int) -> SequenceMixer | None:
        mixer = self._unmoved(options, layer, d_model)
        if mixer is None:
            return None
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return mixer.to(self.device, dtype).eval()

    def _unmoved(self, options: dict[str, Any], layer: int, d_model: int) -> SequenceMixer | None:
        """As it is initialised."""
        config = changed(self.config, options)
        if config is None:
            return None
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # torch's function formats three tracebacks
                mixer = build(config, d_model, layer)
                # as a model's builder does: `build` need not initialise
                with _refusals(f"{mixer.kind}: reset_parameters", BuildError):
                    mixer.reset_parameters()
        except BuildError:
            raise
        except SeqmixError:
            if not options and d_model == self.d_model:
                raise
            return None
        return mixer

    @cached_property
    def wide(self) -> int:
        """A width of several tiles of channels, or many heads; the usual one where no larger one fits."""
        for times in (12, 16, 8):  # heads of 72 channels, where two of six are the fewest: a ragged tile after 64
            with suppress(SeqmixError):
                build(self.config, times * self.d_model)
                return times * self.d_model
        return self.d_model

    def probe(self) -> None:
        """Build the mixer and call it once in every paradigm, before every check says in words of its own what is wrong
        with every call; a ContractError where it does not return output and state, too."""
        # one that no check is given: a mixer may remember calls
        mixer = self._build({}, torch.float64, 0, self.d_model)
        assert mixer is not None
        kind, x = mixer.kind, torch.ones(2, 3, self.d_model, dtype=torch.float64, device=self.device)
        stateful = self.traits.has_state
        with _refusals(f"{kind}: init_state"):
            state = mixer.init_state(2) if stateful else ()
        named = type(state).__name__
        if not isinstance(state, tuple):
            raise ContractError(f"{kind}: init_state returned a {named}; a state is a NamedTuple of tensors")
        for paradigm in sorted(self.traits.paradigms, key=lambda paradigm: paradigm is not mixer.paradigm):
            with torch.no_grad(), _refusals(f"{kind}: a call in the {paradigm} paradigm"):
                y, after = mixer(x, paradigm=paradigm, return_state=stateful)
            what = f"{kind}: the {paradigm} paradigm"
            if not y.is_floating_point():
                raise ContractError(f"{what} returned an output of {y.dtype} for an input of {x.dtype}")
            if stateful and not isinstance(after, tuple):
                wanted = f"has to return a {named} as the final state, where one is wanted"
                raise ContractError(f"{what} {wanted}, and returned a {type(after).__name__}")


def build(config: MixerConfig, d_model: int, layer: int = 0) -> SequenceMixer:
    """The mixer of a layer of `LAYERS`; a `BuildError` where it raises no SeqmixError of its own, or gives no mixer."""
    with _refusals(f"{config.kind}: build", BuildError):
        mixer = config.build(d_model, layer_idx=layer, n_layers=LAYERS)
    if not isinstance(mixer, SequenceMixer):
        raise BuildError(f"{config.kind}: build returned {mixer!r}, which is not a SequenceMixer")
    if not hasattr(mixer, "traits"):
        raise BuildError(f"{config.kind}: {type(mixer).__name__}.__init__ has to call super().__init__(config)")
    return mixer


@contextmanager
def _refusals(what: str, error_class: type[ContractError] = ContractError) -> Iterator[None]:
    """An error of a mixer as one sentence."""
    try:
        yield
    except SeqmixError:  # is one
        raise
    except Exception as error:
        raise error_class(f"{what} {where_raised(error)}") from error


def reference_paradigm(config: MixerConfig) -> Paradigm:
    """The paradigm that others are compared with: the recurrent, which is nearest to a definition; it takes a state."""
    traits = config.traits
    candidates = (Paradigm.RECURRENT, config.paradigm, *Paradigm)
    return next(p for p in candidates if p in traits.paradigms and (traits.takes_state(p) or not traits.has_state))


def _require_device(device: str | torch.device) -> torch.device:
    """The device, if tensors can be computed with there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SeqmixError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.device(device).type == "meta":
        raise SeqmixError("device 'meta' cannot be used here: its tensors have no numbers to check")
    return torch.device(device)


def _require_paradigms(paradigms: tuple[Paradigm, ...], config: MixerConfig) -> tuple[Paradigm, ...]:
    declared = ", ".join(sorted(config.traits.paradigms))
    if isinstance(paradigms, str):  # a paradigm is one too
        raise ContractError(f"paradigms needs a tuple, and was given {str(paradigms)!r}: write ({str(paradigms)!r},)")
    if not paradigms:
        raise ContractError(f"paradigms names none, so nothing would be checked; {config.kind} declares {declared}")
    for paradigm in paradigms:
        require_paradigm(paradigm, config.traits, config.kind)
    return tuple(map(Paradigm, paradigms))


def _width(config: MixerConfig, d_model: int | None) -> int:
    """The width given, if it fits, or the first that does."""
    d_model = getattr(config, "fixed_d_model", None) if d_model is None else d_model
    if d_model is not None:
        if not isinstance(d_model, int) or isinstance(d_model, bool) or d_model < 1:
            raise SeqmixError(f"d_model needs an integer >= 1, and was given {d_model!r}")
        build(config, d_model)
        return d_model
    errors: list[SeqmixError] = []
    for d_model in D_MODELS:
        try:
            build(config, d_model)
        except SeqmixError as error:
            errors.append(error)
            # an assertion or a failed division of the width may be about it; a wrong name or signature is not
            if isinstance(error, BuildError) and not isinstance(error.__cause__, (AssertionError, ValueError)):
                raise
        else:
            return d_model
    reason = str(errors[0]).removeprefix(f"{config.kind}: ")
    widths = ", ".join(map(str, D_MODELS))
    raise ContractError(f"{config.kind} fits none of the widths {widths}: {reason}; give one that it fits")
