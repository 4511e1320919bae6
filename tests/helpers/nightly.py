"""The mark of tests that take too long for every run of continuous integration."""

import pytest
from hypothesis import settings

NIGHTLY = pytest.mark.skipif(settings().max_examples < 1000, reason="takes minutes: --hypothesis-profile nightly")
