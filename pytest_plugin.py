"""Options of pytest for the conformance tests of any project: `--seqmix-check`, `--seqmix-stress`, `--seqmix-examples`.

pytest imports this whenever seqmix is installed, so it imports nothing of the library but what the tests have imported.
"""

import sys
from typing import Any

import pytest

ERROR = "seqmix_error"
"""Where a worker of pytest-xdist leaves it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("seqmix", "conformance of mixers and kernels, as seqmix.testing checks it")
    text = "of the tests that seqmix.testing makes of checks, run those of this one; may be repeated"
    group.addoption("--seqmix-check", action="append", default=[], metavar="NAME", help=text)
    text = "cases of the largest check, whatever the tests ask for; others take a share"
    group.addoption("--seqmix-examples", type=int, metavar="N", help=text)
    text = "the checks of `seqmix check --stress` too, where tests do not name checks"
    group.addoption("--seqmix-stress", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Hand on what decorators need to know while tests are collected."""
    names, stress = config.getoption("seqmix_check") or [], bool(config.getoption("seqmix_stress"))
    if stress or names:
        from .testing import CHECKS
        from .testing.engine.parametrize import COMMAND_LINE

        named = any(CHECKS[name].stress for name in names if name in CHECKS)
        COMMAND_LINE.stress = named or stress


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not selected, and hand on the number of examples."""
    if "seqmix.testing" not in sys.modules:  # no test is one of the kit
        return
    from .registry import SeqmixError, require_name
    from .testing.check import CHECKS, KERNEL_CHECKS
    from .testing.engine.parametrize import COMMAND_LINE, BoundCheck

    names, examples = set(config.getoption("seqmix_check") or ()), config.getoption("seqmix_examples")
    try:
        for name in names:
            require_name("check", name, [*CHECKS, *KERNEL_CHECKS])
        if examples is not None and examples < 1:
            raise SeqmixError(f"--seqmix-examples needs an integer >= 1, and was given {examples}")
    except SeqmixError as error:
        output = getattr(config, "workeroutput", None)
        if output is None:
            raise pytest.UsageError(str(error)) from None
        output[ERROR], items[:] = str(error), []  # a worker of pytest-xdist cannot say what is wrong
        return
    if examples is not None:
        COMMAND_LINE.examples = examples
    kept, left_out = [], []
    for item in items:
        check = getattr(getattr(item, "callspec", None), "params", {}).get("check")
        (left_out if names and isinstance(check, BoundCheck) and check.name not in names else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Say what a worker of pytest-xdist found wrong with the options."""
    if text := getattr(node, "workeroutput", {}).get(ERROR):
        raise pytest.UsageError(text)
