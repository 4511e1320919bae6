"""Reference runs, trained once and shared by tests, and processes that start with all imports done."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import run_of

from seqmix import RunConfig


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Callable[[RunConfig], Path]:
    """The uninterrupted run of a configuration of `config_of`, whose text is always the same."""
    made: dict[str, Path] = {}

    def call(config: RunConfig) -> Path:
        key = config.model_dump_json(exclude={"data": {"paths"}})
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            run_of(config, made[key])
        return made[key]

    return call


@pytest.fixture(scope="session")
def processes():
    """Processes that are forked from one that has imported torch, and its compiler."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs processes that fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["seqmix.cli.app", "seqmix.cli.progress", "torch._dynamo"])
    return context
