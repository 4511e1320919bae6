"""flash-linear-attention's plain references (fla-core 0.6.0), by their files: importing fla needs triton, and takes
seconds. Almost all cast to float32 inside: agreement is to 3e-5.
"""

from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

# not importorskip: it would also skip where fla is installed and its import fails; an uninstalled one leaves a folder
INSTALLED = getattr(find_spec("fla"), "origin", None) is not None
needs_fla = pytest.mark.skipif(not INSTALLED, reason="needs pip install --no-deps fla-core")


def path_of(op, file):
    return Path(find_spec("fla").submodule_search_locations[0], "ops", op, f"{file}.py")


@cache
def loaded(op, file="naive"):
    """One of their modules."""
    spec = spec_from_file_location(f"fla_{op}_{file}", path_of(op, file))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_gradients(function, arguments):
    """What a function returns, and the gradient of each argument (None where it plays no part)."""
    arguments = [None if x is None else x.clone().requires_grad_() for x in arguments]
    results = [x for x in function(*arguments) if x is not None]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in results)
    gradients = iter(torch.autograd.grad(loss, [x for x in arguments if x is not None], allow_unused=True))
    return [x.detach() for x in results], [None if x is None else next(gradients) for x in arguments]


def agree(actual, expected):
    assert_close(actual, expected, rtol=3e-5, atol=3e-5, check_dtype=False)
