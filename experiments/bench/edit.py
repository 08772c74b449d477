"""What edits cost while a language model decodes, each step one CUDA graph.

    python -m experiments.bench.edit [--shape llama|small] [--batches 1,32] [--out experiments/bench]

A random model of Llama-3-8B's shape decodes with a static cache; its forward pass, hooks included, is captured in a
CUDA graph, so a hook that waits for the host cannot run at all. In one run: no edit; 8 latents of a threshold SAE
clamped (their rows of the encoder are read); the same under TopK (the whole encoder is read); and the stream replaced
by the SAE's reconstruction with the error kept, as SAELens' models do it, in plain torch. Appends a row for each batch
size to <out>/gpu_edit.csv.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from experiments.bench import ledger
from experiments.bench.stream import byte_tokenizer, make, shapes
from sae_persona.activations.hooks import editing
from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Rule, Threshold, TopK
from sae_persona.steering.apply import intervene
from sae_persona.steering.interventions import Clamp
from sae_persona.types import HookPoint

PROMPT, STEPS, EDITS = 128, 64, 8


def small() -> tuple[LM, HookPoint, int]:
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    return wrap_lm(model.requires_grad_(False), byte_tokenizer(), name="small"), HookPoint(2), 4096


def llama() -> tuple[LM, HookPoint, int]:
    shape = shapes()["llama"]
    return make(shape), HookPoint(shape.layer), shape.n_latents


def an_sae(rule: Rule, d: int, n_latents: int, hook: HookPoint) -> SAE:
    draw = torch.Generator("cuda").manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(n_latents, d, device="cuda", generator=draw), dim=1)
    zeros = torch.zeros(n_latents, device="cuda"), torch.zeros(d, device="cuda")
    return SAE(w, zeros[0], w, zeros[1], rule, {"hook": str(hook)})


@contextmanager
def spliced(lm: LM, sae: SAE, hook: HookPoint, k: int) -> Iterator[None]:
    """Decode the latents, 8 of them set, and add the error of the decoding that had them as they were."""

    def change(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2).float()
        pre = flat @ sae.w_enc.T + sae.b_enc
        top = pre.topk(k, dim=1)
        acts = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
        error = flat - (acts @ sae.w_dec + sae.b_dec)
        acts[:, :EDITS] = 2.0
        return (acts @ sae.w_dec + sae.b_dec + error).to(x.dtype).view_as(x)

    with editing(lm, hook, change):
        yield


def step_ms(lm: LM, batch: int, steering: Any) -> float:
    """Median milliseconds of a replayed step."""
    config: Any = lm.model.config
    cache = transformers.StaticCache(config=config, max_cache_len=2 * (PROMPT + STEPS))
    ids = torch.randint(3, 250, (batch, PROMPT), device="cuda")
    one, at = ids[:, :1].clone(), torch.full((batch, 1), PROMPT, device="cuda")
    with torch.no_grad(), steering:
        position = torch.arange(PROMPT, device="cuda").expand(batch, -1)
        lm.model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
        step = lambda: lm.model(input_ids=one, position_ids=at, past_key_values=cache, use_cache=True)  # noqa: E731
        graph = captured(step)
        return replayed(graph)


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    times = []
    for i in range(STEPS + 8):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        if i >= 8:
            times.append(begun.elapsed_time(ended))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("llama", "small"), default="llama")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    lm, hook, n_latents = llama() if a.shape == "llama" else small()
    k = 64
    threshold = an_sae(Threshold(torch.full((n_latents,), 2.0, device="cuda")), lm.d_model, n_latents, hook)
    topk = SAE(threshold.w_enc, threshold.b_enc, threshold.w_dec, threshold.b_dec, TopK(k), threshold.metadata)
    clamps = [Clamp(i, 2.0, 1.0) for i in range(EDITS)]
    for batch in map(int, a.batches.split(",")):
        base = step_ms(lm, batch, nullcontext())
        partial = step_ms(lm, batch, intervene(lm, threshold, clamps))
        full = step_ms(lm, batch, intervene(lm, topk, clamps))
        splice = step_ms(lm, batch, spliced(lm, topk, hook, k))
        again = step_ms(lm, batch, nullcontext())
        row = {
            "commit": ledger.commit(), "date": datetime.now(UTC).date().isoformat(),
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "model": a.shape, "batch": batch,
            "n_latents": n_latents, "edits": EDITS, "plain_ms": round(base, 4), "plain_again_ms": round(again, 4),
            "threshold_ms": round(partial, 4), "topk_ms": round(full, 4), "splice_ms": round(splice, 4),
            "threshold_x": round(partial / base, 4), "topk_x": round(full / base, 4),
            "splice_x": round(splice / base, 4),
        }  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        ledger.append(a.out / "gpu_edit.csv", row)


if __name__ == "__main__":
    main()
