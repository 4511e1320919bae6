"""nanoGPT's small CPU budget: what retention and attention reach, and in how many seconds, beside a GPT of its kind.

    python -m seqmix.benchmarks.small_budget tinyshakespeare.txt [steps]

4 layers of width 128, about 0.8M parameters, 2000 steps of 12 sequences of 64 bytes, learning rate 1e-3; the first 90 %
of the text is learnt, the rest is validation, all of it. The models take their steps in turn, ten at a time, so that a
busy machine slows all of them; seconds are those of training steps alone. Attention and retention also run on five
eighths of the steps: theirs cost more, and they need fewer.
"""

import math
import time
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from torch import Tensor, nn

from ..data import evaluation_batches, read_corpus, training_batch
from ..models import IGNORED, build_model
from ..training import RunConfig, load_config
from ..training.metrics import Measured
from ..training.optim import build_optimizer, learning_rate
from ..training.trainer import Trainer
from .program import run_program

LENGTH, WIDTH, LAYERS, HEADS = 64, 128, 4, 4
ATTENTION = "{kind: attention, n_heads: 4}"
PARALLEL = "model.blocks.ret.mixer.paradigm=parallel"  # the quickest at this length
TURN = 10


def run_config(text: str, steps: int, *changes: str) -> RunConfig:
    """The budget, with a preset's model."""
    return load_config(
        "retnet-tiny",
        [
            f"data={{paths: [{text}], split: tail, sequence_length: {LENGTH}}}",
            f"training={{steps: {steps}, batch_size: 12, learning_rate: 1.0e-3, warmup_steps: {min(100, steps)}}}",
            "training={final_lr_ratio: 0.1, weight_decay: 0.1, betas: [0.9, 0.99], clip_norm: 1.0}",
            *changes,
        ],
    )


class GptBlock(nn.Module):
    """A block of a plain GPT: LayerNorm, causal SDPA, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """A GPT as nanoGPT builds it: learned positions, tied embedding, small residual outputs at the start."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(GptBlock() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class GptTraining:
    """The GPT under the same optimizer, schedule and batches."""

    def __init__(self, config: RunConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, read_corpus(config.data)
        self.model = Gpt(config.model.vocab_size)
        self.optimizer = build_optimizer(self.model, config.training)

    def loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Nats, summed."""
        return F.cross_entropy(
            self.model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def train_step(self, step: int) -> None:
        """One optimizer step."""
        settings = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        batch = training_batch(self.corpus.train, LENGTH, settings.batch_size, seed=self.config.seed, step=step)
        loss = self.loss_sum(*batch) / (batch.targets != IGNORED).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()

    @torch.no_grad()
    def evaluate(self, *, final: bool) -> Measured:
        """Nats a byte of the whole validation text, whether it is the last evaluation or not."""
        del final
        batches = list(evaluation_batches(self.corpus.validation, LENGTH, self.config.training.batch_size, None))
        counted = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        return Measured(sum(self.loss_sum(*batch).item() for batch in batches) / counted)


def trainer(config: RunConfig) -> Trainer:
    """A model of ours in training."""
    model = build_model(config.model, seed=config.seed)
    return Trainer(config, config.open_data(), model, build_optimizer(model, config.training))


def main(
    text: Annotated[str, typer.Argument(help="A text file.")],
    steps: Annotated[int, typer.Argument(help="Of the longer trainings.", min=8)] = 2000,
) -> None:
    """Train all, in turn; print a table."""
    fewer = steps * 5 // 8
    whole, shorter = run_config(text, steps, PARALLEL), run_config(text, fewer, PARALLEL)
    swap = (f"model.blocks.ret.mixer={ATTENTION}", "model.blocks.ret.ffn.expansion=4.0")
    contestants: dict[str, GptTraining | Trainer] = {
        f"GPT of nanoGPT's kind, {steps} steps": GptTraining(whole),
        f"attention, {steps} steps": trainer(run_config(text, steps, *swap)),
        f"attention, {fewer} steps": trainer(run_config(text, fewer, *swap)),
        f"retention, {steps} steps": trainer(whole),
        f"retention, {fewer} steps": trainer(shorter),
    }
    seconds = dict.fromkeys(contestants, 0.0)
    for start in track(range(0, steps, TURN), description="training"):
        for name, contestant in contestants.items():
            began = time.perf_counter()
            for index in range(start, min(start + TURN, contestant.config.training.steps)):
                contestant.train_step(index)
            seconds[name] += time.perf_counter() - began
    losses = {name: contestant.evaluate(final=True).loss for name, contestant in contestants.items()}
    first = next(iter(seconds.values()))
    print(f"{'model':<34} {'parameters':>10} {'nats/byte':>10} {'seconds':>8} {'ratio':>6}")
    for name, contestant in contestants.items():
        count = sum(p.numel() for p in contestant.model.parameters())
        print(f"{name:<34} {count:>10,} {losses[name]:>10.4f} {seconds[name]:>8.1f} {seconds[name] / first:>6.2f}")


if __name__ == "__main__":
    run_program(main)
