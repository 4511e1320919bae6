"""Former names of modules: each works for one more minor version, with a warning."""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType

UNTIL_0_4: Mapping[str, str] = {
    "seqmix.ops.autograd": "seqmix.ops.runtime.custom_op",
    "seqmix.ops.call": "seqmix.ops.runtime.call",
    "seqmix.ops.chunkwise": "seqmix.ops.recurrence.chunk_loop",
    "seqmix.ops.packing": "seqmix.ops.runtime.packing",
    "seqmix.ops.paradigm": "seqmix.ops.runtime.paradigm",
    "seqmix.ops.recurrent": "seqmix.ops.recurrence.token_loop",
    "seqmix.ops.softmax": "seqmix.ops.attention",
    "seqmix.ops.softmax.cache": "seqmix.ops.attention.kv_cache",
    "seqmix.training.averaging": "seqmix.training.checkpoint.averaging",
    "seqmix.training.errors": "seqmix.training.checkpoint.errors",
    "seqmix.training.events": "seqmix.training.monitoring.events",
    "seqmix.training.loggers": "seqmix.training.monitoring.loggers",
    "seqmix.training.optim": "seqmix.training.optimizer",
    "seqmix.training.saved_prompt_cache": "seqmix.training.checkpoint.saved_prompt_cache",
    "seqmix.training.saved_run": "seqmix.training.checkpoint.saved_run",
}
"""Modules of version 0.2 with their present names. To be removed in 0.4."""
UNTIL_0_5: Mapping[str, str] = {
    "seqmix.benchmarks": "seqmix.lab.bench",
    "seqmix.benchmarks.measure": "seqmix.lab.bench.timing",
    "seqmix.commands": "seqmix.cli.commands",
    "seqmix.convert": "seqmix.interop.convert",
    "seqmix.convert.theirs": "seqmix.interop.convert.source_config",
    "seqmix.data.kinds": "seqmix.data.tasks",
    "seqmix.data.slices": "seqmix.data.loss_slices",
    "seqmix.deploy": "seqmix.interop.onnx",
    "seqmix.experiments": "seqmix.lab.study",
    "seqmix.experiments.benchmark_figures": "seqmix.lab.bench.figures",
    "seqmix.experiments.coordinates": "seqmix.lab.coordinates",
    "seqmix.experiments.figures": "seqmix.lab.figures",
    "seqmix.experiments.pages": "seqmix.lab.markdown",
    "seqmix.experiments.precision": "seqmix.lab.precision.measure",
    "seqmix.experiments.precision_report": "seqmix.lab.precision.report",
    "seqmix.experiments.retnet_paper": "seqmix.lab.paper",
    "seqmix.experiments.results": "seqmix.lab.study.results_file",
    "seqmix.experiments.state_format": "seqmix.lab.precision.state_format",
    "seqmix.experiments.studies": "seqmix.lab.studies",
    "seqmix.experiments.suite": "seqmix.lab.suite",
    "seqmix.experiments.suite.entries": "seqmix.lab.suite.leaderboard",
    "seqmix.experiments.units": "seqmix.lab.units",
    "seqmix.harness": "seqmix.interop.lm_eval",
    "seqmix.hf": "seqmix.interop.hf",
    "seqmix.inspection": "seqmix.lab.inspect",
    "seqmix.linearize": "seqmix.lab.linearize",
    "seqmix.linearize.course": "seqmix.lab.linearize.linearization",
    "seqmix.mixers.context_parallel": "seqmix.mixers.base.context_parallel",
    "seqmix.mixers.contract": "seqmix.mixers.base.contract",
    "seqmix.mixers.influence": "seqmix.mixers.base.influence",
    "seqmix.mixers.parts.choice": "seqmix.mixers.parts.sparse_attention",
    "seqmix.mixers.parts.decay_rates": "seqmix.mixers.retention",
    "seqmix.mixers.parts.distances": "seqmix.mixers.attention",
    "seqmix.mixers.parts.value_residual": "seqmix.mixers.rwkv7",
    "seqmix.mixers.roles": "seqmix.mixers.base.roles",
    "seqmix.mixers.rollback": "seqmix.mixers.base.rollback",
    "seqmix.mixers.state": "seqmix.mixers.base.state",
    "seqmix.mixers.traits": "seqmix.mixers.base.traits",
    "seqmix.models.drafts": "seqmix.models.drafting",
    "seqmix.models.linear": "seqmix.models.cpu_linear",
    "seqmix.models.loop": "seqmix.models.looped_layers",
    "seqmix.ops.choice": "seqmix.ops.sparse_attention",
    "seqmix.playground": "seqmix.lab.playground",
    "seqmix.pytest_plugin": "seqmix.cli.pytest_plugin",
    "seqmix.training.start": "seqmix.training.warm_start",
}
"""Modules and packages of version 0.3 with their present names. To be removed in 0.5."""
MODULES = {**UNTIL_0_4, **UNTIL_0_5}


def present_name(name: str) -> str | None:
    """Return the present name of a module with a former name, or of a module in such a package; None for others."""
    former, rest = name, ""
    while former not in MODULES:
        former, dot, last = former.rpartition(".")
        rest = f"{dot}{last}{rest}"
        if not former:
            return None
    return f"{MODULES[former]}{rest}"


class _Finder(MetaPathFinder, Loader):
    """Import hook for former module names: the imported module looks up every name in the present module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        present = present_name(fullname)
        if present is None or (fullname not in MODULES and find_spec(present) is None):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        present = importlib.import_module(_warn_of(module.__name__))
        vars(module)["__getattr__"] = lambda name: getattr(present, name)

    def get_code(self, fullname: str) -> CodeType:
        """Return a program that runs the present module, for `python -m`."""
        program = f"import runpy; runpy.run_module({_warn_of(fullname)!r}, run_name='__main__', alter_sys=True)"
        return compile(program, fullname, "exec")


def _warn_of(name: str) -> str:
    """Return the present name of a module, after a warning that names it."""
    present = str(present_name(name))
    if name in MODULES:  # else its package has been imported, which warned
        warnings.warn(f"{name} is now {present}: import it from there", DeprecationWarning, stacklevel=3)
    return present


def find_former_modules() -> None:
    """Install the import hook, so that Python finds the modules of `MODULES` under their former names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
