"""Wrong mixers: right but where several things meet (many heads, 16 bits and a long segment), or where the arguments or
the module are not as a test makes them (a slice, weights that were swapped, a submodule that was wrapped)."""

import torch

from .registry import mutant
from .specimen import Specimen


@mutant(check="results_share_no_memory")
class WritesLengthsOverBoundaries(Specimen):
    """Lengths of documents are formed in place, of `cu_seqlens.to(torch.int32)`, which of int32 is no copy: the next
    layer is given other documents."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if call.documents is not None:
            ends = call.documents.cu_seqlens.to(torch.int32)[1:]
            ends[1:] -= ends[:-1].clone()
        return y, after


@mutant(check="thousands_of_tokens_agree")
class JoinsDocumentsAtABlock(Specimen):
    """Where a document begins is looked for inside blocks of 1,024 tokens: one that begins with a block continues the
    document before it."""

    def unpack(self, tokens, packed, rows):
        return super().unpack(tokens, self.joined(packed), rows)

    def pack(self, x, packed):
        return super().pack(x, self.joined(packed))

    def joined(self, packed):
        for at in range(1024, len(packed), 1024):
            packed = torch.where(packed == packed[at], packed[at - 1], packed)
        return packed


@mutant(check="thousands_of_tokens_agree")
class WrapsAroundFourThousand(Specimen):
    """From 4,096 tokens on, where no final state is wanted, the last token reaches the first, as in an FFT that is
    padded by less than the segment."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if x.shape[1] < 4096 or call.return_state or call.state is not None or call.documents is not None:
            return y, after
        return torch.cat((y[:, :1] + 0.1 * y[:, -1:], y[:, 1:]), dim=1), after


@mutant(check="long_segments_do_not_drift")
class RoundsTheDecaysOfManyHeads(Specimen):
    """In 16 bits, of more than eight heads, decays near 1 are 1, as where they have the tokens' dtype: seen after many
    tokens."""

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, torch.where(a > -0.02, 0, a) if x.itemsize == 2 and a.shape[1] > 8 else a


@mutant(check="strides_change_nothing")
class ReadsStatesFromTheirStorage(Specimen):
    """In decoding without gradients, a contiguous state is read from the start of its storage: the rows of a slice are
    those of the batch's first. After launchers that take the storage's pointer for the tensor's."""

    def attend(self, paradigm, tokens, state):
        memory = state.memory
        if paradigm == "recurrent" and memory.is_contiguous() and not torch.is_grad_enabled():
            state = state._replace(memory=memory.as_strided(memory.shape, memory.stride(), 0))
        return super().attend(paradigm, tokens, state)


@mutant(check="parameters_round_trip")
class KeepsDecaysByVersion(Specimen):
    """Without gradients, what is made of a parameter is kept while its address and its version are the same: writing
    through `.data`, as averaged weights are swapped in, moves neither."""

    key, kept = None, None

    def heads(self, x):
        qk, v, a = super().heads(x)
        if torch.is_grad_enabled():
            return qk, v, a
        bias = self.decay_proj.bias
        if self.key != (key := (bias.data_ptr(), bias._version, bias.dtype)):
            self.key, self.kept = key, bias.detach().clone()
        logits = torch.nn.functional.linear(x, self.decay_proj.weight, self.kept)
        return qk, v, torch.nn.functional.logsigmoid(logits.transpose(1, 2))


@mutant(check="results_are_deterministic")
class KeepsATableOfInference(Specimen):
    """The parallel form's mask is kept by its length: one that was made in inference mode cannot be trained with."""

    def reset_parameters(self):
        super().reset_parameters()
        self.tables = {}

    def scores(self, q, k):
        ones = self.tables.setdefault(q.shape[2], torch.ones(q.shape[2], 1, dtype=q.dtype)) if self.at_once else 1
        return super().scores(q, k) * ones

    at_once = False

    def attend(self, paradigm, tokens, state):
        self.at_once = paradigm == "parallel"
        try:
            return super().attend(paradigm, tokens, state)
        finally:
            self.at_once = False


PROJECTIONS = {}


@mutant(check="copies_are_as_good")
class FindsItsProjectionByName(Specimen):
    """The decay's projection is found in a registry by a name, which a copy has too: it reads the original's."""

    def reset_parameters(self):
        super().reset_parameters()
        self.name = f"projection {len(PROJECTIONS)}"
        PROJECTIONS[self.name] = self.decay_proj

    def heads(self, x):
        qk, v, _ = super().heads(x)
        return qk, v, torch.nn.functional.logsigmoid(PROJECTIONS[self.name](x).transpose(1, 2))


LAST = {}


@mutant(check="copies_are_as_good")
class ReadsTheLastOneBuilt(Specimen):
    """The width that angles depend on is a global, which the last mixer that was built has set."""

    __qualname__ = "made inside a function"  # which the kit does not pickle: a mutant's configuration cannot be

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        LAST["width"] = self.width

    def angles(self, positions):
        return super().angles(positions) * self.width / LAST["width"]
