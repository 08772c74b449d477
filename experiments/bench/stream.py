"""Streaming end to end on a GPU: texts, a language model up to its hook point, the shuffle buffer, an SAE in training.

    python -m experiments.bench.stream [--shapes llama,gemma,gpt2] [--periods 5] [--compile] [--out experiments/bench]

The models are random, of the shapes of Llama-3-8B, Gemma-2-2B and GPT-2 small; the texts are random words of
lognormal length, tokenised byte by byte. In one run are measured: cuBLAS' product of the model's shapes; the bare
forward pass up to the hook point, over full rows; the stream alone; and all of it, per token that the SAE trains on.
Appends a row a shape to <out>/gpu_stream.csv. README.md explains the columns.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from experiments.bench import ledger
from sae_persona.activations.groups import FORWARDS
from sae_persona.activations.hooks import read_rows
from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.activations.stream import StreamConfig, stream
from sae_persona.sae.recipe import TrainConfig
from sae_persona.sae.train import train
from sae_persona.types import HookPoint

WIDTH = 1024  # tokens a row
BATCH = 8192  # tokens the SAE trains on at once


@dataclass(frozen=True)
class Shape:
    """A model, where it is read, and the SAE that reads it; ``rows`` of 1024 tokens go through the model at once."""

    model: Any
    layer: int
    n_latents: int
    k: int
    rows: int


def shapes() -> dict[str, Shape]:
    return {
        "llama": Shape(
            transformers.LlamaConfig(
                vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, bos_token_id=1,
            ), 16, 131_072, 64, 32,
        ),
        "gemma": Shape(
            transformers.Gemma2Config(
                vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                num_attention_heads=8, num_key_value_heads=4, head_dim=256, bos_token_id=1,
            ), 12, 65_536, 64, 32,
        ),
        "gpt2": Shape(transformers.GPT2Config(bos_token_id=1, eos_token_id=2), 8, 24_576, 32, 64),
    }  # fmt: skip


def byte_tokenizer() -> Any:
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def texts(n: int) -> list[str]:
    """Texts of random words: half of them shorter than 600 bytes, one in twenty longer than 3000."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnop"), size=size)) for size in draw.integers(2, 9, 2000)]
    lengths = np.exp(draw.normal(np.log(600), 1.0, n)).astype(int).clip(20, 20_000)
    return [" ".join(words[i] for i in draw.integers(0, 2000, max(2, length // 6))) for length in lengths]


def make(shape: Shape) -> LM:
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.AutoModelForCausalLM.from_config(shape.model, attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(torch.float32)
    return wrap_lm(model.requires_grad_(False), byte_tokenizer(), name=type(shape.model).__name__)


def seconds(call: Callable[[], Any], n: int) -> float:
    """Median of ``n`` calls, after two that do not count."""
    found = []
    for i in range(n + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i > 1:
            found.append(time.perf_counter() - start)
    return float(np.median(found))


def product_rate(d: int) -> float:
    """FLOP/s of cuBLAS in bf16 where it does best: a product of 16,384 tokens by [d, 4 d]."""
    x, w = torch.randn(16_384, d, device="cuda").bfloat16(), torch.randn(4 * d, d, device="cuda").bfloat16()
    return 2 * 16_384 * d * 4 * d / seconds(lambda: x @ w.T, 20)


def flops(lm: LM, layer: int) -> float:
    """FLOP a token of the blocks up to a layer: two a weight, and attention over half of the row on average."""
    weights = sum(p.numel() for block in lm.blocks[: layer + 1] for p in block.parameters())
    config: Any = lm.model.config
    width = getattr(config, "head_dim", None) or lm.d_model // config.num_attention_heads
    attention = 4 * config.num_attention_heads * width * WIDTH / 2
    return 2 * weights + attention * (layer + 1)


def bare(lm: LM, shape: Shape) -> float:
    """Seconds a token of the forward pass alone."""
    ids = torch.randint(3, 250, (shape.rows, WIDTH), device="cuda")
    position = torch.arange(WIDTH, device="cuda").expand(shape.rows, -1).contiguous()
    hook = [HookPoint(shape.layer)]
    segment = torch.zeros_like(ids)
    return seconds(lambda: read_rows(lm, hook, ids, position, segment, None), 5) / ids.numel()


def paced(batches: Iterator[torch.Tensor], n: int) -> float:
    """Seconds a token of the stream alone, over ``n`` batches after as many that do not count: of whole periods."""
    for _ in range(n):
        batch = next(batches)
    torch.cuda.synchronize()
    start, tokens = time.perf_counter(), 0
    for _ in range(n):
        batch = next(batches)
        tokens += len(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / tokens


def resident() -> float:
    """GB of this process in the host's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def measure(name: str, shape: Shape, *, periods: int, compiled: bool, corpus: list[str]) -> dict[str, object]:
    lm = make(shape)
    if compiled:
        lm.compile()
    rate = product_rate(lm.d_model)
    alone = bare(lm, shape)
    streaming = StreamConfig(
        context_size=WIDTH, batch_tokens=BATCH, buffer_tokens=262_144, lm_batch=shape.rows, passes=1000
    )
    made = stream(lm, HookPoint(shape.layer), corpus, streaming)
    # the model runs once for so many batches: only over whole periods do its tokens and those served agree
    period = FORWARDS * shape.rows * WIDTH // BATCH
    streamed = paced(iter(made), 2 * period)
    marks: list[tuple[float, int]] = []
    hosts: list[float] = []

    def on_step(line: dict[str, Any]) -> None:
        torch.cuda.synchronize()
        marks.append((time.perf_counter(), line["tokens"]))
        hosts.append(resident())

    config = TrainConfig(
        n_latents=shape.n_latents, k=shape.k, rule="topk", steps=period * periods, log_every=period, dead_after=10**9
    )
    train(made, config, on_step=on_step, progress=False)
    (t0, n0), (t1, n1) = marks[0], marks[-1]
    whole = (t1 - t0) / (n1 - n0)
    row = {
        "commit": ledger.commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": name,
        "compiled": compiled,
        "layer": shape.layer,
        "d_in": lm.d_model,
        "n_latents": shape.n_latents,
        "k": shape.k,
        "product_tflops": round(rate / 1e12, 1),
        "bare_us": round(1e6 * alone, 3),
        "bare_share": round(flops(lm, shape.layer) / alone / rate, 3),
        "stream_us": round(1e6 * streamed, 3),
        "whole_us": round(1e6 * whole, 3),
        "stream_x": round(streamed / alone, 3),
        "whole_x": round(whole / alone, 3),
        "tokens_s": round(1 / whole),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "host_gb": round(hosts[0], 2),
        "host_last_gb": round(hosts[-1], 2),
    }
    print("  ".join(f"{key} {value}" for key, value in row.items() if key not in ("commit", "date")), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama,gemma,gpt2")
    parser.add_argument("--periods", type=int, default=5, help="of the shuffle buffer; the first does not count")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    corpus = texts(20_000)
    for name in a.shapes.split(","):
        row = measure(name, shapes()[name], periods=a.periods, compiled=a.compile, corpus=corpus)
        ledger.append(a.out / "gpu_stream.csv", row)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
