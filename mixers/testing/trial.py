"""A mixer under test, and what a check does with it on one case."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from hypothesis import reject
from torch import Tensor

from ...registry import SeqmixError
from ..base import ContractError, MixerConfig, SequenceMixer
from ..paradigm import Paradigm
from ..state import clone, map_state, to_dict
from .case import Case, Start
from .compare import EXACT, LOW_PRECISION, Differences
from .options import changed

D_MODELS = (12, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512)
"""Widths to try for a configuration that comes without one."""


class Subject:
    """A configuration under test, and the mixers built of it.

    Args:
        config: what is tested.
        d_model: width of the residual stream; None takes the first of `D_MODELS` that the configuration fits.
        device: where it is tested.
        paradigms: those to test, of the declared ones; None means all.
        vary: whether checks may change options of the configuration.
        tolerances: allowed per dtype in low precision, relative to the norm; `LOW_PRECISION` where none is given.
        compile_backend: what the checks that compile use.

    Raises:
        ContractError: the configuration fits no width, or not the one given; or a paradigm is not declared.
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
        self.compile_backend = compile_backend
        self.config, self.device, self.vary = config, torch.device(device), vary
        self.tolerances = {**LOW_PRECISION, **(tolerances or {})}
        self.paradigms = paradigms
        if undeclared := sorted(set(paradigms or ()) - config.traits.paradigms):
            declared = ", ".join(sorted(config.traits.paradigms))
            raise ContractError(f"{config.kind} has no paradigm {str(undeclared[0])!r}; it declares {declared}")
        self.d_model = d_model if d_model is not None else _width(config)
        self._built: dict[Any, SequenceMixer | None] = {}
        self.config.build(self.d_model, layer_idx=0, n_layers=1)

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
                mixer = config.build(self.d_model, layer_idx=0, n_layers=1)
                # as a model's builder does: `build` need not initialise
                mixer.reset_parameters()
        except SeqmixError:
            if not options:
                raise
            return None
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return mixer.to(self.device, dtype).eval()


def _width(config: MixerConfig) -> int:
    reasons: list[str] = []
    for d_model in D_MODELS:
        try:
            config.build(d_model, layer_idx=0, n_layers=1)
        except SeqmixError as error:
            reasons.append(str(error))
        else:
            return d_model
    raise ContractError(f"{config.kind} fits none of the widths {', '.join(map(str, D_MODELS))}: {reasons[0]}")


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
        chosen = declared & frozenset(self.subject.paradigms or declared)
        return sorted(chosen, key=lambda p: (p is not self.mixer.paradigm, p))

    @property
    def reference(self) -> Paradigm:
        """The paradigm that others are compared with: the recurrent, which is nearest to a definition."""
        return Paradigm.RECURRENT if Paradigm.RECURRENT in self.mixer.traits.paradigms else self.mixer.paradigm

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
        leaves |= dict(self.mixer.named_parameters())
        generator = torch.Generator().manual_seed(self.case.seed + 1 + upstream)
        cotangents = []
        for output in outputs:
            noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            # zeros are the empty slots of a cache: nothing can depend on what they hold
            cotangents.append(noise.to(output.device, output.dtype) * (output.detach() != 0))
        if not any(output.requires_grad for output in outputs):
            raise AssertionError("neither output nor final state has a gradient")
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
        assert config is not None
        other = config.build(self.subject.d_model, layer_idx=0, n_layers=1)
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
