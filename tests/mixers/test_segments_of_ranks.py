"""Context parallelism of mixers that implement it themselves, over ranks simulated by threads in one graph."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from feature_cases import mixers_with, require_property
from mutants.specimen import Specimen, SpecimenConfig
from torch import Tensor

from seqmix.mixers.base.contract import SequenceMixer
from seqmix.mixers.base.state import clone
from seqmix.ops.runtime.context_parallel import ContextParallel
from seqmix.testing.compare import CheckFailure, require
from seqmix.testing.mixer.case import FIXED, Draw
from seqmix.testing.mixer.trial import SegmentCall, Trial


@dataclass(frozen=True)
class Threads(ContextParallel):
    """Ranks as threads: what each gathers are the tensors of all, with the graphs that made them."""

    turn: threading.Semaphore = field(kw_only=True)  # one computes: threads that compete take a fifth longer
    barrier: threading.Barrier = field(kw_only=True)
    gathered: list[list[Tensor]] = field(kw_only=True)

    def gather(self, x: Tensor) -> Tensor:
        """A tensor of every rank, stacked."""
        self.gathered[self.rank].append(x.clone())  # which the mixer may write afterwards
        self.turn.release()
        self.barrier.wait()  # where it breaks, nobody's turn matters
        self.turn.acquire()
        every = [tensors[len(self.gathered[self.rank]) - 1] for tensors in self.gathered]
        shapes = {tuple(tensor.shape) for tensor in every}
        require(len(shapes) == 1, f"ranks gather tensors of different shapes: {sorted(shapes)}")
        return torch.stack(every)

    def exchange(
        self,
        sent: Sequence[Tensor],
        like: Sequence[Tensor],
        distance: int,
    ) -> tuple[list[Tensor], list[Any]]:
        """Those of the rank so far before, with the graph that made them: what backward sends is not asked for."""
        every = [self.gather(x) for x in sent]
        return [x[self.rank - distance] for x in every] if self.rank >= distance else [], []


DRAW = Draw(pieces=(2, 5), tokens=(1, 9), long=6, longest=33, batch_size=(1, 2), lists=((6,) * 4,))


def segments_of_ranks_are_the_whole(trial: Trial) -> None:
    """Over several ranks, packed documents too, output, final state and gradients are those of one: no process but
    this one is needed to see it."""
    ranks, length = len(trial.case.lengths), trial.case.lengths[0]
    packed: dict[str, Any] = {}
    one = trial.case.batch_size == 1 and trial.mixer.traits.packing
    if one and trial.case.seed % 2 == (trial.case.start != "none"):  # of the two that always run, one
        cuts = torch.randint(0, ranks * length + 1, (2,), generator=trial.generator).sort().values.tolist()
        packed["cu_seqlens"] = torch.tensor([0, *cuts, ranks * length], device=trial.subject.device)
    x = trial.tokens(length=ranks * length)
    state = trial.state(3 if packed else trial.case.batch_size)
    expected = trial.differentiate(trial.without_growing_state(trial.call(trial.reference, **packed)), x, state)
    rank = trial.case.seed % ranks if trial.mixer.traits.state == "constant" else 0
    mixers = [trial.without_dropout() for _ in range(ranks)]
    for paradigm in trial.paradigms:
        call = trial.without_growing_state(
            _over_ranks(mixers, lambda mixer, p=paradigm: trial.call(p, mixer, **packed), rank)
        )
        what = f"{paradigm}, {ranks} ranks of {length} tokens (final state: rank {rank}'s) against one"
        if trial.case.seed == FIXED and trial.case.options and paradigm is not trial.mixer.paradigm:
            with torch.no_grad():  # an option's value by itself: gradients of the default are enough
                trial.compare(what, call(x, state), (expected[0]["the output"], expected[1]))
            continue
        actual = trial.differentiate(call, x, state)
        trial.compare(what, actual, expected)


def _over_ranks(
    mixers: Sequence[SequenceMixer], calls: Callable[[SequenceMixer], SegmentCall], kept: int
) -> SegmentCall:
    """A call by several ranks, each with its mixer and segment; the final state is that of one of them."""

    def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        size = len(mixers)
        barrier, turn = threading.Barrier(size, timeout=60 * size), threading.Semaphore()
        shared: dict[str, Any] = {"turn": turn, "barrier": barrier, "gathered": [[] for _ in mixers]}
        groups = [Threads("threads", rank, size, **shared) for rank in range(size)]

        def run(group: Threads) -> tuple[Tensor, Any]:
            mixer = mixers[group.rank]
            mixer.cp_group = group
            try:
                with turn:
                    given = state if state is None or torch.is_grad_enabled() else clone(state)
                    return calls(mixer)(group.part(x), given)
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(run, group) for group in groups]
        # the error of the rank that failed, not of those that waited for it
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        results = [future.result() for future in futures]
        return torch.cat([y for y, _ in results], dim=1), results[kept][1]

    return call


def splits(mixer):
    return mixer.supports_context_parallel


@pytest.mark.slow
@mixers_with(splits)
def test_segments_split_over_ranks_match_the_whole_sequence(config):
    require_property(segments_of_ranks_are_the_whole, config, DRAW, splits, examples=4)


class ReadsTwoRanksBack(Specimen):
    """Gathers the tokens of all ranks, and leaves out those of more than two before."""

    supports_context_parallel = True

    def mix(self, x, call):
        if (group := call.cp_group) is None:
            return super().mix(x, call)
        every = group.gather(x)
        whole = torch.cat([part if rank >= group.rank - 2 else 0 * part for rank, part in enumerate(every)], dim=1)
        documents = group.whole(call.documents, x.shape[1])
        y, after = super().mix(whole, call._replace(cp_group=None, documents=documents))
        return group.part(y), after


def test_mixer_reading_two_ranks_back_fails_the_check():
    wrong = type("WrongConfig", (SpecimenConfig,), {"layer": ReadsTwoRanksBack, "__module__": __name__})()
    with pytest.raises(CheckFailure, match="ranks of"):
        require_property(segments_of_ranks_are_the_whole, wrong, DRAW, splits)


def test_gathered_tensor_may_be_overwritten_after_sending():
    ranks, x = [torch.nn.Module() for _ in range(3)], torch.arange(12.0).view(1, 6, 2)
    call = lambda rank: lambda x, _: (rank.cp_group.gather(sent := x.clone()).sum(0), sent.zero_())  # noqa: E731
    y, _ = _over_ranks(ranks, call, 0)(x, None)
    assert torch.equal(y, x.unflatten(1, (3, 2)).sum(1).repeat(1, 3, 1))
