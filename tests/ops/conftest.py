"""Fixtures shared by the tests of compiled ops."""

import pytest
import torch
import torch._dynamo.testing


@pytest.fixture
def counter():
    """A backend that counts the graphs of the compiler's front end and runs them uncompiled, which saves seconds."""
    torch._dynamo.reset()
    return torch._dynamo.testing.CompileCounterWithBackend("eager")
