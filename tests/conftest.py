"""Where the conformance kit runs: on the CPU, and on a GPU where there is one; `--device` chooses."""

import pytest
import torch
from hypothesis import settings

# ten times the cases: pytest -m conformance --hypothesis-profile nightly
settings.register_profile("nightly", max_examples=10 * settings().max_examples)


def pytest_addoption(parser):
    parser.addoption("--device", action="append", help="where conformance is checked; may be given several times")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        found = metafunc.config.getoption("device") or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        metafunc.parametrize("device", found)


@pytest.fixture(autouse=True)
def _device_is_there(request):
    if "device" in request.fixturenames:
        device = request.getfixturevalue("device")
        if device.startswith("cuda") and not torch.cuda.is_available():
            pytest.fail(f"--device {device}, and torch finds no GPU", pytrace=False)
