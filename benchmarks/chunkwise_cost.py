"""Time and memory of the chunkwise retention op, forward and backward, over the sequence length.

    python benchmarks/chunkwise_cost.py [longest]

Every length runs in a process of its own; its memory is the peak beyond what the process held before the op. Linear
cost shows as a constant last pair of columns.
"""

import resource
import statistics
import subprocess
import sys
import time

HEADS, KEYS, VALUES, CHUNK, REPEATS = 4, 128, 256, 128, 5


def measure(length: int) -> None:
    """Print the median seconds of forward and of forward + backward, and the peak bytes, for one length."""
    import torch

    from seqmix.mixers.ops.decay import decay_chunkwise

    q, k, v = (torch.randn(1, length, HEADS, width, requires_grad=True) for width in (KEYS, KEYS, VALUES))
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS))))
    upstream = torch.randn(1, length, HEADS, VALUES)
    warm = [x[:, :CHUNK].detach().requires_grad_() for x in (q, k, v)]
    decay_chunkwise(*warm, log_decay).output.sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward, both = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        output = decay_chunkwise(q, k, v, log_decay, chunk_size=CHUNK).output
        forward.append(time.perf_counter() - start)
        output.backward(upstream)
        both.append(time.perf_counter() - start)
        q.grad = k.grad = v.grad = None
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(statistics.median(forward), statistics.median(both), peak)


def main(longest: int) -> None:
    """Measure lengths from 1,024 up to `longest`."""
    print(f"H{HEADS} K{KEYS} V{VALUES} C{CHUNK}, float32, median of {REPEATS}")
    print(f"{'T':>7} {'forward ms':>11} {'fwd+bwd ms':>11} {'peak MiB':>9} {'us/token':>9} {'KiB/token':>10}")
    length = 1024
    while length <= longest:
        command = [sys.executable, __file__, "--one", str(length)]
        words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        forward, both, peak = (float(word) for word in words)
        print(
            f"{length:>7,} {forward * 1e3:>11.1f} {both * 1e3:>11.1f} {peak / 2**20:>9.0f} "
            f"{both / length * 1e6:>9.2f} {peak / length / 1024:>10.1f}",
            flush=True,
        )
        length *= 2


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 65536)
