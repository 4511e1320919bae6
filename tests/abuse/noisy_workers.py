"""A study whose plug-in prints, closes what it prints to, ends the process or starts others: every run ends, or is said
to have failed, and the study is reported.

A run speaks to its study over a channel of its own; what it prints is in its log.
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from abuse.commands import environment, prepared
from abuse.tally import Case

MODULE = """
import atexit, faulthandler, json, logging, os, signal, subprocess, sys, threading, time, warnings
from typing import Literal
from seqmix.mixers.min_gru import MinGRUConfig


class NoisyConfig(MinGRUConfig):
    kind: Literal["noisy"] = "noisy"

    def build(self, d_model, **position):
        {built}
        return super().build(d_model, **position)
"""
PRINTS = {
    "a number": "print(7)",
    "null": "print('null')",
    "a mapping": "print(json.dumps({'step': 10**6, 'loss': 0.1}))",
    "a mapping that failed": "print(json.dumps({'failed': 'no'}))",
    "half a line": "sys.stdout.write('{'); sys.stdout.flush()",
    "bytes": "os.write(1, b'\\xff\\x00\\xfe\\n' * 1000)",
    "a megabyte": "print('x' * 10**6)",
    "many lines": "print('x\\n' * 10**5)",
    "errors": "sys.stderr.write('x' * 10**5)",
    "warnings": "[warnings.warn(f'{i}') for i in range(1000)]",
    "a log": "logging.basicConfig(stream=sys.stdout); logging.error('{}')",
    "by another process": "subprocess.run(['echo', '{}'])",
    "at the end": "atexit.register(print, '{}')",
    "control characters": "print(chr(27) + '[2J' + chr(7))",
    "half a character": "os.write(1, b'\\xe2\\x82')",
    "from a thread": "threading.Thread(target=print, args=('{}',)).start()",
    "for as long as it lives": "threading.Thread(target=lambda: [(print(i), time.sleep(1e-3)) for i in range(10**7)], "
    "daemon=True).start()",
}
"""What a plug-in says; the run finishes nonetheless."""
DISTURBS = {
    "closes its output": "os.close(1)",
    "closes its errors": "os.close(2)",
    "closes its input": "os.close(0)",
    "takes another output": "sys.stdout = None",
    "takes another errors": "sys.stderr = None",
    "reads its input": "sys.stdin.read() if False else None",
    "starts a process that stays": "subprocess.Popen(['sleep', '20'])",
    "changes the folder": "os.chdir('/')",
    "ignores signals": "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "changes the locale": "os.environ['LANG'] = 'no such'",
}
"""What a plug-in does to its process; the run finishes or fails."""
ENDS = {
    "raises": "raise RuntimeError('no')",
    "raises what is no exception": "raise KeyboardInterrupt",
    "exits": "sys.exit(0)",
    "exits with a number": "sys.exit(5)",
    "exits with a text": "sys.exit('x' * 10**5)",
    "ends at once": "os._exit(0)",
    "ends at once with a number": "os._exit(130)",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "crashes": "faulthandler._sigsegv()",
    "aborts": "os.abort()",
    "raises a text of a megabyte": "raise RuntimeError('x' * 10**6)",
    "raises control characters": "raise RuntimeError(chr(27) + '[2J')",
    "recurses for ever": "(f := lambda: f())()",
}
"""How a plug-in ends its run, which has failed; the other entry's run finishes."""


def noisy_workers(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """What a plug-in does while a worker builds its model."""
    base = prepared(folder)
    kinds = {"prints": (PRINTS, 0), "disturbs": (DISTURBS, None), "ends": (ENDS, 1)}
    for kind, (cases, status) in kinds.items():
        for number, (name, code) in enumerate(cases.items()):
            where = folder / f"{kind}-{number}"
            yield Case(f"{kind}: {name}", partial(_try, base, where, code, status), refused=False)


def _try(base: Path, where: Path, code: str, status: int | None) -> None:
    shutil.copytree(base, where)
    # the study's own process builds models too, and is spared: a worker has no name
    guarded = f"if sys.argv[0] == '-c': exec({code!r}, globals())"
    (where / "noisy.py").write_text(MODULE.replace("{built}", guarded))
    file = where / "study.yaml"
    file.write_text(file.read_text().replace("mixers: [retention]", "mixers: [retention, 'noisy:NoisyConfig']"))
    done = subprocess.run(
        [sys.executable, "-m", "seqmix", "compare", "study.yaml", "--out", "new", "--jobs", "1"],
        cwd=where,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr.splitlines()[-1]
    assert max(map(len, done.stderr.splitlines()), default=0) < 5000, "a line of errors that fills the screen"
    assert done.returncode in ((0, 1) if status is None else (status,)), (
        f"status {done.returncode}: {done.stderr[-300:]}"
    )
    assert (where / "new" / "report.html").is_file(), "no report"
    rows = (where / "new" / "runs.csv").read_text()
    assert "retention-seed0,retention" in rows, "a run is not reported"
    said = "runs failed" in done.stdout + done.stderr
    assert said == (done.returncode != 0), f"status {done.returncode}, said {done.stdout[-300:]}"
