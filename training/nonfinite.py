"""Where NaN or infinity first appeared: the first module in forward, the first parameter in backward.

Documents that are packed into one row may get such numbers from each other, since masked products add 0 * NaN. In the
output of the first module they have not spread yet, and so the document is named too.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..ops.packing import document_of_token
from ..registry import SeqmixError
from .sharding import local_tensor


class NotFiniteError(SeqmixError):
    """A loss or a gradient is NaN or infinite: which, and where that began."""


@torch.no_grad()
def first_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The innermost module that first returns a value that is not finite, as text; None if all values are finite.

    Where documents are packed, and some have such values and some have not, the first one that has is named too.

    `forward` calls the model that returned such a value; it runs again in eager mode, as compiled code has no hooks.
    """
    found: list[str] = []
    boundaries: list[Tensor | None] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 torch's signature
        value = output[0] if isinstance(output, tuple) else output
        if found or module not in names or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if not local_tensor(value).isfinite().all():
            bad = [name for name, p in module.named_parameters(recurse=False) if not local_tensor(p).isfinite().all()]
            at_fault = f", whose {bad[0]} is not finite" if bad else ""
            found.append(names[module] + at_fault + _in_document(value, boundaries[-1] if boundaries else None))

    def remember(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:  # noqa: ARG001
        boundaries.append(named.get("cu_seqlens"))

    packing = model.register_forward_pre_hook(remember, with_kwargs=True)
    with packing, register_module_forward_hook(watch), torch.compiler.set_stance("force_eager"):
        forward()
    return found[0] if found else None


def _in_document(value: Tensor, cu_seqlens: Tensor | None) -> str:
    """Which document of a packed row a value [1 T ...] is not finite in, as text: nothing if that is all of them."""
    length = 0 if cu_seqlens is None else int(cu_seqlens[-1])
    # a rank's own segment, and what has no dimension of tokens, cannot be attributed
    if cu_seqlens is None or value.ndim < 3 or value.shape[:2] != (1, length):
        return ""
    bad = ~local_tensor(value)[0].flatten(1).isfinite().all(1)
    of_token = document_of_token(cu_seqlens, length)
    documents, all_documents = of_token[bad].unique(), of_token.unique()
    if len(documents) == len(all_documents):
        return ""
    start, stop = cu_seqlens[documents[0] :][:2].tolist()
    others = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
    return f", in document {documents[0]} of the packed row (tokens {start} to {stop - 1}){others}"


def first_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter in backward order whose gradient is not finite; None if all are finite."""
    named = reversed(list(parameters))
    return next((name for name, p in named if p.grad is not None and not local_tensor(p.grad).isfinite().all()), None)
