"""The host's memory while activations are streamed: flat, and no more than the settings say.

    python -m experiments.bench.memory [--minutes 10] [--buffer-tokens 65536]

Streams the lab's texts through its model on a CPU, over and over, and looks at the resident memory every second. It
rises and falls by some 30 MB with each group of forward passes, so means are compared over thirds of the time, after a
first minute that does not count: exit status 1 if that of the last third is more than 2 % above that of the first.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from sae_persona.activations.lm import load_lm
from sae_persona.activations.stream import StreamConfig, stream
from sae_persona.lab.corpora import corpus
from sae_persona.types import HookPoint


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--buffer-tokens", type=int, default=65_536)
    a = parser.parse_args()
    torch.set_num_threads(1)
    lm, texts = load_lm("lab"), list(corpus(500))
    before = resident()
    config = StreamConfig(buffer_tokens=a.buffer_tokens, passes=10**9)
    print(f"before {before:.0f} MB; the buffer is {a.buffer_tokens * lm.d_model * 4 / 1e6:.0f} MB", flush=True)
    start, seen, tokens = time.monotonic(), [], 0
    for batch in stream(lm, HookPoint(3), texts, config):
        tokens += len(batch)
        minutes = (time.monotonic() - start) / 60
        if not seen or minutes - seen[-1][0] > 1 / 60:
            seen.append((minutes, resident()))
        if minutes > a.minutes:
            break
    third = (a.minutes - 1) / 3
    early = mean([mb for at, mb in seen if 1 <= at < 1 + third])
    late = mean([mb for at, mb in seen if at >= a.minutes - third])
    print(f"{tokens} tokens in {a.minutes:g} minutes: {early:.1f} MB in the first third, {late:.1f} MB in the last, "
          f"at most {max(mb for _, mb in seen):.1f} MB")  # fmt: skip
    return int(late > 1.02 * early)


if __name__ == "__main__":
    sys.exit(main())
