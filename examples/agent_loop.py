"""An unattended search for a better mixer: propose, check, compare, keep or drop; `python examples/agent_loop.py`.

Every step is a seqmix command with `--json -`, in a folder of its own. Replace `propose` by your own source of ideas,
such as a language model. A proposal is kept only if its validation loss is better than that of the best mixer so far
by an interval that does not contain 0; both are trained on the same batches, with equally many parameters. The folder
has the table of all decisions (table.md, table.json), the study with every run, and its report.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BASE = """\
extends: retnet-tiny
model: {{d_model: 64, n_layers: 2}}
data: {{sequence_length: 128{paths}}}
training: {{steps: {steps}, batch_size: 8, evaluate_every: 1000, final_evaluation_batches: 32, log_every: 50}}
"""
FORGETFUL = '''
"""S_t = f_t S_{t-1} + (1 - f_t) k_t v_t^T per head, with f_t = sigmoid(x_t W_F)."""

from typing import Literal

import torch.nn.functional as F

from seqmix.mixers.parts import QKVConfig, QKVMixer
from seqmix.ops.decay import decay


class ForgetfulConfig(QKVConfig):
    """Linear attention that averages its values with a learned forget gate."""

    kind: Literal["forgetful"] = "forgetful"

    def build(self, d_model, *, layer_idx, n_layers):
        return Forgetful(self, d_model)


class Forgetful(QKVMixer):
    log_decay_shape = "B T H"

    def __init__(self, config, d_model):
        super().__init__(config, d_model, forget=config.n_heads)

    def recur(self, x, h, call):
        forget = h.more["forget"].to(self.state_dtype)
        k = h.k * (-forget).sigmoid()[..., None].to(h.k.dtype)
        return decay(h.q, k, h.v, F.logsigmoid(forget), call)
'''


@dataclass(frozen=True)
class Proposal:
    """A mixer to try: a name, its configuration, and the file that defines it if it is new."""

    name: str
    mixer: dict[str, Any]
    source: str = ""
    """Text of the module that the kind `module:Class` names; empty for a mixer of the library."""


@dataclass
class Decision:
    """Outcome of a proposal."""

    name: str
    decision: str
    loss: float | None = None
    margin: float | None = None
    """Half the width of the 95 % interval of the mean loss over seeds."""
    against: str = ""
    against_loss: float | None = None
    against_margin: float | None = None
    seconds: float = 0.0


def propose() -> Iterator[Proposal]:
    """Yield the mixer to start from, then ideas, the most promising first."""
    yield Proposal("retention", {"kind": "retention", "n_heads": 4})
    yield Proposal("with-convolution", {"kind": "retention", "n_heads": 4, "short_conv": 4})
    yield Proposal("forgetful", {"kind": "forgetful:ForgetfulConfig", "n_heads": 4}, FORGETFUL)
    yield Proposal("gated-delta", {"kind": "gated_delta_net", "n_heads": 4})
    yield Proposal("gla", {"kind": "gla", "n_heads": 4})


def seqmix(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a command in a folder, and return its result; an error is a result with the key `error`."""
    command = [sys.executable, "-m", "seqmix", *arguments, "--json", "-"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {"exit_status": done.returncode, "error": (done.stderr.strip() or "no output").splitlines()[-1]}


def check(folder: Path, proposal: Proposal) -> str | None:
    """Test that a mixer computes the same function in training and in decoding; return what is wrong, or None."""
    if proposal.source:
        (folder / f"{proposal.mixer['kind'].partition(':')[0]}.py").write_text(proposal.source)
    options = [f"{name}={json.dumps(value)}" for name, value in proposal.mixer.items() if name != "kind"]
    result = seqmix(folder, "check", proposal.mixer["kind"], *options, "--quick")
    if result["exit_status"] == 0:
        return None
    return result.get("error") or f"fails {', '.join(result['failed'])}"


def compare(folder: Path, best: Proposal, new: Proposal, seeds: int, budget: float) -> dict[str, Any]:
    """Train two mixers on the same batches; runs that an earlier comparison has made are reused."""
    study = {
        "name": "search",
        "question": f"Is {new.name} better than {best.name}?",
        "base": "base.yaml",
        "entries": {each.name: {"model": {"blocks": {"ret": {"mixer": each.mixer}}}} for each in (best, new)},
        "subject": new.name,
        "match": {"parameters": "base.yaml", "knob": "blocks.*.ffn.expansion"},
        "seeds": list(range(seeds)),
    }
    (folder / "study.yaml").write_text(json.dumps(study))  # JSON is YAML
    return seqmix(folder, "compare", "study.yaml", "--out", "study", "--budget", f"{budget:.0f}s")


def decide(result: dict[str, Any], best: Proposal, new: Proposal) -> Decision:
    """Keep a mixer if the best one so far is worse than it, by the interval of their difference."""
    if "error" in result:
        return Decision(new.name, f"dropped: {result['error']}", against=best.name)
    rows = {row["entry"]: row for row in result["summary"]}
    decision = Decision(new.name, "dropped: not shown to be better", against=best.name)
    if row := rows.get(new.name):
        decision.loss, decision.margin = (row["validation_loss"][key] for key in ("mean", "margin"))
    if row := rows.get(best.name):
        decision.against_loss, decision.against_margin = (row["validation_loss"][key] for key in ("mean", "margin"))
    if result["state"] == "stopped":
        decision.decision = "undecided: the time was up"
    elif failed := result["failed"]:
        decision.decision = f"dropped: {next(iter(failed.values()))}"
    elif any(each["entry"] == best.name and each["verdict"] == "worse" for each in result["comparisons"]):
        decision.decision = "kept"
    return decision


def write_table(folder: Path, decisions: list[Decision]) -> None:
    """Write all decisions, after each of them, so that a search that is stopped leaves its table."""

    def interval(loss: float | None, margin: float | None) -> str:
        return "" if loss is None else f"{loss:.4f}" + ("" if margin is None else f" ± {margin:.4f}")

    lines = ["| mixer | loss | against | its loss | decision | seconds |", "|---|---|---|---|---|---|"]
    for each in decisions:
        losses = interval(each.loss, each.margin), interval(each.against_loss, each.against_margin)
        cells = each.name, losses[0], each.against, losses[1], each.decision, f"{each.seconds:.0f}"
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps([asdict(each) for each in decisions], indent=2) + "\n")


def main() -> None:
    """Search until the time is up or there are no more ideas."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("search"), help="new folder of the search")
    parser.add_argument("--minutes", type=float, default=10.0, help="time budget")
    parser.add_argument("--steps", type=int, default=150, help="training steps of a run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per mixer")
    parser.add_argument("--text", type=Path, help="text to learn; the source of Python's library by default")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True)
    paths = "" if options.text is None else f", paths: [{json.dumps(str(options.text.resolve()))}]"
    (options.out / "base.yaml").write_text(BASE.format(steps=options.steps, paths=paths))
    ideas = propose()
    best = next(ideas)
    decisions: list[Decision] = []
    for new in ideas:
        began = time.monotonic()
        if (problem := check(options.out, new)) is not None:
            decision = Decision(new.name, f"dropped: {problem}", against=best.name)
        elif (left := end - time.monotonic()) < 1:
            break
        else:
            decision = decide(compare(options.out, best, new, options.seeds, left), best, new)
        decision.seconds = time.monotonic() - began
        decisions.append(decision)
        write_table(options.out, decisions)
        sys.stdout.write(f"{new.name} against {best.name}: {decision.decision}\n")
        if decision.decision == "kept":
            best = new
    sys.stdout.write(f"the best mixer is {best.name}; {options.out / 'table.md'} has all decisions\n")


if __name__ == "__main__":
    main()
