"""The model card of a Hugging Face folder: how to load the model, what it was trained on, and its loss."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...data.corpus_config import CorpusConfig
from ...data.files import source_name
from ...registry.providers import named_paths
from ...training import RunConfig
from ...training.checkpoint.provenance import seqmix_version
from ...training.monitoring.measurements import read_measurements

CARD_FILE = "README.md"

CARD = """---
library_name: seqmix
pipeline_tag: text-generation
---

# {name}

A language model of [seqmix](https://github.com/seqmix/seqmix) {version} with these mixers: {mixers}.
The package `seqmix` must be installed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
```

{hint}
{training}"""
IMPORT = """import seqmix.interop.hf  # registers the model type

model = AutoModelForCausalLM.from_pretrained("{name}")"""
IMPORT_HINT = """If transformers does not recognize the model type `seqmix`, `import seqmix.interop.hf` is missing."""
TRUST = """model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)"""
TRUST_HINT = """`trust_remote_code=True` runs `modeling_seqmix.py`, which imports seqmix."""
TRAINING = """
## Training

| | |
|---|---|
{rows}
"""


def card_of(name: str, blocks: Mapping[str, Any], *, remote_code: bool, training: Mapping[str, str]) -> dict[str, str]:
    """Return the content of the model card by file name.

    Args:
        name: the name of the model.
        blocks: fields of the blocks of its configuration.
        remote_code: True if the folder has modeling code.
        training: what is known of its training, as from `training_of`; the card has no such section without it.
    """
    load, hint = (TRUST, TRUST_HINT) if remote_code else (IMPORT, IMPORT_HINT)
    if plug_ins := named_paths(blocks):
        modules = ", ".join(dict.fromkeys(f"`{path.partition(':')[0]}`" for path in plug_ins))
        hint += f"\nThe model needs {modules}: import it first, or set `trust_remote_code=True`."
    kinds = dict.fromkeys(str(block["mixer"]["kind"]) for block in blocks.values())
    rows = "\n".join(f"| {label} | {value} |" for label, value in training.items())
    card = CARD.format(
        name=name,
        version=seqmix_version(),
        mixers=", ".join(kinds),
        load=load.format(name=name),
        hint=hint,
        training=TRAINING.format(rows=rows) if rows else "",
    )
    return {CARD_FILE: card}


def training_of(run: Path, config: RunConfig, step: int, *, ema: bool) -> dict[str, str]:
    """Return what is known of a run's training up to a checkpoint: values by label.

    It has the loss and the accuracy if training measured them at that step. Those of a moving average it never does, so
    with `ema` they are missing.
    """
    training = config.training
    data = config.data
    length = data.sequence_length
    facts = {
        "data": source_name(data) if isinstance(data, CorpusConfig) else data.kind,
        "tokens": f"{step * training.batch_size * length:,}: {step:,} of {training.steps:,} steps, each of "
        f"{training.batch_size:,} sequences of {length:,} tokens",
        "optimizer": f"{training.optimizer}, learning rate {training.learning_rate:g}, {training.schedule} schedule",
        "seed": str(config.seed),
    }
    if ema:
        return facts | {"weights": f"moving average with decay {training.ema:g}"}
    measured: dict[str, Any] = {}
    with suppress(OSError):  # a run that was converted, or whose folder has been copied in part, has no measurements
        for line in read_measurements(run):
            measured |= line if line["step"] == step else {}
    if isinstance(loss := measured.get("validation_loss"), float):
        facts["validation loss"] = f"{loss:.4f} nats per token"
    if isinstance(accuracy := measured.get("accuracy"), float):
        facts["accuracy"] = f"{100 * accuracy:.1f} %"
    return facts
