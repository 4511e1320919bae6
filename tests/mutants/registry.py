"""Mutants: mixers and kernels that are wrong in one place, each with the check named for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import create_model
from unusual_mixers import Unusual

from seqmix import MixerConfig, SequenceMixer
from seqmix.ops.runtime.kernel import Kernel, reference
from seqmix.ops.runtime.paradigm import Paradigm
from seqmix.testing import EXAMPLES, CheckOutcome, check_kernel, check_mixer, reproduce, reproduce_kernel

from .specimen import Cached, CachedConfig, SpecimenConfig


@dataclass(frozen=True, eq=False)
class Mutant:
    """A wrong mixer or kernel."""

    name: str
    wrong: str
    """What is wrong."""
    after: str
    """The bug that it stands for: a package and its version, a thread, or our own history."""
    check: str
    """The check named for it."""
    subject: MixerConfig | Kernel

    def outcome(self, seed: int = 0, examples: int = EXAMPLES) -> CheckOutcome:
        """How its check ends, at the first case that fails."""
        run: Any = check_kernel if isinstance(self.subject, Kernel) else check_mixer
        (outcome,) = run(self.subject, checks=[self.check], examples=examples, seed=seed, shrink=False).outcomes
        return outcome

    def reproduce(self, case: Any) -> None:
        """Run its check on one case."""
        run: Any = reproduce_kernel if isinstance(self.subject, Kernel) else reproduce
        run(self.check, self.subject, case)


MIXER_MUTANTS: list[Mutant] = []
KERNEL_MUTANTS: list[Mutant] = []


def mutant(*, check: str, after: str) -> Callable[[type], type]:
    """Register a layer that derives from a specimen, or a configuration that does; its docstring says what is wrong."""

    def register(cls: type) -> type:
        wrong = " ".join(cls.__doc__.split())
        if issubclass(cls, Unusual):
            MIXER_MUTANTS.append(Mutant(cls.__name__, wrong, after, check, cls.config_class()))
            return cls
        base = cls if issubclass(cls, MixerConfig) else CachedConfig if issubclass(cls, Cached) else SpecimenConfig
        config = create_model(
            cls.__name__,
            __base__=base,
            __cls_kwargs__={"use_attribute_docstrings": False},  # to look for them takes a tenth of a second per class
            kind=(Literal[cls.__name__], cls.__name__),
        )
        if issubclass(cls, SequenceMixer):
            config.layer = cls
        MIXER_MUTANTS.append(Mutant(cls.__name__, wrong, after, check, config()))
        return cls

    return register


def kernel_mutant(
    *, check: str, after: str, op: str = "decay", paradigm: Paradigm = Paradigm.CHUNKWISE, **declared: Any
) -> Any:
    """Register a function in the place of the reference kernel's; `declared` differs from what that declares."""

    def register(function: Callable) -> Callable:
        name, wrong = function.__name__, " ".join(function.__doc__.split())
        kernel = replace(reference(op, paradigm), backend=name, function=function, reference=False, **declared)
        KERNEL_MUTANTS.append(Mutant(name, wrong, after, check, kernel))
        return function

    return register
