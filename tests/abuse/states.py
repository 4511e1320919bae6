"""States of anyone's making: checksums match, contents do not.

They are prompt caches (`generate --save-state`), and the state that a run carries from step to step.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from abuse.shards import seal
from abuse.tally import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmix import build_model, generate_text, load_config, train
from seqmix.models import ByteTokenizer, LanguageModel, cache_text
from seqmix.training import load_prompt_cache, read_config, save_prompt_cache
from seqmix.training.checkpoint.files import checkpoints
from seqmix.training.tensor_files import CHECKSUM_KEY, checksum

PRESETS = (
    "retnet-tiny",
    "hybrid-tiny",
    "hyena-tiny",
    "mlstm-tiny",
    "mamba3-tiny",
    "rwkv4-tiny",
    "latent-attention-tiny",
)
SMALL = ("model.d_model=32", "model.n_layers=2")

INTEGERS = (-(2**63), -(2**31), -2, 2**31, 2**62, 2**63 - 1)


def states(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every leaf of every kind of state with other numbers, shapes and types."""
    for preset in PRESETS:
        both = ["model.pattern=[ret, attn]"] if preset == "hybrid-tiny" else []
        model = build_model(load_config(preset, [*SMALL, *both]).model).eval()
        model.tokenizer = ByteTokenizer()
        good = folder / f"{preset}.state"
        save_prompt_cache(cache_text(model, ["the text", "another text"]), model, good)
        for name, leaf in load_file(good).items():
            for number, (what, change) in enumerate(_changes(leaf, drawn)):
                if (changed := change(leaf)) is not None and changed.dtype == leaf.dtype and changed.equal(leaf):
                    continue
                file = folder / f"{preset}-{name}-{number}.state"
                # of hyena's inputs those that are missing count as zeros: it is the cache of another text
                other_text = preset == "hyena-tiny" and name.endswith(".inputs") and what == "shorter in 1"
                yield Case(
                    f"{preset} {name} {what}",
                    lambda f=file, n=name, c=change, m=model, g=good: _use(g, f, n, c, m),
                    refused=not other_text,
                )
    yield from _carried(folder, drawn)


CARRIED = ("retnet-tiny", "mlstm-tiny", "delta-net-tiny", "sliding-window-tiny")
RUN = ("data.sequence_length=16", "training.steps=2", "training.batch_size=2", "training.carry_state=true")
RUN += ("training.evaluation_batches=1", "training.final_evaluation_batches=1")


def _carried(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every leaf of a carried state with other numbers, shapes and types, and every two leaves swapped."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    for preset in CARRIED:
        window = ["model.pattern=[local]", "model.n_layers=1"] if preset.startswith("sliding") else []
        changes = [*SMALL, *RUN, *window, f"data.paths=[{folder / 'text.txt'}]"]
        run = folder / f"carried-{preset}"
        list(train(load_config(preset, changes), run))
        leaves = load_file(checkpoints(run)[-1] / "state.safetensors")
        use = partial(_go_on, run)
        yield Case(f"{preset} whole", partial(use, dict), refused=False)
        for name, leaf in leaves.items():
            for what, change in _changes(leaf, drawn):
                changed = change(leaf)
                if changed is not None and changed.dtype == leaf.dtype and changed.equal(leaf):
                    continue
                # a precision of a run's own is none of the model's; NaN is what a run that diverged has
                like = changed is not None and changed.is_floating_point() and leaf.is_floating_point()
                counts = what == f"with {2**31}"  # as a text may have
                refused = not counts and not (like and changed.shape == leaf.shape)
                put = partial(_put, name, changed)
                yield Case(f"carried {preset} {name} {what}", partial(use, put), refused=refused)
        for one, other in combinations(leaves, 2):
            alike = leaves[one].shape == leaves[other].shape and leaves[one].dtype == leaves[other].dtype
            yield Case(
                f"carried {preset} {one} and {other} swapped", partial(use, partial(_swap, one, other)), not alike
            )


def _put(name: str, leaf: torch.Tensor | None, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rest = {key: x for key, x in leaves.items() if key != name}
    return rest if leaf is None else rest | {name: leaf.contiguous()}


def _swap(one: str, other: str, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return leaves | {one: leaves[other], other: leaves[one]}


def _go_on(run: Path, change: Callable[[dict], dict]) -> None:
    """Train a copy of a run on from a state that is changed and sealed."""
    copy = run.with_name(f"{run.name}-copy")
    shutil.copytree(run, copy)
    try:
        folder = checkpoints(copy)[-1]
        file = folder / "state.safetensors"
        save_file(change(load_file(file)), file)
        seal(folder)
        list(train(read_config(copy, ["training.steps=3"]), copy, resume=True))
    finally:
        shutil.rmtree(copy)


def _changes(leaf: torch.Tensor, drawn: random.Random) -> Iterator[tuple[str, Callable]]:
    """Other leaves in its place, each with its name; none is that of a text."""
    at = drawn.randrange(max(leaf.numel(), 1))

    def with_one(value: float) -> Callable:
        def change(x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x.view(-1)[at] = value
            return x

        return change

    if leaf.numel():
        if leaf.is_floating_point():
            yield "with nan", with_one(float("nan"))
        else:
            yield from ((f"with {value}", with_one(value)) for value in INTEGERS)
    yield "of no rows", lambda x: x[:0]
    yield "of one row", lambda x: x[:1]
    yield "of more rows", lambda x: torch.cat((x, x))
    yield "flat", lambda x: x.reshape(-1)
    yield "with a dimension more", lambda x: x[..., None]
    yield "with a number", lambda x: torch.zeros((), dtype=x.dtype)
    other = [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    yield from ((f"as {dtype}", lambda x, d=dtype: x.nan_to_num().to(d)) for dtype in other if dtype != leaf.dtype)
    yield "absent", lambda x: None
    for dim in range(1, leaf.ndim):
        yield f"shorter in {dim}", lambda x, d=dim: x.narrow(d, 0, max(x.shape[d] - 1, 0))
        yield (
            f"longer in {dim}",
            lambda x, d=dim: (
                torch.cat((x, x.narrow(d, 0, 1)), d)
                if x.shape[d]
                else x.new_zeros([*x.shape[:d], 3, *x.shape[d + 1 :]])
            ),
        )


def _use(good: Path, file: Path, name: str, change: Callable, model: LanguageModel) -> None:
    """Seal a changed copy of a prompt cache, and go on from it in every way."""
    with safe_open(good, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(good)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata | {CHECKSUM_KEY: checksum(tensors)})
    try:
        cache = load_prompt_cache(file, model)
        generate_text(model, [], max_new_tokens=2, after=cache)
        generate_text(model, ["more"], max_new_tokens=2, after=cache)
        save_prompt_cache(cache_text(model, ["more"], after=cache), model, file)
        load_prompt_cache(file, model)
    finally:
        file.unlink()
