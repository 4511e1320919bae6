"""Processes that are ranks of a group, over the loopback, and the functions that they run in tests, by name."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 240


class Ranks:
    """Processes that wait for the name of a function to run."""

    def __init__(self, size: int) -> None:
        # each starts with torch imported; no process may inherit threads
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["seqmix.cli.app", "seqmix.cli.progress", "torch._dynamo"])
        self.size, self.folder = size, TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = self.context.Pipe()
            arguments = (rank, size, f"{self.folder.name}/store", theirs, sys.path)
            self.processes.append(self.context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def __call__(self, name: str, *arguments: Any, **named: Any) -> list[Any]:
        """What each rank returns; an error of a rank is raised here."""
        for pipe in self.pipes:
            pipe.send((name, arguments, named))
        results = [pipe.recv() if pipe.poll(SECONDS) else (None, "it hangs") for pipe in self.pipes]
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error is not None]
        assert not errors, "\n".join(errors)
        return [result for result, _ in results]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        name, arguments, named = pipe.recv()
        try:
            pipe.send((globals()[name](*arguments, **named), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


@cache
def context():
    from seqmix.ops.runtime.context_parallel import ContextParallel

    return ContextParallel.of(dist.group.WORLD)


def mixer_as_one(
    kind: str, fields: dict[str, Any], cases: list[dict[str, Any]], in_turn: bool = False, whole: bool = True
) -> None:
    """A mixer over all ranks is the mixer of one: outputs, final states, gradients of inputs, states and parameters."""
    from seqmix.mixers import Call, Paradigm
    from seqmix.mixers.base.context_parallel import mix_sequentially
    from seqmix.mixers.base.state import detach
    from seqmix.ops.runtime.packing import Documents

    mixer, mixer_alone = _mixer(kind, fields), _mixer(kind, fields)
    mixer.cp_group = None if in_turn else context()
    for case in cases:
        paradigm, wanted = case["paradigm"], case.get("final", False)
        cu_seqlens = torch.tensor(case["cu_seqlens"]) if "cu_seqlens" in case else None
        x = torch.randn(case["batch"], context().size * case["length"], 16, dtype=torch.float64)
        rows, state = case["batch"] if cu_seqlens is None else len(cu_seqlens) - 1, None
        if case.get("state"):
            before = torch.randn(rows, 5, 16, dtype=torch.float64)
            state = detach(mixer_alone(before, return_state=True)[1])

        def alone(x, s, paradigm=paradigm, cu_seqlens=cu_seqlens, wanted=wanted):
            return mixer_alone(x, s, paradigm=paradigm, cu_seqlens=cu_seqlens, return_state=wanted)

        def shared(x, s, paradigm=paradigm, cu_seqlens=cu_seqlens, wanted=wanted):
            if in_turn:
                start, size = context().start(x.shape[1]), context().size
                documents = Documents.of(cu_seqlens, x.shape[1], start, size * x.shape[1])
                return mix_sequentially(mixer, x, Call(Paradigm(paradigm), s, documents, wanted, cp_group=context()))
            return mixer(x, s, paradigm=paradigm, cu_seqlens=cu_seqlens, return_state=wanted)

        theirs = _everything(mixer_alone, alone, x, state, 1) if whole else None
        ours = _everything(mixer, shared, context().part(x), state, context().size)
        for name, tensor in theirs.items():
            mine, of_tokens = ours[name], name in ("output", "gradient of x")
            if name.startswith("gradient of") and not of_tokens:
                dist.all_reduce(mine)
            wanted = context().part(tensor) if of_tokens else tensor
            torch.testing.assert_close(mine, wanted, msg=lambda text, name=name, case=case: f"{case}, {name}: {text}")


def _mixer(kind, fields):
    from seqmix import MIXERS

    torch.manual_seed(0)
    mixer = MIXERS.resolve(kind)(**fields).build(16, layer_idx=0, n_layers=1).double()
    mixer.reset_parameters()
    return mixer


def _everything(mixer, call, x, state, counted) -> dict[str, torch.Tensor]:
    """All outputs of a call, and the gradients of a weighted sum of them; final states are counted `counted` times."""
    from seqmix.mixers.base.state import map_state, to_dict

    mixer.zero_grad()
    x, before = _leaf(x), None if state is None else map_state(_leaf, state)
    y, after, *_ = call(x, before)
    # weights that are the same for a token whoever has it
    first = 0 if counted == 1 else context().start(x.shape[1])
    token = torch.arange(first, first + x.shape[1])[:, None] + torch.arange(16)
    loss = (y * token.to(y).sin()).sum()
    found = {"output": y.detach()}
    for name, leaf in to_dict(after or ()).items():
        found[f"final {name}"] = leaf.detach()
        if leaf.is_floating_point():
            loss = loss + (leaf * torch.arange(leaf.numel()).to(leaf).cos().view_as(leaf)).sum() / counted
    loss.backward()
    owed = {"x": x, **dict(mixer.named_parameters()), **({} if before is None else to_dict(before))}
    for name, leaf in owed.items():
        if leaf.requires_grad:
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
    return found


def _leaf(x):
    return x.detach().clone().requires_grad_(x.is_floating_point())


def model_as_one(preset: str, *overrides: str) -> None:
    """Loss, logits, states and gradients of a model whose sequences are split over all ranks, also unequally."""
    from seqmix import build_model, load_config
    from seqmix.mixers.base.state import to_dict

    config = load_config(preset, ["model.d_model=32", "model.n_layers=4", *overrides]).model
    alone, shared = (build_model(config, dtype=torch.float64) for _ in range(2))
    shared.set_cp_group(context())
    cases = ((2, 12, None, False), (2, 13, None, True), (1, 14, torch.tensor([0, 5, 9, 14, 14]), False))
    for rows, length, cu_seqlens, checkpointed in cases:
        alone.activation_checkpointing = shared.activation_checkpointing = checkpointed
        tokens, targets = torch.randint(256, (2, rows, length), generator=torch.Generator().manual_seed(length))
        targets[:, 3] = -100
        losses = []
        for model in (alone, shared):
            model.zero_grad()
            losses.append(model(tokens, targets=targets, reduction="sum", cu_seqlens=cu_seqlens).loss)
            losses[-1].backward()
        total = losses[1].detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, losses[0].detach())
        for (name, theirs), (_, ours) in zip(alone.named_parameters(), shared.named_parameters(), strict=True):
            dist.all_reduce(ours.grad)
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        first, second = (tokens[:, :6], tokens[:, 6:12])
        whole = alone(first, return_state=True)
        ours = shared(first, return_state=True)
        torch.testing.assert_close(ours.logits, context().part(whole.logits))
        torch.testing.assert_close(to_dict(ours.state), to_dict(whole.state))
        torch.testing.assert_close(shared(second, ours.state).logits, context().part(alone(second, whole.state).logits))


def bytes_received(kind: str, fields: dict[str, Any], length: int) -> int:
    """What one layer receives from other ranks, forward and backward, for two rows of `length` tokens a rank."""
    mixer = _mixer(kind, fields).float()
    mixer.cp_group = context()
    with _received() as received:
        y, _ = mixer(torch.randn(2, length, 16, requires_grad=True))
        y.sum().backward()
    return sum(received)


def step_received(overrides: list[str]) -> tuple[int, float]:
    """What a rank receives of parameters and gradients in a step, and what `seqmix plan` says."""
    with _trainer(overrides) as trainer, _received() as received:
        trainer.train_step(0)
    planned = _planned(trainer)
    return sum(received), planned.received * planned.grad_accum_steps


def step_memory(overrides: list[str]) -> tuple[int, float]:
    """What this rank holds at most in a step, and what `seqmix plan` says."""
    from recorded_operations import Live

    from seqmix.training.distributed.sharding import local_tensor

    with _trainer(overrides) as trainer:
        trainer.train_step(0)  # moments, and the storages that FSDP resizes
        with Live() as live:
            trainer.train_step(1)
    shards = sum(local_tensor(p).nbytes for p in trainer.model.parameters())
    return 3 * shards + live.added, _planned(trainer).memory


@contextmanager
def _trainer(overrides: list[str]) -> Iterator[Any]:
    from seqmix import build_model, load_config
    from seqmix.training.distributed.process_groups import join_processes
    from seqmix.training.distributed.sharding import assign, sharder
    from seqmix.training.optimizer import build_optimizer
    from seqmix.training.trainer import Trainer

    config = load_config("hybrid-tiny", [*SMALL, "data={kind: mqar, sequence_length: 64}", *overrides])
    with join_processes(config.distributed) as groups:
        model = build_model(config.model, shard=sharder(groups, config.distributed), assign=assign)
        model.set_cp_group(groups.cp_group)
        yield Trainer(config, config.open_data(), model, build_optimizer(model, config.training), groups)


def _planned(trainer: Any) -> Any:
    from seqmix.training.distributed.layouts import Planner

    groups, settings = trainer.groups, trainer.config.training
    sequences = settings.batch_size // groups.dp_size // settings.grad_accum_steps
    sizes = {"data": groups.data, "shard": groups.shard, "context_parallel": groups.context_parallel}
    return Planner(trainer.config).layout(**sizes, sequences=sequences)


@contextmanager
def _received() -> Iterator[list[int]]:
    """Bytes that this rank receives, call by call."""
    received: list[int] = []

    def counted(call):
        def count(*tensors, group=None, **options):
            size = dist.get_world_size(group)
            whole = max(x.nbytes for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor))
            received.append(whole // size * (size - 1))
            return call(*tensors, group=group, **options)

        return count

    def count_batch(calls):
        received.extend(call.tensor.nbytes for call in calls if call.op is dist.irecv)
        return batched(calls)

    names = "all_gather_single", "reduce_scatter_single"
    if not hasattr(dist, names[0]):  # before torch 2.13
        names = "all_gather_into_tensor", "reduce_scatter_tensor"
    calls, batched = [getattr(dist, name) for name in names], dist.batch_isend_irecv
    dist.batch_isend_irecv = count_batch
    for name, call in zip(names, calls, strict=True):
        setattr(dist, name, counted(call))
    try:
        yield received
    finally:
        dist.batch_isend_irecv = batched
        for name, call in zip(names, calls, strict=True):
            setattr(dist, name, call)


def keys_held(length: int) -> tuple[float, float, float]:
    """What attention keeps for its backward pass on this rank, and allocates at most in forward and in backward.

    In units of the keys and values of a row of `length` tokens, which are so wide that all else is little.
    """
    from recorded_operations import Live
    from torch.autograd.graph import saved_tensors_hooks

    from seqmix.mixers import Call, Paradigm
    from seqmix.ops.attention import ring, softmax_attention
    from seqmix.ops.runtime.custom_op import Gradients

    own, kept = length // context().size, {}
    q, k, v = (torch.randn(1, own, 1, 2048, requires_grad=True) for _ in range(3))

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        output, _ = softmax_attention(q, k, v, Call(Paradigm.CHUNKWISE, chunk_size=4, cp_group=context()))
    dist.barrier()
    options = dict.fromkeys(("sums", "documents", "log_decay", "slopes", "softcap", "window", "value_dims"))
    place = {"group": context().name, "rank": context().rank, "size": context().size}
    call, peaks = ring.RingInputs(q=q, k=k, v=v, scale=1.0, chunk_size=4, **options, **place), []
    with torch.no_grad():
        with Live() as live:
            found = ring.RING.forward(call)
        peaks.append(live.added)
        with Live() as live:
            ring.RING.backward(call, Gradients((output, None), found, frozenset("qkv")))
        peaks.append(live.added)
    q_and_output = 2 * q.nbytes
    return tuple(held / (k.nbytes + v.nbytes) / context().size for held in (sum(kept.values()) - q_and_output, *peaks))


def not_finite(text: str, token: int) -> list[str]:
    """What is said where numbers of a token on the last rank alone are not finite, in backward and in an evaluation."""
    from seqmix import SeqmixError, build_model, load_config
    from seqmix.training.distributed.process_groups import join_processes
    from seqmix.training.distributed.sharding import assign, sharder
    from seqmix.training.optimizer import build_optimizer
    from seqmix.training.trainer import Trainer

    def spoil(module, arguments, output):
        factor = torch.ones_like(output[..., :1])
        factor[0, token] = torch.nan if groups.rank == groups.size - 1 else 1
        if not output.requires_grad:
            return output * factor
        output = output + 0
        output.register_hook(lambda gradient: gradient * factor)
        return output

    config, said = load_config("hybrid-tiny", [*SMALL, f"data.paths=[{text}]"]), []
    with join_processes(config.distributed) as groups:
        model = build_model(config.model, shard=sharder(groups, config.distributed), assign=assign)
        trainer = Trainer(config, config.open_data(), model, build_optimizer(model, config.training), groups)
        model.embedding.register_forward_hook(spoil)
        for call in (lambda: trainer.train_step(0), trainer.evaluate):
            try:
                call()
            except SeqmixError as error:
                said.append(str(error))
    return said


def train_here(
    overrides: list[str],
    run: str,
    *,
    resume: bool = False,
    until: int | None = None,
    broken: int = -1,
    full: int = -1,
    lost: tuple[int, str] = (-1, ""),
):
    """Train as one of all ranks; the measurements, the rows that this rank read, and the error that ended it.

    Args:
        overrides: changes to `hybrid-tiny`, made small.
        run: its folder.
        resume: whether to resume it.
        until: the last rank asks to stop after this step.
        broken: the rank whose text is missing.
        full: the rank whose disk is full.
        lost: a step in which the others are lost, and the words of the library that notices.
    """
    from seqmix import SeqmixError, load_config, train
    from seqmix.training import tensor_files
    from seqmix.training import trainer as module
    from seqmix.training.distributed.sharding import full_tensor
    from seqmix.training.monitoring.events import Evaluated, Noted, Saved, Stepped
    from seqmix.training.trainer import Trainer

    joined = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    config = load_config("hybrid-tiny", [*SMALL, *overrides])
    if rank == broken:
        config = load_config("hybrid-tiny", [*SMALL, *overrides, "data.paths=[nowhere.txt]"])
    found: dict[str, Any] = {
        "loss": [],
        "norm": [],
        "validation": [],
        "saved": [],
        "rows": {},
        "error": None,
        "noted": "",
    }
    found["gradients"] = []
    read, clip, made = Trainer.batch, module.clip_grads_with_norm_, [0]

    def batch(self, step):
        given = read(self, step)
        found["rows"][step] = [hash(tuple(row)) for row in given.inputs.tolist()]
        return given

    def differentiated(parameters, *arguments):
        found["gradients"].append([full_tensor(p.grad).clone() for p in parameters])
        clip(parameters, *arguments)

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    save = tensor_files.save_file
    tensor_files.save_file = no_space if rank == full else save
    Trainer.batch, module.clip_grads_with_norm_ = batch, differentiated
    try:

        def stop():
            if made[0] == lost[0]:
                raise RuntimeError(lost[1])
            return rank == size - 1 and until is not None and made[0] >= until

        for event in train(config, run, resume=resume, stop=stop):
            made[0] = event.step
            match event:
                case Stepped():
                    found["loss"].append(event.loss)
                    found["norm"].append(event.gradient_norm)
                case Evaluated():
                    found["validation"].append((event.loss, event.accuracy, event.accuracy_by))
                case Noted():
                    found["noted"] += event.text
                case Saved():
                    found["saved"].append(event.step)
    except SeqmixError as error:
        found["error"] = (type(error).__name__, str(error))
    finally:
        Trainer.batch, module.clip_grads_with_norm_, tensor_files.save_file = read, clip, save
    return found


SMALL = (
    *("model.d_model=16", "model.n_layers=2", "model.pattern=[ret, attn]", "data.sequence_length=16"),
    *("training.steps=6", "training.batch_size=8", "training.warmup_steps=2", "training.evaluate_every=3"),
    *("training.evaluation_batches=2", "training.final_evaluation_batches=null"),
    *("training.checkpoint_every=100", "training.log_every=1"),
    *("training.optimizer=adamw", "training.learning_rate=3.0e-3", "training.schedule=cosine"),
    "training.precision=float32",  # some CPUs would take bfloat16, in which sums over ranks differ
)


def compiled(kind: str, fields: dict[str, Any]) -> None:
    """A context-parallel mixer compiles to one graph, which computes the same."""
    mixer = _mixer(kind, fields)
    mixer.cp_group = context()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    found = []
    for call in (mixer, torch.compile(mixer, backend="aot_eager", fullgraph=True)):
        mixer.zero_grad()
        own = _leaf(x)
        y, _ = call(own)
        y.square().sum().backward()
        found.append((y.detach(), own.grad, {name: p.grad.clone() for name, p in mixer.named_parameters()}))
    torch.testing.assert_close(*found)


def started_here(overrides: list[str], preset: str = "") -> tuple[bool, int, int, int]:
    """Build a model sharded over all ranks: whether its values are to the bit those of one process; the bytes that this
    rank held at most, those of its shards, and those of the whole model.
    """
    from recorded_operations import Allocated

    from seqmix import build_model, load_config
    from seqmix.training.distributed.process_groups import join_processes
    from seqmix.training.distributed.sharding import assign, full_tensor, local_tensor, sharder

    config = load_config(preset or "hybrid-tiny", overrides if preset else [*SMALL, *overrides])
    with join_processes(config.distributed) as groups, Allocated() as allocated:
        model = build_model(config.model, seed=config.seed, shard=sharder(groups, config.distributed), assign=assign)
    shards = sum(local_tensor(p).nbytes for p in model.parameters())
    alone = dict(build_model(config.model, seed=config.seed).named_parameters())
    ours = {name: full_tensor(p) for name, p in model.named_parameters()}
    same = ours.keys() == alone.keys() and all(torch.equal(ours[name], p) for name, p in alone.items())
    return same, allocated.peak, shards, sum(p.nbytes for p in alone.values())


def waits(seconds: int) -> str:
    """Wait `seconds` at most for the last rank, which is late by thrice as much: what ends the wait."""
    from seqmix import SeqmixError
    from seqmix.training.config import DistributedConfig
    from seqmix.training.distributed.process_groups import join_processes

    try:
        with join_processes(DistributedConfig(timeout=seconds)) as groups:
            if groups.rank == groups.size - 1:
                time.sleep(3 * seconds)
            groups.background.gather(0)
    except SeqmixError as error:
        return str(error)
    return "it waited"
