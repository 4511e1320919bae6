"""Mutants: mixers and kernels that are wrong in one place, each with the check named for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import create_model

from seqmix import MixerConfig, SequenceMixer
from seqmix.ops.runtime.kernel import Kernel, reference
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.testing import EXAMPLES, Outcome, check_kernel, check_mixer, reproduce, reproduce_kernel

from .specimen import Cached, CachedConfig, SpecimenConfig


@dataclass(frozen=True, eq=False)
class Mutant:
    """A wrong mixer or kernel."""

    name: str
    wrong: str
    """What is wrong, then after which bug of which project."""
    check: str
    """The check named for it."""
    subject: MixerConfig | Kernel

    def outcome(self, check: str | None = None, examples: int = EXAMPLES) -> Outcome:
        """How a check ends on it, its own by default, at the first case that fails."""
        run: Any = check_kernel if isinstance(self.subject, Kernel) else check_mixer
        (outcome,) = run(self.subject, checks=[check or self.check], examples=examples, shrink=False).outcomes
        return outcome

    def reproduce(self, case: Any) -> None:
        """Run its check on one case."""
        run: Any = reproduce_kernel if isinstance(self.subject, Kernel) else reproduce
        run(self.check, self.subject, case)


MIXER_MUTANTS: list[Mutant] = []
KERNEL_MUTANTS: list[Mutant] = []


def mutant(*, check: str) -> Callable[[type], type]:
    """Register a layer that derives from a specimen, or a configuration that does; its docstring says what is wrong."""

    def register(cls: type) -> type:
        base = cls if issubclass(cls, MixerConfig) else CachedConfig if issubclass(cls, Cached) else SpecimenConfig
        config = create_model(cls.__name__, __base__=base, kind=(Literal[cls.__name__], cls.__name__))
        if issubclass(cls, SequenceMixer):
            config.layer = cls
        MIXER_MUTANTS.append(Mutant(cls.__name__, " ".join(cls.__doc__.split()), check, config()))
        return cls

    return register


def kernel_mutant(*, check: str, op: str = "decay", paradigm: Paradigm = Paradigm.CHUNKWISE, **declared: Any) -> Any:
    """Register a function in the place of the reference kernel's; `declared` differs from what that declares."""

    def register(function: Callable) -> Callable:
        name, wrong = function.__name__, " ".join(function.__doc__.split())
        kernel = replace(reference(op, paradigm), backend=name, function=function, reference=False, **declared)
        KERNEL_MUTANTS.append(Mutant(name, wrong, check, kernel))
        return function

    return register
