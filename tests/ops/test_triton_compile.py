"""Triton kernels compiled for Hopper (sm_90) on any machine: the resources that each configuration needs.

Triton has its own assembler, so it detects without a GPU when a configuration spills registers, exceeds a block's
shared memory or misses the tensor cores. The tests compile the launches of real calls, which are made on the CPU while
their launches are recorded.

The tests compile the head size of the paper. Run as a program, this file compiles the whole table, which takes minutes,
and prints the resources of every kernel. Without arguments, it also writes the table of docs/appendix/measurements.md
if everything fits, with a stamp of the source files; a test fails if one of these files changed since the last run.

    python tests/ops/test_triton_compile.py [WORDS OF A NAME]
"""

import ast
import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from seqmix.lab.markdown import fill, table
from seqmix.ops.decay import decay as decay_op
from seqmix.ops.delta import delta
from seqmix.ops.kernels.triton.decay import launch as triton_launch
from seqmix.ops.kernels.triton.decay import op as decay_triton
from seqmix.ops.kernels.triton.decay import per_key_launch as triton_keys
from seqmix.ops.kernels.triton.decay.launch import Configuration, configurations
from seqmix.ops.kernels.triton.delta import op as delta_triton
from seqmix.ops.kernels.triton.delta.op import limits
from seqmix.ops.kernels.triton.launch import REGISTERS, Launch, kernels
from seqmix.ops.recurrence.family import Recurrence
from seqmix.ops.runtime.kernel import Kernel, Probe

triton = pytest.importorskip("triton") if __name__ != "__main__" else __import__("triton")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing can be compiled"
    ),
]

SHARED_LIMIT = 227 * 1024
"""Bytes that a block can have on sm_90."""
SHARED, RESERVED, WARPS = 228 * 1024, 1024, 64
"""Bytes of a multiprocessor, those that it keeps for each block, and the warps it holds."""
ROOT = Path(__file__).parents[2]
COMPILED = (
    "ops/kernels/triton/launch.py",
    "ops/kernels/triton/tiles.py",
    "ops/kernels/triton/decay/launch.py",
    "ops/kernels/triton/decay/bodies.py",
    "ops/kernels/triton/decay/per_key_launch.py",
    "ops/kernels/triton/decay/per_key_bodies.py",
    "ops/kernels/triton/delta/op.py",
    "ops/kernels/triton/delta/bodies.py",
)
"""What decides what is compiled."""
PAGE = ROOT / "docs/appendix/measurements.md"
HEADS = ((64, 64), (128, 64), (128, 128), (256, 512))
"""Key and value widths: those that each row of the table is for, and the widest."""
KEYS = {"key_decay", "key_pairs", "key_band", "key_backward"}
"""The kernels of keys that decay by themselves."""
PRECISION = re.compile(r"tt\.dot [^:]*?(?:inputPrecision = (\w+) )?: tensor<\w+xf32>")
"""Of a product of float32 in Triton's first representation; without a word it is IEEE's."""
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorded(NamedTuple):
    """One launch: a jitted function and its arguments."""

    function: Any
    arguments: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """Those of the launcher."""
        parameters = {parameter.name for parameter in self.function.params}
        return {name: value for name, value in self.arguments.items() if name not in parameters}

    def source(self) -> Any:
        """As Triton specialises it: None, 1 and `constexpr` are constants, multiples of 16 are known as such."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], list[list[object]]] = {}
        for i, parameter in enumerate(self.function.params):
            value = self.arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name], aligned = POINTERS[value.dtype], True
            elif isinstance(value, float):
                signature[parameter.name], aligned = "fp32", False
            else:
                signature[parameter.name], aligned = "i32", special and value % 16 == 0
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return triton.compiler.ASTSource(fn=self.function, signature=signature, constexprs=constants, attrs=attributes)


class Recorder:
    """In place of `kernels`: records what would be launched."""

    def __init__(self) -> None:
        self.launches: list[Recorded] = []

    def __call__(self, *module: str) -> Any:
        def grid_of(_: object, name: str) -> Any:
            function = getattr(kernels(*module), name)
            record = lambda **arguments: self.launches.append(Recorded(function, arguments))  # noqa: E731
            return type("Launcher", (), {"__getitem__": lambda self, grid: record})()

        return type("Kernels", (), {"__getattr__": grid_of})()


@contextmanager
def recorded_by(recorder: Recorder) -> Iterator[None]:
    """Calls launch nothing, and kernels take what they are given, wherever it is."""
    with (
        patch.object(triton_launch, "kernels", recorder),
        patch.object(decay_triton, "kernels", recorder),
        patch.object(triton_keys, "kernels", recorder),
        patch.object(delta_triton, "kernels", recorder),
        patch.object(Kernel, "require", lambda *_: None),
    ):
        yield


def chunkwise(
    configuration: Configuration,
    dtype: torch.dtype,
    widths: tuple[int, int],
    decay: str | None,
    *,
    learned: bool = True,
    packed: bool = True,
    beta: bool = False,
    wide_output: bool = False,
    shared: int = 1,
) -> list[Recorded]:
    """What forward and backward launch, with an initial and a final state that have gradients; of the delta rule with
    beta."""
    length, heads = 2 * configuration.chunk, 2 * shared
    shapes = {"H": (heads,), "B T H": (1, length, heads), "B T H K": (1, length, heads, widths[0])}
    a = None if decay is None else torch.zeros(shapes[decay], requires_grad=learned)
    sizes = ((2, widths[0]), (2, widths[0]), (heads, widths[1]))
    q, k, v = (torch.zeros(1, length, *size, dtype=dtype).requires_grad_() for size in sizes)
    boundaries = torch.tensor([0, length // 2, length]) if packed else None
    state = torch.zeros(2 if packed else 1, heads, *widths, requires_grad=True)
    recorder = Recorder()
    with (
        recorded_by(recorder),
        patch.object(triton_launch, "configuration_of", lambda _: configuration),
        patch.object(decay_triton, "configuration_of", lambda _: configuration),
    ):
        options = {"initial_state": state, "output_final_state": True, "cu_seqlens": boundaries, "backend": "triton"}
        if beta:
            found = delta(q, k, v, torch.ones(1, length, heads, requires_grad=True), a, **options)
        else:
            found = decay_op(q, k, v, a, wide_output=wide_output, **options)
        torch.autograd.backward([found.output, found.final_state], [torch.zeros_like(found.output), state.detach()])
    return recorder.launches


def step(dtype: torch.dtype, widths: tuple[int, int], decay: str | None) -> list[Recorded]:
    """What a step launches."""
    heads = 2
    shapes = {None: None, "H": (heads,), "B T H": (1, 1, heads), "B T H K": (1, 1, heads, widths[0])}
    a = None if decay is None else torch.zeros(shapes[decay])
    q, k, v = (torch.zeros(1, 1, heads, width, dtype=dtype) for width in (widths[0], *widths))
    state, recorder = torch.zeros(1, heads, *widths), Recorder()
    with recorded_by(recorder):
        scale = widths[0] ** -0.5
        call = Recurrence(q, k, v, a, None, state, None, None, scale, chunk_size=128, output_final_state=True)
        decay_triton.decay_step_triton(call)
    return recorder.launches


class Needs(NamedTuple):
    """What a compiled kernel takes."""

    registers: int
    """Per thread."""
    spilled: int
    """Bytes per thread, of the stack or of local memory: registers that did not suffice."""
    shared: int
    """Bytes per block."""
    tensor_cores: int
    """Warpgroup products in the code."""
    old_tensor_cores: int
    """Products of the instructions of earlier GPUs, at half the speed."""
    precisions: frozenset[str]
    """Of products of float32."""

    def blocks(self, warps: int) -> int:
        """Blocks of so many warps that a multiprocessor holds."""
        registers = -(-self.registers // 8) * 8 * 32 * warps
        return min(REGISTERS // registers, SHARED // (self.shared + RESERVED), WARPS // warps)

    def faults(self, recorded: Recorded) -> list[str]:
        """What is wrong with it."""
        warps, cap = recorded.options.get("num_warps", 4), recorded.options.get("maxnreg")
        threads, wanted = 32 * warps, 1 if cap is None else REGISTERS // (32 * warps * cap)
        products = recorded.function.__name__ not in {"clocks", "key_decay", "step"}
        products &= recorded.arguments.get("pairs") is None  # what is solved was formed before
        narrow = recorded.arguments.get("x", recorded.arguments.get("q")) if products else None
        faults = []
        if self.spilled:
            faults.append(f"spills {self.spilled} bytes per thread")
        if self.shared > SHARED_LIMIT:
            faults.append(f"takes {self.shared} bytes of shared memory, of {SHARED_LIMIT}")
        if self.registers * threads > REGISTERS:
            faults.append(f"takes {self.registers} registers for each of {threads} threads")
        elif self.shared <= SHARED_LIMIT and self.blocks(warps) < wanted:
            faults.append(f"leaves room for {self.blocks(warps)} blocks, not {wanted}")
        if narrow is not None and narrow.element_size() == 2 and (self.old_tensor_cores or not self.tensor_cores):
            faults.append("misses the tensor cores of sm_90")
        precision = recorded.arguments.get("PRECISION", "ieee")
        if others := self.precisions - {precision}:
            faults.append(f"has products of float32 that are {', '.join(sorted(others))} and not {precision}")
        return faults


def compile_for_hopper(recorded: Recorded) -> Needs:
    """Compile one launch for sm_90."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    binary = triton.compile(recorded.source(), target=target, options=recorded.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Needs(
        registers=used["REG"],
        spilled=used["STACK"] + used["LOCAL"],
        shared=binary.metadata.shared,
        tensor_cores=binary.asm["ptx"].count("wgmma.mma_async"),
        old_tensor_cores=binary.asm["ptx"].count("mma.sync.aligned"),
        precisions=frozenset(precision or "ieee" for precision in PRECISION.findall(binary.asm["ttir"])),
    )


def faults(launches: list[Recorded]) -> list[str]:
    """Everything that is wrong with the launches, each with the name of its kernel."""
    return [
        f"{recorded.function.__name__} {fault}"
        for recorded in launches
        for fault in compile_for_hopper(recorded).faults(recorded)
    ]


# ---- the tests: the paper's head


# the table of docs/appendix/measurements.md has all combinations, and its stamp says of which code
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "chunk", "decay"),
    [(torch.bfloat16, 128, "B T H"), (torch.float32, 32, "H"), (torch.float32, 64, "B T H")],
)
def test_paper_head_size_compiles_without_faults(dtype, chunk, decay):
    configuration, *_ = configurations(8 * dtype.itemsize, 256, 512, tf32x3=chunk == 64)
    assert configuration.chunk == chunk
    assert faults(chunkwise(configuration, dtype, (256, 512), decay)) == []


@pytest.mark.parametrize(
    ("dtype", "widths"), [(torch.bfloat16, (128, 256)), pytest.param(torch.float32, (64, 64), marks=pytest.mark.slow)]
)
def test_per_key_decay_kernels_compile_without_faults(dtype, widths):
    launches = chunkwise(configurations(8 * dtype.itemsize, *widths)[-1], dtype, widths, "B T H K")
    found = [x for x in launches if x.function.__name__ in KEYS | {"state_scan"}]
    # backward launches what forward does, and more
    assert faults(found[4:]) == []


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.bfloat16, (128, 128)),
        (torch.float32, (64, 64)),
        pytest.param(torch.bfloat16, (256, 512), marks=pytest.mark.slow),
    ],
)
def test_delta_kernels_compile_without_faults(dtype, widths):
    launches = chunkwise(configurations(8 * dtype.itemsize, *widths)[-1], dtype, widths, "B T H", beta=True)
    # the bands are those of other tests, and backward launches what forward does, and more
    found = [x for x in launches[4:] if x.function.__name__ in {"solve", "delta_scan"}]
    assert [x.arguments.get("REVERSE") for x in found] == [None, False, True]
    assert faults(found) == []


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        (torch.bfloat16, (128, 128)),
        *(pytest.param(dtype, (64, 64), marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float32)),
    ],
)
def test_delta_kernels_with_per_key_decays_compile_without_faults(dtype, widths):
    launches = chunkwise(configurations(8 * dtype.itemsize, *widths)[-1], dtype, widths, "B T H K", beta=True)
    forward = ["key_decay", "key_pairs", "key_pairs", "solve", "delta_scan"]
    assert [x.function.__name__ for x in launches] == [
        *forward,
        "key_band",
        *forward,
        "delta_scan",
        *["key_backward"] * 2,
    ]
    decay, _, pairs, solve, scan, reverse, _, strict = launches[6:]
    assert strict.arguments["STRICT"]
    assert faults([decay, pairs, solve, scan, reverse, strict]) == []


def test_delta_band_kernels_compile_without_faults():
    (configuration,) = configurations(16, 128, 128)[1:]
    launches = chunkwise(configuration, torch.bfloat16, (128, 128), "B T H", beta=True)
    bands = [x for x in launches if x.function.__name__ in {"band_backward", "decay_gradient"}]
    assert [x.arguments.get("STRICT") for x in bands] == [False, None, True, None]
    assert bands[3].arguments["products"] is None
    # those that take the most, and the variant that no other family has
    assert faults([bands[0], bands[3]]) == []


@pytest.mark.slow
def test_kernels_for_shared_queries_and_keys_compile_without_faults():
    configuration, *_ = configurations(16, 128, 64)
    *_, scan, band, gradient = chunkwise(configuration, torch.bfloat16, (128, 64), "B T H", shared=3)
    assert {x.arguments["shared"] for x in (scan, band, gradient)} == {3}
    assert band.arguments["dq"].shape[2:] == (6, 128)
    assert faults([scan, band, gradient]) == []


def test_wide_output_kernel_compiles_without_faults():
    configuration, *_ = configurations(16, 128, 128)
    launches = chunkwise(configuration, torch.bfloat16, (128, 128), None, learned=False, wide_output=True)
    (band,) = [x for x in launches if x.function.__name__ == "band_forward"]
    assert band.arguments["out"].dtype == torch.float32
    assert {x.arguments["do"].dtype for x in launches if "do" in x.arguments} == {torch.bfloat16}
    assert faults([band]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_step_kernel_compiles_without_faults(dtype):
    assert faults(step(dtype, (256, 512), "B T H K")) == []


@pytest.mark.parametrize(("tf32x3", "precision"), [(False, "ieee"), (True, "tf32x3")])
def test_float32_products_use_the_requested_precision(tf32x3, precision):
    (configuration,) = configurations(32, 64, 64, tf32x3=tf32x3)
    # a backward band takes a compiler long, and a scan has the same product
    scan, *_ = chunkwise(configuration, torch.float32, (64, 64), "H")
    needs = compile_for_hopper(scan)
    assert needs.precisions == {precision}
    assert needs.faults(scan) == []
    other = scan._replace(arguments=scan.arguments | {"PRECISION": "tf32"})
    wrong = compile_for_hopper(other).faults(scan)
    assert wrong == [f"has products of float32 that are tf32 and not {precision}"]


def test_recorded_launches_match_the_kernels_of_each_op():
    bands, learned = {"band_forward", "band_backward"}, {"band_forward", "band_backward", "decay_gradient"}
    for decay, names in {None: bands, "H": learned, "B T H": learned | {"clocks"}, "B T H K": KEYS}.items():
        (configuration,) = configurations(32, 64, 64)
        launches = chunkwise(configuration, torch.float32, (64, 64), decay)
        assert {recorded.function.__name__ for recorded in launches} == names | {"state_scan"}
    assert [recorded.function.__name__ for recorded in step(torch.float32, (64, 64), None)] == ["step"]


def test_oversized_configurations_are_reported_as_faults():
    (row, *_), dtype = configurations(16, 256, 512), torch.bfloat16
    scan = row._replace(scan=Launch((64, 128), 8, 6))
    found = faults([x for x in chunkwise(scan, dtype, (256, 512), None) if x.function.__name__ == "state_scan"][:1])
    assert len(found) == 1
    assert "bytes of shared memory, of 232448" in found[0]
    crowded = row._replace(scan=row.scan._replace(blocks=3))
    found = faults([x for x in chunkwise(crowded, dtype, (256, 512), "H") if x.function.__name__ == "state_scan"][:1])
    assert len(found) == 2
    assert "spills" in found[0]
    assert "leaves room for 2 blocks, not 3" in found[1]
    narrow = row._replace(forward=Launch((64, 128), 4, 3))
    found = faults([x for x in chunkwise(narrow, dtype, (256, 512), "H") if x.function.__name__ == "band_forward"])
    assert len(found) == 1
    assert "band_forward spills" in found[0]


def test_measurements_table_was_compiled_from_these_kernels():
    assert stamp() in PAGE.read_text(encoding="utf-8"), "run: python tests/ops/test_triton_compile.py"


def moved(launches: list[Recorded], tokens: int) -> int:
    """Bytes between memory and the caches for each token and head, where a launch reads or writes a tensor once."""
    tensors = [x for recorded in launches for x in recorded.arguments.values() if isinstance(x, torch.Tensor)]
    heads = launches[0].arguments["heads"]
    return sum(x.nbytes for x in tensors if x.ndim == 4) // (tokens * heads)


@pytest.mark.parametrize(("widths", "chunk", "bytes_moved"), [((256, 512), 128, 21_504), ((128, 128), 128, 5_120)])
def test_training_moves_the_expected_number_of_bytes(widths, chunk, bytes_moved):
    """Forward moves 6 (K + V) + 4 K V / C and backward 10 K + 8 V + 6 K V / C bytes; forward saves 16-bit states."""
    key, value = widths
    configuration = next(row for row in configurations(16, *widths) if row.chunk == chunk)
    launches = chunkwise(configuration, torch.bfloat16, widths, "H", learned=False, packed=False)
    # of the state before and after the call nothing is left in a long segment
    for recorded in launches:
        recorded.arguments.update({name: None for name in ("initial", "final") if name in recorded.arguments})
    assert moved(launches, 2 * chunk) == bytes_moved
    assert bytes_moved == 16 * key + 14 * value + 10 * key * value // chunk


# ---- the whole table


def everything() -> Iterator[tuple[str, list[Recorded]]]:
    """All launches of the table, by name."""
    decays = [(None, False), *itertools.product(("H", "B T H"), (False, True))]
    for widths, decay in itertools.product(HEADS, decays):
        (configuration,), (given, learned) = configurations(32, *widths, tf32x3=True), decay
        launches = chunkwise(configuration, torch.float32, widths, given, learned=learned)
        yield f"tf32x3 {widths[0]}x{widths[1]} C=64 {given or 'none'}{' learned' * learned}", launches
    for dtype, widths in itertools.product((torch.bfloat16, torch.float16, torch.float32), HEADS):
        kind, widest = str(dtype).removeprefix("torch."), widths == HEADS[-1]
        # float16 has the row of bfloat16 and differs in one instruction: its widest head stands for all
        if dtype == torch.float16 and not widest:
            continue
        name = f"{kind} {widths[0]}x{widths[1]}"
        for configuration in configurations(8 * dtype.itemsize, *widths):
            for decay, learned in decays[-1:] if dtype == torch.float16 else decays:
                # documents take more of a kernel than rows do: rows are compiled once
                for packed in (True, False) if dtype == torch.bfloat16 and widest and decay == "H" else (True,):
                    launches = chunkwise(configuration, dtype, widths, decay, learned=learned, packed=packed)
                    which = [decay or "none", "learned" if learned else "", "" if packed else "rows"]
                    yield f"{name} C={configuration.chunk} {' '.join(filter(None, which))}", launches
            # as linear attention and mLSTM have it; what differs is the band of outputs
            for decay, learned in (decays[0], decays[-1]) if dtype == torch.bfloat16 else ():
                launches = chunkwise(configuration, dtype, widths, decay, learned=learned, wide_output=True)
                yield f"{name} C={configuration.chunk} {decay or 'none'} wide", launches
            if dtype == torch.bfloat16 and widths == (128, 64):  # Mamba-2's, in groups
                launches = chunkwise(configuration, dtype, widths, "B T H", shared=3)
                yield f"{name} C={configuration.chunk} B T H learned shared", launches
            if configuration.keys is not None:
                yield f"{name} C={configuration.chunk} B T H K", chunkwise(configuration, dtype, widths, "B T H K")
        probe = Probe(device=torch.device("cuda"), dtype=dtype, key_width=widths[0], value_width=widths[1])
        for decay, learned in (*(decays[-1:] if dtype == torch.float16 else decays), ("B T H K", True)):
            if not limits(replace(probe, log_decay=decay)):
                launches = chunkwise(configuration, dtype, widths, decay, learned=learned, beta=True)
                yield f"{name} C={configuration.chunk} {decay or 'none'} {'learned ' if learned else ''}delta", launches
        for decay in (None, "H", "B T H", "B T H K"):
            yield f"{name} {decay or 'none'}", step(dtype, widths, decay)


def main(words: list[str]) -> int:
    """Compile the whole table, or of it what has all the words in its name; the number of what does not fit."""
    start, seen, wrong = time.perf_counter(), set(), 0
    rows: dict[tuple[str, ...], list[tuple[Recorded, Needs]]] = {}
    print(f"Triton {triton.__version__}, sm_90; registers per thread, bytes of shared memory, blocks, products")
    for name, launches in everything():
        for recorded in launches if all(word in name.split() for word in words) else []:
            source = recorded.source()
            same = str((recorded.function.__name__, source.signature, source.constants, source.attrs, recorded.options))
            if same in seen:
                continue
            seen.add(same)
            needs = compile_for_hopper(recorded)
            found = needs.faults(recorded)
            wrong += bool(found)
            kernel = recorded.function.__name__ + (" reversed" if recorded.arguments.get("REVERSE") else "")
            blocks = needs.blocks(recorded.options.get("num_warps", 4))
            figures = f"{needs.registers:>4} {needs.shared:>7} {blocks:>2} {needs.tensor_cores:>3}"
            rows.setdefault((*name.split()[:3], kernel), []).append((recorded, needs))
            print(f"{name:<45} {kernel:<20} {figures}  {'; '.join(found)}".rstrip(), flush=True)
    print(f"{len(seen)} kernels in {time.perf_counter() - start:.0f} s, {wrong} that do not fit")
    if not words and not wrong:
        PAGE.write_text(fill(PAGE, {"compiled": [*page_of(rows), "", stamp()]}), encoding="utf-8")
    return wrong


def stamp() -> str:
    """The code that a table is of: without docstrings, comments and imports, which change nothing that is compiled."""
    code = "".join(_code_of((ROOT / name).read_text(encoding="utf-8")) for name in COMPILED)
    return f"Compiled of code whose SHA-256 begins with `{hashlib.sha256(code.encode()).hexdigest()[:16]}`."


def _code_of(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not _is_ignored(statement)]
    return ast.dump(tree)


def _is_ignored(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def page_of(rows: Mapping[tuple[str, ...], Sequence[tuple[Recorded, Needs]]]) -> list[str]:
    """The lines of the page's table: the most that a kernel of a configuration needs, over kinds of decays."""
    body = []
    for (kind, widths, chunk, kernel), found in rows.items():
        if kind == "float16" or not chunk.startswith("C="):  # has the row of bfloat16; a step is described below
            continue
        recorded, _ = found[0]
        warps = recorded.options.get("num_warps", 4)
        tile = [recorded.arguments.get(name) for name in ("TILE_K", "TILE_V")]
        tile = tile if tile[0] else [recorded.arguments.get(name) for name in ("TILE_INNER", "TILE_OUTER")]
        body.append(
            [
                kind,
                widths.replace("x", " x "),
                chunk.removeprefix("C="),
                f"`{kernel}`",
                " x ".join(str(size) for size in tile if size),
                str(warps),
                str(max(needs.registers for _, needs in found)),
                f"{max(needs.shared for _, needs in found) / 1024:.0f}",
                str(min(needs.blocks(warps) for _, needs in found)),
            ]
        )
    return table(["inputs", "head", "C", "kernel", "tile", "warps:", "registers:", "KB:", "blocks:"], body)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
