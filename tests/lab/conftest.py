"""Small studies, and a browser."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from seqmix.lab.study.plan import plan
from seqmix.lab.study.study import load_study

STUDY = """
question: Does it run?
base: retnet-tiny
model: {d_model: 16, n_layers: 1}
mixers: [retention, attention]
match: {parameters: retention, knob: blocks.*.ffn.expansion}
data: {sequence_length: 16, paths: [text.txt]}
training: {optimizer: adamw, steps: 120, warmup_steps: 1, batch_size: 2, evaluate_every: 40, evaluation_batches: 1,
           final_evaluation_batches: 2, checkpoint_every: 20, log_every: 1}
"""


@pytest.fixture(scope="session")
def small():
    """The text of a small study."""
    return STUDY


@pytest.fixture
def written(tmp_path):
    """Write the file of the small study with extra lines and return it."""

    def call(more="", *, study=STUDY):
        file = tmp_path / "small.yaml"
        file.write_text(study + more)
        return file

    return call


@pytest.fixture
def planned(written):
    """Plan the small study with extra lines."""

    def call(more="", *, study=STUDY):
        file = written(more, study=study)
        return plan(load_study(file), file)

    return call


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless browser; the test is skipped without playwright or a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser: install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()
