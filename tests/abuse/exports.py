"""Exported files of anyone's making: the safetensors are whole, and the configuration in them is not."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from abuse.tally import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmix import SeqmixError, generate_text, load_config, load_run, train
from seqmix.models.subword import EXPORTED_TOKENIZER
from seqmix.training import export_run
from seqmix.training.checkpoint.saved_run import EXPORTED_CONFIG
from seqmix.training.tensor_files import CHECKSUM_KEY

SMALL = ("model.d_model=16", "model.n_layers=1", "data.sequence_length=16", "training.steps=1", "training.batch_size=2")
VALUES = (0, -1, 1e308, 1e-320, 10**400, 2**31, 2**63, "NaN", "", "x", None, True, [], {}, "os:system", "antigravity:x")
JSON = (
    *("[" * 10**5, '{"a":' * 10**5, '{"model": ' + "[" * 10**5, "", "null", "[]", "1", '"x"', "{}", '{"model": null}'),
    *(
        '{"model": []}',
        '{"model": {}, "data": []}',
        '{"model": "x"}',
        "NaN",
        "9" * 5000,
        '{"model": ' + "9" * 5000 + "}",
    ),
)


def exports(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every field of the configuration, the tokenizer and every tensor of a small export replaced."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 30)
    list(train(load_config("retnet-tiny", [*SMALL, f"data.paths=[{folder / 'text.txt'}]"]), folder / "run"))
    good = folder / "good.safetensors"
    export_run(folder / "run", good)
    with safe_open(good, "pt") as opened:
        metadata, tensors = opened.metadata(), load_file(good)
    del metadata[CHECKSUM_KEY]
    number = count()

    def case(name: str, metadata: dict[str, str], tensors: dict[str, Any], refused: bool = True) -> Case:
        return Case(name, partial(_use, folder / f"{next(number)}.safetensors", metadata, tensors), refused)

    yield case("whole", metadata, tensors, refused=False)
    for text in JSON:
        yield case(f"configuration {text[:12]!r}", metadata | {EXPORTED_CONFIG: text}, tensors)
    whole = json.loads(metadata[EXPORTED_CONFIG])
    for path in _places({"model": whole["model"]}):
        for value in drawn.sample(VALUES, 5):
            tree = deepcopy(whole)
            place: Any = tree
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            changed = metadata | {EXPORTED_CONFIG: json.dumps(tree)}
            yield case(f"{'.'.join(map(str, path))} = {value!r:.12}", changed, tensors, refused=False)
    for value in VALUES:
        for field in ("data", "training", "seed"):
            changed = metadata | {EXPORTED_CONFIG: json.dumps(whole | {field: value}), EXPORTED_TOKENIZER: "{}"}
            yield case(f"{field} = {value!r:.12}", changed, tensors)
    for text in ("", "[" * 10**5, "{}", "null"):
        yield case(f"tokenizer {text[:12]!r}", metadata | {EXPORTED_TOKENIZER: text}, tensors)
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
        "absent": lambda x: None,
        "nan": lambda x: x * float("nan"),
        "infinite": lambda x: x + float("inf"),
        "flat": lambda x: x.reshape(-1)[:, None],
        "empty": lambda x: x[:0],
        "longer": lambda x: torch.cat((x, x)),
        "complex": lambda x: x.to(torch.complex64),
        "bool": lambda x: x.bool(),
        "int8": lambda x: x.to(torch.int8),
    }
    for name, tensor in tensors.items():
        for what, change in changes.items():
            rest = {key: x for key, x in tensors.items() if key != name}
            changed = change(tensor)
            yield case(f"{name} {what}", metadata, rest if changed is None else rest | {name: changed.contiguous()})


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from _places(value, (*path, key))


def _use(file: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Write the file, and do with it what a stranger's file is for."""
    save_file(tensors, file, metadata)
    try:
        with suppress(SeqmixError):
            load_config("retnet-tiny", [f"training.start_from={file}"])
        generate_text(load_run(file), ["a"], max_new_tokens=2)
    finally:
        file.unlink()
