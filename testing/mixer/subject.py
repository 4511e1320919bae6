"""A mixer under test: its configuration, and the modules built from it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from random import Random
from typing import Any

import torch

from ...mixers.base.contract import BuildError, MixerConfig, SequenceMixer, build_mixer
from ...mixers.base.traits import ContractError, Traits, require_paradigm
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError, where_raised
from ..compare import LOW_PRECISION
from .case import LAYERS
from .options import changed, drawn_options, require_examples, shared_head_changes, single_changes

D_MODELS = (12, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
"""Widths to try, in this order, if no width is given."""

BACKEND = "aot_eager"
"""Default compiler backend of the checks that compile."""


class Subject:
    """A configuration under test, and the mixers built from it.

    The arguments are those of `check_mixer`. If the default paradigm is neither under test nor the reference, the first
    paradigm under test becomes the default.

    Raises:
        SeqmixError: an argument is wrong: no width fits, or the given one does not; a paradigm is not declared; a field
            refuses its own examples; the device does not exist.
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
            hint = f", a class: pass an instance, {config.__name__}(...)" if isinstance(config, type) else ""
            raise ContractError(f"expected the configuration of a mixer, got {config!r}{hint}")
        self.device, self.vary, self.compile_backend = _require_device(device), vary, compile_backend
        for dtype in tolerances or {}:
            if dtype not in LOW_PRECISION:
                allowed = ", ".join(map(str, LOW_PRECISION))
                raise SeqmixError(f"tolerances expects low-precision dtypes, got {dtype!r}; allowed: {allowed}")
        self.tolerances = {**LOW_PRECISION, **(tolerances or {})}
        self.paradigms = None if paradigms is None else _require_paradigms(paradigms, config)
        if vary:
            require_examples(config)
        if self.paradigms is not None and config.paradigm not in (*self.paradigms, reference_paradigm(config)):
            config = changed(config, {"paradigm": self.paradigms[0]}) or config
        self.config = config
        self.d_model = _width(config, d_model)
        self.arguments: dict[str, Any] = {
            "d_model": self.d_model,
            "device": str(self.device),
            "vary": vary,
            "paradigms": self.paradigms,
            "tolerances": tolerances or None,
            "compile_backend": compile_backend,
        }
        """Arguments that make an equal subject from the same configuration."""
        self._built: dict[Any, SequenceMixer | None] = {}
        self._accepted: dict[str, bool] = {}

    def renew(self) -> "Subject":
        """Return an equal subject with newly built mixers, which have not been called."""
        return Subject(self.config, **self.arguments)

    @property
    def traits(self) -> Traits:
        """Traits of the mixer, whose paradigms are limited to those under test and the reference."""
        declared = self.config.traits
        if self.paradigms is None:
            return declared
        return replace(declared, paradigms=frozenset((*self.paradigms, reference_paradigm(self.config))))

    @cached_property
    def options(self) -> Callable[[Random, bool], dict[str, Any]]:
        """Function that draws changes of the configuration; see `drawn_options`."""
        return drawn_options(self.config, vary=self.vary, accepts=self.accepts)

    @cached_property
    def single_options(self) -> list[dict[str, Any]]:
        """Changes of the configuration, one for every value of every option."""
        return single_changes(self.config, self.accepts) if self.vary else []

    @cached_property
    def shared_options(self) -> list[dict[str, Any]]:
        """Changes of the configuration in which groups of heads share something, such as keys and values."""
        return shared_head_changes(self.config, self.accepts) if self.vary else []

    def accepts(self, options: dict[str, Any]) -> bool:
        """Return True if neither the configuration nor `build` refuses these options."""
        key = repr(sorted(options.items()))
        if key not in self._accepted:  # do not keep the mixer: of hundreds of combinations, few are used
            try:
                self._accepted[key] = self._initialised(options, 0, self.d_model) is not None
            except BuildError:  # the case runs, and reports what is broken
                self._accepted[key] = True
        return self._accepted[key]

    def mixer(
        self, options: Mapping[str, Any], dtype: torch.dtype = torch.float64, layer: int = 0, d_model: int | None = None
    ) -> SequenceMixer | None:
        """Return a mixer in evaluation mode; None if the options are refused.

        Parameters are initialised, then perturbed a little: an initial value of 0 or 1 would hide errors.

        Args:
            options: changes of the configuration.
            dtype: dtype of the parameters.
            layer: index of the mixer's layer in a model of `LAYERS` layers.
            d_model: width; by default the subject's.
        """
        d_model = self.d_model if d_model is None else d_model
        key = (repr(sorted(options.items())), dtype, layer, d_model)
        if key not in self._built:
            self._built[key] = self._build(dict(options), dtype, layer, d_model)
        return self._built[key]

    def _build(self, options: dict[str, Any], dtype: torch.dtype, layer: int, d_model: int) -> SequenceMixer | None:
        mixer = self._initialised(options, layer, d_model)
        if mixer is None:
            return None
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        mixer = mixer.to(self.device, dtype).eval()
        if self.device.type == "cpu":  # as in a model: native kernels; those of a GPU have checks of their own
            mixer.resolve_backend(dtype)
        return mixer

    def _initialised(self, options: dict[str, Any], layer: int, d_model: int) -> SequenceMixer | None:
        """Return a newly initialised mixer; None if the options are refused."""
        config = changed(self.config, options)
        if config is None:
            return None
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # torch.manual_seed is slow: it formats three tracebacks
                mixer = build(config, d_model, layer)
                # `build` need not initialise: a model's builder calls reset_parameters too
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
    def wide_d_model(self) -> int:
        """Width (d_model) with several tiles of channels or many heads; the usual width if no larger one fits."""
        for times in (12, 16, 8):  # 12 gives two heads of 72 channels where the usual heads have 6: a ragged tile
            with suppress(SeqmixError):
                build(self.config, times * self.d_model)
                return times * self.d_model
        return self.d_model

    def probe(self) -> None:
        """Build the mixer and call it once in every paradigm, so that a mixer that never works gives one error.

        Raises:
            ContractError: building or calling the mixer fails, or a call does not return an output and a state.
        """
        # not one of the mixers that checks use: a mixer may remember calls
        mixer = self._build({}, torch.float64, 0, self.d_model)
        assert mixer is not None
        kind, x = mixer.kind, torch.ones(2, 3, self.d_model, dtype=torch.float64, device=self.device)
        stateful = self.traits.has_state
        with _refusals(f"{kind}: init_state"):
            state = mixer.init_state(2) if stateful else ()
        state_class = type(state).__name__
        if not isinstance(state, tuple):
            raise ContractError(f"{kind}: init_state has to return a NamedTuple of tensors, got {state_class}")
        for paradigm in sorted(self.traits.paradigms, key=lambda paradigm: paradigm is not mixer.paradigm):
            with torch.no_grad(), _refusals(f"{kind}: a call in the {paradigm} paradigm"):
                y, after = mixer(x, paradigm=paradigm, return_state=stateful)
            what = f"{kind}: the {paradigm} paradigm"
            if not y.is_floating_point():
                raise ContractError(f"{what} has to return an output of {x.dtype}, got {y.dtype}")
            if stateful and not isinstance(after, tuple):
                wanted = f"has to return a {state_class} as the final state if return_state is True"
                raise ContractError(f"{what} {wanted}, got {type(after).__name__}")


def build(config: MixerConfig, d_model: int, layer: int = 0) -> SequenceMixer:
    """Build the mixer for one layer of a model of `LAYERS` layers.

    Raises:
        SeqmixError: the configuration refuses the width.
        BuildError: `build` raises any other error, or returns no mixer.
    """
    with _refusals(f"{config.kind}: build", BuildError):
        return build_mixer(config, d_model, layer_idx=layer, n_layers=LAYERS)


@contextmanager
def _refusals(what: str, error_class: type[ContractError] = ContractError) -> Iterator[None]:
    """Turn an error in a mixer's code into a `ContractError` of one sentence; a `SeqmixError` stays as it is."""
    try:
        yield
    except SeqmixError:
        raise
    except Exception as error:
        raise error_class(f"{what} {where_raised(error)}") from error


def reference_paradigm(config: MixerConfig) -> Paradigm:
    """Return the paradigm that others are compared with; it takes a state if the mixer has one.

    The recurrent paradigm comes first, because it is nearest to the definition; then the configured one.
    """
    traits = config.traits
    candidates = (Paradigm.RECURRENT, config.paradigm, *Paradigm)
    return next(p for p in candidates if p in traits.paradigms and (traits.takes_state(p) or not traits.has_state))


def _require_device(device: str | torch.device) -> torch.device:
    """Return the device; raise a `SeqmixError` if it cannot compute."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SeqmixError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.device(device).type == "meta":
        raise SeqmixError("expected a device that computes, got device 'meta': use one whose tensors hold numbers")
    return torch.device(device)


def _require_paradigms(paradigms: tuple[Paradigm, ...], config: MixerConfig) -> tuple[Paradigm, ...]:
    """Return the paradigms; raise a `ContractError` if there are none, or the mixer does not declare one of them."""
    declared = ", ".join(sorted(config.traits.paradigms))
    if isinstance(paradigms, str):  # a Paradigm is a str too
        raise ContractError(f"paradigms expects a tuple, got {str(paradigms)!r}: write ({str(paradigms)!r},)")
    if not paradigms:
        raise ContractError(f"paradigms expects at least one paradigm, got none; {config.kind} declares {declared}")
    for paradigm in paradigms:
        require_paradigm(paradigm, config.traits, config.kind)
    return tuple(map(Paradigm, paradigms))


def _width(config: MixerConfig, d_model: int | None) -> int:
    """Return the given width, or the first of `D_MODELS` that fits; raise a `SeqmixError` if none does."""
    d_model = getattr(config, "fixed_d_model", None) if d_model is None else d_model
    if d_model is not None:
        if not isinstance(d_model, int) or isinstance(d_model, bool) or d_model < 1:
            raise SeqmixError(f"d_model expects an integer >= 1, got {d_model!r}")
        build(config, d_model)
        return d_model
    errors: list[SeqmixError] = []
    for d_model in D_MODELS:
        try:
            build(config, d_model)
        except SeqmixError as error:
            errors.append(error)
            # an assertion or ValueError may be about the width; any other error in the code is not
            if isinstance(error, BuildError) and not isinstance(error.__cause__, (AssertionError, ValueError)):
                raise
        else:
            return d_model
    reason = str(errors[0]).removeprefix(f"{config.kind}: ")
    widths = ", ".join(map(str, D_MODELS))
    raise ContractError(f"{config.kind} fits none of the widths {widths}: {reason}; give another one as d_model=")
