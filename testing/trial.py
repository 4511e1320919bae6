"""A mixer under test, and what a check does with it on one case."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from hypothesis import reject
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ..mixers.contract import MixerConfig, SequenceMixer
from ..mixers.state import clone, map_state, to_dict
from ..mixers.traits import ContractError, Traits, require_paradigm
from ..ops.paradigm import Paradigm
from ..registry import SeqmixError
from .case import Case, Start
from .compare import EXACT, LOW_PRECISION, CheckFailure, Differences
from .options import changed, chunk_sizes, require_examples, strategy
from .search import where_raised

D_MODELS = (12, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
"""Widths to try for a configuration that comes without one."""


class BuildError(ContractError):
    """A mixer cannot be built, and not because its configuration refuses something: that is a `SeqmixError`."""


class Subject:
    """A configuration under test, and the mixers built of it.

    Args:
        config: what is tested. Where its default paradigm is not under test, the first one that is becomes the default.
        d_model: width of the residual stream; None takes the first of `D_MODELS` that the configuration fits.
        device: where it is tested.
        paradigms: those to test, of the declared ones; None means all.
        vary: whether checks may change options of the configuration.
        tolerances: allowed per dtype in low precision, relative to the norm; `LOW_PRECISION` where none is given.
        compile_backend: what the checks that compile use.

    Raises:
        SeqmixError: an argument is wrong: the configuration fits no width, or not the one given; a paradigm is not
            declared; a field refuses its own examples; there is no such device.
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
        compile_backend: str = "aot_eager",
    ) -> None:
        if not isinstance(config, MixerConfig):
            hint = ", which is a class: call it" if isinstance(config, type) else ""
            raise ContractError(f"what is checked is the configuration of a mixer, and was given as {config!r}{hint}")
        self.device, self.vary, self.compile_backend = require_device(device), vary, compile_backend
        self.given_tolerances = _require_tolerances(tolerances or {})
        self.tolerances = {**LOW_PRECISION, **self.given_tolerances}
        self.paradigms = None if paradigms is None else _require_paradigms(paradigms, config)
        if vary:
            require_examples(config)
        if self.paradigms is not None and config.paradigm not in (*self.paradigms, _reference(config)):
            config = changed(config, {"paradigm": self.paradigms[0]}) or config
        self.config = config
        self.d_model = _width(config) if d_model is None else _require_width(d_model, config)
        self._built: dict[Any, SequenceMixer | None] = {}

    def anew(self) -> "Subject":
        """The same with mixers of its own, which have seen no call."""
        return Subject(
            self.config,
            d_model=self.d_model,
            device=self.device,
            paradigms=self.paradigms,
            vary=self.vary,
            tolerances=self.given_tolerances,
            compile_backend=self.compile_backend,
        )

    # ---- what cases are drawn from

    @property
    def traits(self) -> Traits:
        """Those of the mixer, with no other paradigms than those under test and the reference."""
        declared = self.config.traits
        if self.paradigms is None:
            return declared
        return replace(declared, paradigms=frozenset((*self.paradigms, _reference(self.config))))

    @cached_property
    def options(self) -> SearchStrategy[dict[str, Any]]:
        """Changes of the configuration."""
        return strategy(self.config, vary=self.vary, accepts=self.accepts)

    @cached_property
    def chunk_sizes(self) -> list[Any]:
        """Chunk sizes that the mixer takes; none where its configuration has no such field."""
        return chunk_sizes(self.config, self.accepts)

    def accepts(self, options: dict[str, Any]) -> bool:
        """Whether a mixer with these options is one: neither the configuration nor `build` refuses them."""
        try:
            return self.mixer(options) is not None
        except BuildError:  # a case of it shows what is broken
            return True

    # ---- mixers

    def mixer(self, options: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> SequenceMixer | None:
        """The mixer with these options, in evaluation mode; None where they do not go together.

        Parameters are those of initialisation, moved a little: a zero or a one of initialisation would hide errors.
        """
        key = (repr(sorted(options.items())), dtype)
        if key not in self._built:
            self._built[key] = self._build(dict(options), dtype)
        return self._built[key]

    def _build(self, options: dict[str, Any], dtype: torch.dtype) -> SequenceMixer | None:
        config = changed(self.config, options)
        if config is None:
            return None
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mixer = build(config, self.d_model)
                # as a model's builder does: `build` need not initialise
                _reset(mixer)
        except BuildError:
            raise
        except SeqmixError:
            if not options:
                raise
            return None
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return mixer.to(self.device, dtype).eval()

    def probe(self) -> None:
        """Build the mixer and call it once in every paradigm, before anything is checked.

        What is wrong with every call would be said by every check, each in words of its own.

        Raises:
            ContractError: it cannot be built or called, or what it returns is no output and state.
        """
        # one that no check is given: a mixer may remember calls
        mixer = self._build({}, torch.float64)
        assert mixer is not None
        kind, x = mixer.kind, torch.ones(2, 3, self.d_model, dtype=torch.float64, device=self.device)
        with _refusals(f"{kind}: init_state"):
            state = mixer.init_state(2)
        if not isinstance(state, tuple):
            raise ContractError(
                f"{kind}: init_state returned a {type(state).__name__}; a state is a NamedTuple of tensors"
            )
        for paradigm in sorted(self.traits.paradigms, key=lambda paradigm: paradigm is not mixer.paradigm):
            with torch.no_grad(), _refusals(f"{kind}: a call in the {paradigm} paradigm"):
                y, after = mixer(x, paradigm=paradigm, return_state=True)
            if not y.is_floating_point():
                raise ContractError(
                    f"{kind}: the {paradigm} paradigm returned an output of {y.dtype} for an input of {x.dtype}"
                )
            if not isinstance(after, tuple):
                raise ContractError(
                    f"{kind}: the {paradigm} paradigm has to return a {type(state).__name__} as the final state, where "
                    f"one is wanted, and returned a {type(after).__name__}"
                )


def build(config: MixerConfig, d_model: int) -> SequenceMixer:
    """The mixer of a configuration, which may be a stranger's.

    Raises:
        SeqmixError: the configuration refuses the width.
        BuildError: it raised something else, or gave no mixer.
    """
    try:
        mixer = config.build(d_model, layer_idx=0, n_layers=1)
    except SeqmixError:
        raise
    except Exception as error:
        raise BuildError(f"{config.kind}: build {where_raised(error)}") from error
    if not isinstance(mixer, SequenceMixer):
        raise BuildError(f"{config.kind}: build returned {mixer!r}, which is no SequenceMixer")
    if not hasattr(mixer, "traits"):
        raise BuildError(f"{config.kind}: {type(mixer).__name__}.__init__ has to call super().__init__(config)")
    return mixer


def require_device(device: str | torch.device) -> torch.device:
    """The device, if tensors can be computed with there.

    Raises:
        SeqmixError: they cannot.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SeqmixError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.device(device).type == "meta":
        raise SeqmixError("device 'meta' cannot be used here: its tensors have no numbers to check")
    return torch.device(device)


def _reset(mixer: SequenceMixer) -> None:
    try:
        mixer.reset_parameters()
    except SeqmixError:
        raise
    except Exception as error:
        raise BuildError(f"{mixer.kind}: reset_parameters {where_raised(error)}") from error


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """An error of a mixer as one sentence."""
    try:
        yield
    except SeqmixError:  # is one
        raise
    except Exception as error:
        raise ContractError(f"{what} {where_raised(error)}") from error


def _reference(config: MixerConfig) -> Paradigm:
    return Paradigm.RECURRENT if Paradigm.RECURRENT in config.traits.paradigms else config.paradigm


def _require_paradigms(paradigms: tuple[Paradigm, ...], config: MixerConfig) -> tuple[Paradigm, ...]:
    declared = ", ".join(sorted(config.traits.paradigms))
    if isinstance(paradigms, str):  # a paradigm is one too
        raise ContractError(f"paradigms needs a tuple, and was given {str(paradigms)!r}: write ({str(paradigms)!r},)")
    if not paradigms:
        raise ContractError(f"paradigms names none, so nothing would be checked; {config.kind} declares {declared}")
    for paradigm in paradigms:
        require_paradigm(paradigm, config.traits, config.kind)
    return tuple(map(Paradigm, paradigms))


def _require_tolerances(tolerances: Mapping[torch.dtype, float]) -> dict[torch.dtype, float]:
    for dtype in tolerances:
        if dtype not in LOW_PRECISION:
            allowed = ", ".join(map(str, LOW_PRECISION))
            raise SeqmixError(f"tolerances has no dtype {dtype!r}; allowed: {allowed}")
    return dict(tolerances)


def _require_width(d_model: int, config: MixerConfig) -> int:
    if not isinstance(d_model, int) or isinstance(d_model, bool) or d_model < 1:
        raise SeqmixError(f"d_model needs an integer >= 1, and was given {d_model!r}")
    build(config, d_model)
    return d_model


def _width(config: MixerConfig) -> int:
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


class Trial:
    """One case of a check: the mixer, and tensors drawn from the case's seed.

    Where the case's options do not go together, the case is not one (hypothesis draws another).
    """

    def __init__(self, subject: Subject, case: Case) -> None:
        self.subject, self.case = subject, case
        config, mixer = changed(subject.config, dict(case.options)), subject.mixer(case.options, case.dtype)
        if config is None or mixer is None:
            reject()
        self.config: MixerConfig = config
        self.mixer: SequenceMixer = mixer
        self.generator = torch.Generator().manual_seed(case.seed)

    @property
    def paradigms(self) -> list[Paradigm]:
        """The paradigms under test, the configured default first."""
        declared = self.mixer.traits.paradigms
        chosen = declared if self.subject.paradigms is None else declared & frozenset(self.subject.paradigms)
        return sorted(chosen, key=lambda p: (p is not self.mixer.paradigm, p))

    @property
    def reference(self) -> Paradigm:
        """The paradigm that others are compared with: the recurrent, which is nearest to a definition."""
        return _reference(self.config)

    # ---- tensors

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, drawn in float64 on the CPU: the same on every device."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.subject.device, dtype or self.case.dtype)

    def tokens(self, batch_size: int | None = None, length: int | None = None) -> Tensor:
        """A segment; of the case's size unless told."""
        batch_size = self.case.batch_size if batch_size is None else batch_size
        return self.randn(batch_size, self.case.length if length is None else length, self.subject.d_model)

    def like(self, x: Tensor) -> Tensor:
        """Normal numbers of this shape and dtype."""
        return self.randn(*x.shape, dtype=x.dtype)

    def state(self, rows: int | None = None, start: Start | None = None) -> Any:
        """What comes before; of the case's kind unless told."""
        rows = self.case.batch_size if rows is None else rows
        start = self.case.start if start is None else start
        if start == "none":
            return None
        if start == "initial":
            return self.mixer.init_state(rows)
        length = int(torch.randint(1, 8, (), generator=self.generator))
        with torch.no_grad():
            _, state = self.mixer(self.tokens(rows, length), return_state=True)
            if start == "moved":
                # by factors above 0: denominators stay positive, and the empty slots of a cache stay empty
                state = map_state(lambda x: x * self.like(x).exp() if x.is_floating_point() else x, state)
        return state

    def index(self, *rows: int) -> Tensor:
        """Rows of a state, as `select` takes them."""
        return torch.tensor(rows, device=self.subject.device)

    # ---- what is done with the mixer

    def mix(self, x: Tensor, state: Any, mixer: SequenceMixer | None = None, **options: Any) -> tuple[Tensor, Any]:
        """Output and final state without grad, where a state given may be consumed."""
        with torch.no_grad():
            return (mixer or self.mixer)(x, None if state is None else clone(state), return_state=True, **options)

    def differentiate(
        self, function: Any, x: Tensor, state: Any, *, upstream: int = 0, keep_state: bool = True
    ) -> tuple[dict[str, Tensor], Any]:
        """Output and gradients by name, and the final state, of `function(x, state) -> (y, state)`.

        Args:
            function: the mixer, or something that calls it.
            x: the segment.
            state: what comes before.
            upstream: the gradients from above are functions of it.
            keep_state: whether the final state has a gradient from above as well.
        """
        x, state = x.detach().requires_grad_(), as_leaves(state)
        y, final_state = function(x, state)
        outputs = [y, *(float_leaves(final_state).values() if keep_state else ())]
        leaves = {"the input": x}
        leaves |= {f"the state's {name}": leaf for name, leaf in float_leaves(state).items()}
        leaves |= {name: p for name, p in self.mixer.named_parameters() if p.requires_grad}  # one may be frozen
        generator = torch.Generator().manual_seed(self.case.seed + 1 + upstream)
        cotangents = []
        for output in outputs:
            noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            # zeros are the empty slots of a cache: nothing can depend on what they hold
            cotangents.append(noise.to(output.device, output.dtype) * (output.detach() != 0))
        if not any(output.requires_grad for output in outputs):
            raise CheckFailure("neither output nor final state has a gradient")
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in pairs], list(leaves.values()), [c for _, c in pairs], materialize_grads=True
        )
        named = {"the output": y.detach()}
        named |= {f"the gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
        return named, final_state

    def rebuilt(self, dtype: torch.dtype | None = None, **options: Any) -> SequenceMixer:
        """The same parameters in a mixer of other options or dtype."""
        config = changed(self.config, options)
        if config is None:
            refused = ", ".join(f"{name}={value}" for name, value in options.items())
            promised = ", which its traits declare" if options.keys() == {"paradigm"} else ""
            raise CheckFailure(f"the configuration refuses {refused}{promised}")
        other = build(config, self.subject.d_model)
        other = other.to(self.subject.device, dtype or self.case.dtype).eval()
        other.load_state_dict(self.mixer.state_dict())
        return other

    def differences(self, what: str, tolerance: float = EXACT) -> Differences:
        """A comparison: a context manager that fails at its end if something differed."""
        return Differences(what, tolerance)

    def compare(
        self,
        what: str,
        actual: tuple[Tensor | None, Any],
        expected: tuple[Tensor | None, Any],
        tolerance: float = EXACT,
    ) -> None:
        """Output and final state of the one against the other's."""
        with self.differences(what, tolerance) as found:
            if actual[0] is not None and expected[0] is not None:
                found.tensor("the output", actual[0], expected[0], "BTD")
            found.state("the final state", actual[1], expected[1])


def float_leaves(state: Any) -> dict[str, Tensor]:
    """The leaves of a state that have gradients."""
    return {name: leaf for name, leaf in to_dict(state or ()).items() if leaf.is_floating_point()}


def as_leaves(state: Any) -> Any:
    """The state as leaves of a new graph."""
    return None if state is None else map_state(lambda x: x.detach().requires_grad_(x.is_floating_point()), state)


@contextmanager
def strict_numerics() -> Iterator[None]:
    """Uninitialised memory is NaN, float32 products are not TF32; both as before afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose class has the attribute
    fill, precision = memory.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    with ExitStack() as after:
        after.callback(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        after.callback(setattr, memory, "fill_uninitialized_memory", fill)
        after.callback(torch.set_float32_matmul_precision, precision)
        # torch fills what `empty` returns with NaN (and integers with their largest) in this mode
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        torch.set_float32_matmul_precision("highest")
        yield
