"""The learning benchmark: loss and training time of small models, on the budget of nanoGPT's CPU example.

4 layers of width 128, about 0.8M parameters, 2000 steps of 12 sequences of 64 bytes, learning rate 1e-3. The first
90 % of one text is the train split; the loss is measured on all the rest. Attention and retention are also trained for
five eighths of the steps, because their steps cost more and they need fewer of them.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import Batch
from ...models import IGNORED, LanguageModel, build_model
from ...training import RunConfig, load_config
from ...training.optimizer import build_optimizer, set_learning_rate
from ...training.schedule import learning_rate
from .benchmark import Report, Row, chosen_names
from .machine import describe
from .peers.gpt import GptBlock
from .timing import Spread, TimedCall, ratio, time_interleaved

BUDGET = (
    "data={split: tail, sequence_length: 64}",
    "training={steps: 2000, batch_size: 12, learning_rate: 1.0e-3}",
    "training={optimizer: adamw, schedule: cosine}",
    "training={final_lr_ratio: 0.1, weight_decay: 0.1, betas: [0.9, 0.99], clip_norm: 1.0}",
    "model.blocks.ret.mixer.paradigm=parallel",  # the fastest at this length
)
"""Changes to the preset retnet-tiny that all models share."""
ATTENTION = ("model.blocks.ret.mixer={kind: attention, n_heads: 4}", "model.blocks.ret.ffn.expansion=4.0")
NAMES = ("nanogpt", "attention", "attention-5/8", "retention", "retention-5/8")
STEPS_PER_CALL = 10
"""Training steps of one timed call."""


class NanoGpt(nn.Module):
    """GPT as in nanoGPT: learned positions, tied embedding, residual outputs initialized small."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        vocab = config.model.vocab_size
        width = config.model.d_model
        layers = config.model.n_layers
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(config.data.sequence_length, width)
        self.blocks = nn.Sequential(*(GptBlock(width, 4, 4 * width, fused=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B T vocab] of tokens [B T]."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Learning:
    """Training of one model; optimizer, schedule and batches are the same for all models."""

    def __init__(self, name: str, changes: Sequence[str]) -> None:
        swap = ATTENTION if name.startswith("attention") else ()
        all_changes = [*BUDGET, *swap, *changes]
        steps = load_config("retnet-tiny", [*all_changes, "training.warmup_steps=0"]).training.steps
        self.steps = steps * 5 // 8 if name.endswith("-5/8") else steps
        self.done = 0
        schedule = [f"training.steps={self.steps}", f"training.warmup_steps={min(100, self.steps)}"]
        self.config = load_config("retnet-tiny", [*all_changes, *schedule])
        torch.manual_seed(self.config.seed)
        gpt = name == "nanogpt"
        self.model = NanoGpt(self.config) if gpt else build_model(self.config.model, seed=self.config.seed)
        self.source = self.config.open_data()
        self.optimizer = build_optimizer(self.model, self.config.training)

    def loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy in nats, summed over the targets."""
        if isinstance(self.model, LanguageModel):
            return self.model(batch.inputs, targets=batch.targets, reduction="sum").loss
        logits = self.model(batch.inputs).flatten(0, 1)
        targets = batch.targets.flatten()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def train_next_steps(self) -> None:
        """Make the next `STEPS_PER_CALL` training steps, or as many as remain."""
        settings = self.config.training
        self.model.train()
        for step in range(self.done, min(self.done + STEPS_PER_CALL, self.steps)):
            set_learning_rate(self.optimizer, learning_rate(step, settings))
            batch = self.source.training_batch(step, settings.batch_size, self.config.seed)
            (self.loss(batch) / (batch.targets != IGNORED).sum()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.done = step + 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss of the whole validation split, in nats per token."""
        self.model.eval()
        examples = self.source.evaluation_batches(self.config.training.batch_size, None)
        batches = [example.batch for example in examples]
        counted = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        return sum(self.loss(batch).item() for batch in batches) / counted


def run(changes: Sequence[str], only: Sequence[str], progress: Callable[[str], object]) -> Report:
    """Train the models named in `only` (all when empty), interleaved.

    `changes` are changes to the configuration, such as the text: `data.paths=[text.txt]`.

    Raises:
        SeqmixError: a change, a name or the text cannot be used.
    """
    trainings = {name: Learning(name, changes) for name in chosen_names(NAMES, only)}
    config = next(iter(trainings.values())).config
    rounds = math.ceil(config.training.steps / STEPS_PER_CALL)
    samples = time_interleaved(
        {name: TimedCall(training.train_next_steps, units=STEPS_PER_CALL) for name, training in trainings.items()},
        repeat=rounds,
        on_call=lambda name: progress(f"learn: {name}, {trainings[name].done:,} of {trainings[name].steps:,} steps"),
    )
    rows = []
    first = next(iter(trainings))
    for name, training in trainings.items():
        # only rounds with all their steps count: rounds after the last step take no time
        whole = max(training.steps // STEPS_PER_CALL, 1)
        seconds = [step * training.steps for step in samples[name][:whole]]
        reference = [step * trainings[first].steps for step in samples[first][:whole]]
        progress(f"learn: {name}, validation")
        rows.append(
            Row(
                what="learn",
                length=config.data.sequence_length,
                name=name,
                parameters=sum(p.numel() for p in training.model.parameters()),
                tokens=training.steps * config.training.batch_size * config.data.sequence_length,
                seconds=Spread.of(seconds),
                ratio=ratio(seconds, reference),
                loss=training.evaluate(),
            )
        )
    return Report(
        benchmark="learn",
        title="Learning",
        machine=describe(torch.device("cpu")),
        settings={"dtype": "float32", "repeat": rounds, "steps": config.training.steps},
        rows=rows,
        notes=(
            f"{config.training.steps:,} steps of {config.training.batch_size} sequences, or five eighths of them. "
            f"Times are of the whole training, from rounds of {STEPS_PER_CALL} steps. "
            "Losses are of the whole validation split.",
        ),
    )
