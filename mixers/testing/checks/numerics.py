"""Low precision, autocast, extremes, and that a result is a function of its arguments."""

import torch

from ...state import map_state, to_dict
from ..case import Draw
from ..check import check
from ..compare import near, require
from ..trial import Trial, float_leaves

LOW = (torch.float32, torch.bfloat16, torch.float16)
STEPS = 160
"""Tokens decoded one by one: a state that is rounded at every token drifts."""


@check(share=0.2, draw=Draw(pieces=(2, 3), tokens=(12, 30), batch_size=(2, 2), starts=("none", "read"), dtypes=LOW))
def low_precision_is_near_float64(trial: Trial) -> None:
    """float32, bfloat16 and float16 are near float64 on the same rounded numbers, with a state carried along."""
    exact, tolerance = trial.rebuilt(torch.float64), trial.subject.tolerances[trial.case.dtype]
    x, state = trial.tokens(), trial.state()
    expected, _ = trial.mix(x.double(), _wide(state), exact, paradigm=trial.reference)
    for paradigm in trial.paradigms:
        outputs, after = [], state
        for piece in x.split(trial.case.lengths, dim=1):
            y, after = trial.mix(piece, after, paradigm=paradigm)
            outputs.append(y)
        near("the output", f"{paradigm} in {trial.case.dtype}", torch.cat(outputs, dim=1), expected, tolerance)


@check(share=0.1, draw=Draw(tokens=(STEPS, STEPS), batch_size=(1, 1), starts=("none",), dtypes=LOW))
def long_decoding_does_not_drift(trial: Trial) -> None:
    """The state is wide: after many segments of one token, low precision is as near float64 as after one segment."""
    exact, tolerance = trial.rebuilt(torch.float64), trial.subject.tolerances[trial.case.dtype]
    x = trial.tokens()
    expected, _ = trial.mix(x.double(), None, exact)
    outputs, state = [], trial.mixer.init_state(1, max_length=STEPS)
    with torch.no_grad():
        for t in range(STEPS):
            y, state = trial.mixer(x[:, t : t + 1], state, paradigm=trial.reference, return_state=True)
            outputs.append(y)
    y, last = torch.cat(outputs, dim=1), STEPS // 4
    what = f"the last {last} of {STEPS} segments of one token in {trial.case.dtype}"
    near("the output", what, y[:, -last:], expected[:, -last:], tolerance)


@check(share=0.15, draw=Draw(tokens=(1, 6), dtypes=(torch.float64, *LOW)))
def dtypes_are_kept(trial: Trial) -> None:
    """Output has the input's dtype; a state's leaves have those of init_state, which are wide (or a cache's)."""
    mixer, x, state = trial.mixer, trial.tokens(), trial.state()
    initial = to_dict(mixer.init_state(trial.case.batch_size))
    for name, leaf in initial.items():
        allowed = (mixer.state_dtype, mixer.dtype, torch.int64)
        require(leaf.dtype in allowed, f"init_state: {name} is {leaf.dtype}; positions are int64, floats {allowed[:2]}")
    for paradigm in trial.paradigms:
        y, after = trial.mix(x, state, paradigm=paradigm)
        require(y.dtype == x.dtype, f"{paradigm}: the output is {y.dtype}, and the input is {x.dtype}")
        require(y.shape == x.shape, f"{paradigm}: the output is {list(y.shape)}, and the input is {list(x.shape)}")
        for name, leaf in to_dict(after).items():
            wanted = initial[name].dtype
            require(leaf.dtype == wanted, f"{paradigm}: the state's {name} is {leaf.dtype}, and init_state's {wanted}")


@check(
    share=0.15,
    draw=Draw(tokens=(24, 40), batch_size=(2, 2), starts=("none", "initial", "read"), dtypes=(torch.float32,)),
)
def autocast_changes_only_precision(trial: Trial) -> None:
    """Under autocast to bfloat16 the output is near float64, gradients are finite, and a state's leaves keep their
    dtypes."""
    tolerance, device = trial.subject.tolerances[torch.bfloat16], trial.subject.device.type
    x, state = trial.tokens(), trial.state()
    exact = trial.rebuilt(torch.float64)
    expected, _ = trial.mix(x.double(), _wide(state), exact, paradigm=trial.reference)
    initial = to_dict(trial.mixer.init_state(trial.case.batch_size))
    for paradigm in trial.paradigms:
        with torch.autocast(device, torch.bfloat16):
            y, after = trial.mixer(x, state, paradigm=paradigm, return_state=True)
        near("the output", f"{paradigm} under autocast", y, expected, tolerance)
        for name, leaf in to_dict(after).items():
            wanted = initial[name].dtype
            require(
                leaf.dtype == wanted, f"{paradigm} under autocast: the state's {name} is {leaf.dtype}, not {wanted}"
            )
        for name, gradient in zip(
            dict(trial.mixer.named_parameters()),
            torch.autograd.grad(y.float().square().sum(), list(trial.mixer.parameters()), materialize_grads=True),
            strict=True,
        ):
            require(gradient.isfinite().all(), f"{paradigm} under autocast: the gradient of {name} is not finite")


@check(share=0.1, draw=Draw(tokens=(1, 300), batch_size=(1, 1), dtypes=(torch.float32,)))
def extremes_are_finite(trial: Trial) -> None:
    """Long segments, long runs of zeros, inputs of a thousand (so extreme gates and decays) give finite results and
    gradients."""
    x, state, half = trial.tokens(), trial.state(), trial.case.length // 2
    inputs = {
        "normal inputs": x,
        "inputs of a thousand": 1000 * x,
        "zeros": torch.zeros_like(x),
        "zeros before the second half": torch.cat((torch.zeros_like(x[:, :half]), x[:, half:]), dim=1),
        "zeros after the first half": torch.cat((x[:, :half], torch.zeros_like(x[:, half:])), dim=1),
    }
    for what, tokens in inputs.items():
        for paradigm in trial.paradigms:
            results, after = trial.differentiate(
                lambda x, state, paradigm=paradigm: trial.mixer(x, state, paradigm=paradigm, return_state=True),
                tokens,
                state,
            )
            results |= {f"the final state's {name}": leaf for name, leaf in float_leaves(after).items()}
            for name, tensor in results.items():
                require(tensor.isfinite().all(), f"{paradigm}, {what}: {name} is not finite")


@check(share=0.12, draw=Draw(tokens=(1, 9)))
def results_are_deterministic(trial: Trial) -> None:
    """Twice the same arguments give the same bits, forward and backward; no random number is drawn and no parameter,
    buffer or attribute remembers a call."""
    x, state, other = trial.tokens(), trial.state(), trial.tokens()
    before = torch.random.get_rng_state()
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(trial.mixer).items()}

    def run(x, paradigm):
        return trial.differentiate(
            lambda x, state: trial.mixer(x, state, paradigm=paradigm, return_state=True), x, state
        )

    for paradigm in trial.paradigms:
        first, after = run(x, paradigm)
        run(other, paradigm)
        second, again = run(x, paradigm)
        with trial.differences(f"{paradigm}, a second call against the first", 0) as found:
            found.tensors(second, first)
            found.state("the final state", again, after)
    require(torch.equal(before, torch.random.get_rng_state()), "mixing drew numbers from the global generator")
    with trial.differences("parameters and buffers after mixing against before", 0) as found:
        for name, tensor in _tensors(trial.mixer).items():
            found.tensor(name, tensor.detach(), kept[name])


def _tensors(mixer):
    return dict(mixer.named_parameters()) | dict(mixer.named_buffers())


def _wide(state):
    """A state with the dtypes that the float64 mixer's states have."""
    if state is None:
        return None
    return map_state(lambda leaf: leaf.to(torch.float64) if leaf.is_floating_point() else leaf, state)
