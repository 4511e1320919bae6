"""pytest options for conformance tests in any project: `--seqmix-check`, `--seqmix-stress`, `--seqmix-examples`.

pytest imports this module whenever seqmix is installed, so it imports no part of seqmix until options or tests need it.
"""

import sys
from typing import Any

import pytest

ERROR = "seqmix_error"
"""Key in the output of a pytest-xdist worker for an error in the options."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this module to pytest."""
    group = parser.getgroup("seqmix", "conformance tests of mixers and kernels (seqmix.testing)")
    text = "run only the tests of this check, among those that seqmix.testing generates; may be repeated"
    group.addoption("--seqmix-check", action="append", default=[], metavar="NAME", help=text)
    text = "number of examples, of which each check draws a share, instead of the number that the tests set"
    group.addoption("--seqmix-examples", type=int, metavar="N", help=text)
    text = "also run the checks of `seqmix check --stress`, in tests that do not name checks"
    group.addoption("--seqmix-stress", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Set `COMMAND_LINE.stress`, which the decorators of seqmix.testing read while tests are collected."""
    names, asks_for_stress = config.getoption("seqmix_check") or [], bool(config.getoption("seqmix_stress"))
    if asks_for_stress or names:
        from ..testing import CHECKS
        from ..testing.engine.parametrize import COMMAND_LINE

        names_stress_check = any(CHECKS[name].stress for name in names if name in CHECKS)
        COMMAND_LINE.stress = names_stress_check or asks_for_stress


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of checks that --seqmix-check does not name, and apply --seqmix-examples."""
    if "seqmix.testing" not in sys.modules:  # no test uses the conformance kit
        return
    from ..registry import SeqmixError, require_name
    from ..testing.check import CHECKS, KERNEL_CHECKS
    from ..testing.engine.parametrize import COMMAND_LINE, BoundCheck

    names, examples = set(config.getoption("seqmix_check") or ()), config.getoption("seqmix_examples")
    try:
        for name in names:
            require_name("check", name, [*CHECKS, *KERNEL_CHECKS])
        if examples is not None and examples < 1:
            raise SeqmixError(f"--seqmix-examples expects an integer >= 1, got {examples}")
    except SeqmixError as error:
        output = getattr(config, "workeroutput", None)
        if output is None:
            raise pytest.UsageError(str(error)) from None
        output[ERROR], items[:] = str(error), []  # a pytest-xdist worker cannot print the error itself
        return
    if examples is not None:
        COMMAND_LINE.examples = examples
    selected, deselected = [], []
    for item in items:
        check = getattr(getattr(item, "callspec", None), "params", {}).get("check")
        is_other_check = names and isinstance(check, BoundCheck) and check.name not in names
        (deselected if is_other_check else selected).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = selected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Report the error that a pytest-xdist worker found in the options."""
    if text := getattr(node, "workeroutput", {}).get(ERROR):
        raise pytest.UsageError(text)
