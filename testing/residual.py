"""Check of a residual connection: what every kind keeps of a model.

check_residual(build_model(load_config("attention-tiny", ["model.residual={kind: my_kind}"]).model))
"""

import copy
from typing import Any

import torch
from torch import Tensor

from ..mixers.base.roles import roles_of
from ..mixers.base.traits import ContractError
from ..ops.runtime.paradigm import Paradigm
from .compare import EXACT, CheckFailure, Differences, require

SPREAD = 0.2
"""Standard deviation of the noise that moves the parameters of connections away from their start."""


def check_residual(model: Any, *, starts_plain: bool = True, tolerance: float = 1e-6) -> None:
    """Check the residual connections of a model, in float64, on a copy of it.

    - It starts as the model with plain connections, if `starts_plain`.
    - Tokens one by one, and packed documents, give what whole sequences give.
    - Activation checkpointing changes neither the loss nor a gradient.
    - Gradients reach every parameter; in the first branch, which may have nothing to choose from, they need not.
    - Every parameter has a role.
    - A training step in bfloat16 autocast runs: a branch then returns another dtype than that of the stream.

    Args:
        model: a new `LanguageModel`, whose mixers have states.
        starts_plain: False for a kind that does not start as the plain connection.
        tolerance: relative and absolute difference from the plain model that is allowed at the start.

    Raises:
        CheckFailure: one of these properties does not hold.
    """
    _require_autocast(copy.deepcopy(model))
    model = _in_float64(copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (2, 7), generator=generator)
    try:
        roles_of(model)
    except ContractError as error:
        raise CheckFailure(f"roles: {error}") from error
    if starts_plain:
        with Differences("at the start, against plain connections", tolerance) as differences:
            differences.tensor("the logits", *_both_starts(model, tokens))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if _is_of_a_connection(name):
                parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    _require_segments(model, tokens)
    _require_gradients(model, tokens)


def _in_float64(model: Any) -> Any:
    model = model.double().eval().requires_grad_(True)
    model.resolve_backends(torch.float64)
    return model


def _is_of_a_connection(name: str) -> bool:
    return name.startswith("residual.") or "_residual." in name


def _both_starts(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a model, and those of the model with plain connections and the same parameters."""
    default = type(model.config).model_fields["residual"].default
    plain = _in_float64(type(model)(model.config.model_copy(update={"residual": default})))
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False)
    require(not missing, f"a model with this connection lacks parameters of the plain model: {', '.join(missing)}")
    with torch.no_grad():
        return model(tokens).logits, plain(tokens).logits


@torch.no_grad()
def _require_segments(model: Any, tokens: Tensor) -> None:
    """Check that segments and packed documents are the whole."""
    whole = model(tokens).logits
    state = None
    logits = []
    paradigms = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE, from_state=True)
    for token in tokens.split(1, dim=1):
        output = model(token, state, paradigm=paradigms, return_state=True)
        state = output.state
        logits.append(output.logits)
    with Differences("tokens one by one against the whole", EXACT) as differences:
        differences.tensor("the logits", torch.cat(logits, 1), whole)
    if all(block.mixer.traits.packing for block in model.blocks):
        boundaries = torch.arange(len(tokens) + 1) * tokens.shape[1]
        packed = model(tokens.flatten()[None], cu_seqlens=boundaries).logits.view_as(whole)
        with Differences("packed documents against rows", EXACT) as differences:
            differences.tensor("the logits", packed, whole)


def _require_autocast(model: Any) -> None:
    """Check that a training step runs where branches return bfloat16 and the stream is float32.

    Two examples of our own, a highway connection and the plug-in `momentum`, mixed the two by `torch.lerp`, which
    refuses different dtypes.
    """
    tokens = torch.zeros(1, 4, dtype=torch.long)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.float().train()(tokens, targets=tokens).loss
        loss.backward()
    except RuntimeError as error:
        raise CheckFailure(
            f"a training step under autocast fails: {error}; a branch may return bfloat16 where the stream is float32, "
            "so convert its output: branch(x).to(x.dtype)"
        ) from error


def _require_gradients(model: Any, tokens: Tensor) -> None:
    """Check that gradients reach every parameter, and that activation checkpointing changes nothing."""
    expected = _gradients(model, tokens)
    for name, gradient in expected.items():
        if not name.startswith("blocks.0.mixer_residual."):
            require(gradient is not None and bool(gradient.any()), f"{name} has no gradient")
    for saved in (True, "matmuls"):
        model.activation_checkpointing = saved
        recomputed = _gradients(model, tokens)
        with Differences(f"with activation checkpointing ({saved}), against without", 0.0) as differences:
            for name, gradient in expected.items():
                if gradient is None:
                    continue
                again = recomputed[name]
                if again is None:
                    raise CheckFailure(f"{name} has no gradient with activation checkpointing")
                differences.tensor(f"the gradient of {name}", again, gradient)


def _gradients(model: Any, tokens: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
