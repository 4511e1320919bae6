"""Wrong mixers: numerics."""

import torch

from .registry import mutant
from .specimen import Specimen, SpecimenState


@mutant(check="low_precision_is_near_float64", after="fla #36: chunk and recurrent differ in precision")
class ReadsTheStateInTF32(Specimen):
    """In float32, segments of several tokens read the state with the 10 bits of TF32."""

    def attend(self, paradigm, tokens, state):
        memory = state.memory
        if memory.dtype == torch.float32 and tokens[0].shape[2] > 1:
            memory = memory.to(torch.float16).to(torch.float32)
        return super().attend(paradigm, tokens, state._replace(memory=memory))


@mutant(check="low_precision_is_near_float64", after="fla #863 and #875: wrong gradients where outputs are right")
class HalvesGradientsInLowPrecision(Specimen):
    """In bfloat16 and float16 the gradient of the input is half of what it should be."""

    def heads(self, x):
        return super().heads(x if x.itemsize > 2 else (x + x.detach()) / 2)


@mutant(check="packing_keeps_precision", after="fla #36: chunk and recurrent differ in precision")
class PacksInBFloat16(Specimen):
    """In float32, packed values are rounded to bfloat16."""

    def unpack(self, tokens, packed, rows):
        q, k, v, *rest = super().unpack(tokens, packed, rows)
        return [q, k, v if v.dtype == torch.float64 else v.to(torch.bfloat16).to(v.dtype), *rest]


@mutant(
    check="long_decoding_does_not_drift", after="sgl-project/sglang #38975: rounding accumulates in the recurrent state"
)
class RoundsTheStateItReads(Specimen):
    """A state is float32, and is rounded to the parameters' dtype where it is read."""

    def before(self, state, rows):
        memory, weight, position = super().before(state, rows)
        return SpecimenState(*(leaf.to(self.dtype).to(leaf.dtype) for leaf in (memory, weight)), position)


@mutant(check="dtypes_are_kept", after="fla #1187: states in float16 became NaN")
class StartsAndStaysNarrow(Specimen):
    """The state has the parameters' dtype from its beginning, as only a cache may."""

    def init_state(self, batch_size, *, max_length=None):
        state = super().init_state(batch_size)
        return state._replace(memory=state.memory.to(self.dtype))

    def before(self, state, rows):
        state = super().before(state, rows)
        return state._replace(memory=state.memory.to(self.state_dtype))

    def mix(self, x, call):
        y, after = super().mix(x, call)
        return y, after._replace(memory=after.memory.to(self.dtype))


@mutant(
    check="autocast_changes_only_precision", after="our own history: autocast leaked into an op's body in eager mode"
)
class CarriesTheStateUnderAutocast(Specimen):
    """Under autocast the recurrent state is carried in autocast's dtype."""

    def mix(self, x, call):
        y, after = super().mix(x, call)
        if not torch.is_autocast_enabled(x.device.type):
            return y, after
        return y, after._replace(memory=after.memory.to(torch.get_autocast_dtype(x.device.type)))

    def before(self, state, rows):
        state = super().before(state, rows)
        return state._replace(memory=state.memory.to(self.state_dtype))


@mutant(check="extremes_are_finite", after="fla #77, #99 and #122: gradients and outputs of NaN")
class DividesByTheNormOfZero(Specimen):
    """A vector of zeros is divided by its norm."""

    def unit(self, x):
        return x / x.norm(dim=-1, keepdim=True)


@mutant(check="extremes_are_finite", after="fla 0.6.0: retention's gamma^T underflows float32 after 2,800 tokens")
class FactorisesDecays(Specimen):
    """A decay from token j to token i is a factor of i times one of j, of which one overflows."""

    def decays(self, a):
        passed = a.cumsum(-1)
        return (passed.exp()[..., None] * (-passed).exp()[..., None, :]).tril()


@mutant(
    check="long_segments_do_not_drift", after="huggingface/transformers: inverse frequencies in a buffer that is cast"
)
class KeepsDecaysInABuffer(Specimen):
    """Fixed decays just below 1 are a buffer, which a cast of the mixer to 16 bits makes 1."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.register_buffer("gamma", torch.empty(config.n_heads))
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "gamma"):
            self.gamma.fill_(1 - 2**-10)

    def heads(self, x):
        qk, v, a = super().heads(x)
        return qk, v, (a + self.gamma.to(a.dtype).log()[:, None]).to(a.dtype)


@mutant(
    check="long_segments_do_not_drift", after="huggingface/transformers: positions in bfloat16, which counts to 256"
)
class CountsInTheTokensDtype(Specimen):
    """Positions inside a segment are numbers of the tokens' dtype: bfloat16 counts to 256."""

    def positions(self, state, x, call):
        positions = super().positions(state, x, call)
        first = positions[:, :1]
        return first + (positions - first).to(x.dtype).to(torch.int64)


@mutant(check="late_positions_are_exact", after="our own history: Mamba-3's angle in float32 increments")
class HasAnglesInFloat32(Specimen):
    """Angles are float32 where inputs are: off by 2e-2 at position 1e6."""

    def turn(self, x, positions):
        angles = self.angles(positions).to(self.wide(x))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
