"""The logit lens and the output scores of many latents, on random models of real shapes.

    python -m experiments.bench.lens [--shapes llama,gemma,gpt2] [--latents 4096] [--out experiments/bench]

First the folded map is compared with the model's own logits, far out along random directions. Then are measured: the
product of folded directions and unembedding alone (the floor of the lens), the lens with the 20 tokens at either end,
and the output scores of as many latents. Appends a row a shape to <out>/gpu_lens.csv, or prints only, on a CPU.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from experiments.bench import ledger
from experiments.bench.stream import Shape, byte_tokenizer, make, shapes
from sae_persona.activations.hooks import editing, model_inputs
from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.features.logit_lens import ENTRIES, LogitLens
from sae_persona.features.output_scores import output_scores
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import TopK
from sae_persona.types import HookPoint


def seconds(job: Callable[[], object], device: str) -> float:
    """Of the second call."""
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
    return taken


@torch.no_grad()
def error_of_the_map(lm: LM, lens: LogitLens) -> float:
    """Largest relative distance, over 8 directions d, of the map from (logits(1e3 d) - logits(-1e3 d)) / 2."""
    d = torch.randn(8, lm.d_model, device=lm.device)
    size = (d - d.mean(1, keepdim=True) if lens.unembedding.centred else d).square().mean(1, keepdim=True).sqrt()

    def logits(x: Tensor) -> Tensor:
        ids = torch.full((len(x), 1), 5, device=lm.device)
        with editing(lm, HookPoint(lm.n_layers - 1), lambda old: x[:, None].to(old)):
            return lm.model(**model_inputs(lm, ids, torch.ones_like(ids))).logits[:, -1].float()

    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    ends = [logits(sign * 1e3 * d) for sign in (1, -1)]
    up, down = (cap * torch.atanh(end / cap) if cap else end for end in ends)
    got = lens.unembedding.logits(d) / size
    return float(((got - (up - down) / 2).norm(dim=1) / got.norm(dim=1)).max())


def on_a_cpu(shape: Shape) -> LM:
    model = transformers.AutoModelForCausalLM.from_config(shape.model, dtype=torch.bfloat16)
    return wrap_lm(model, byte_tokenizer(), name="random")


def measured(shape: Shape, n: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    lm, hook = (make(shape) if device == "cuda" else on_a_cpu(shape)), HookPoint(shape.layer)
    w = torch.nn.functional.normalize(torch.randn(n, lm.d_model, device=device), dim=1)
    sae = SAE(w, torch.zeros(n, device=device), w, torch.zeros(lm.d_model, device=device), TopK(shape.k))
    lens = LogitLens(lm, sae)
    # the tokenizer here knows bytes only; the lens is to rank the whole vocabulary
    lens.unembedding = replace(lens.unembedding, weight=lm.model.get_output_embeddings().weight)
    off, latents = error_of_the_map(lm, lens), torch.arange(n)
    folded, weight = lens.unembedding.fold(w), lens.unembedding.weight.float()
    rows = max(1, ENTRIES // len(weight))
    floor = seconds(lambda: [part @ weight.T for part in folded.split(rows)], device)
    del weight
    top = lens.tokens(latents, 20).promoted
    found = {
        "vocabulary": lens.unembedding.n_tokens,
        "d_model": lm.d_model,
        "latents": n,
        "map_off": f"{off:.2e}",
        "floor_s": round(floor, 4),
        "lens_s": round(seconds(lambda: lens.tokens(latents, 20), device), 4),
        "outputs_s": round(seconds(lambda: output_scores(lm, sae, hook, latents, top, prompt="so"), device), 4),
    }
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {**found, "peak_gb": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="llama,gemma,gpt2")
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("experiments/bench"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.shapes.split(","):
        row = {"shape": name, **measured(shapes()[name], args.latents, device)}
        print(row, flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            facts = {"commit": ledger.commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
            facts |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
            ledger.append(args.out / "gpu_lens.csv", {**facts, **row})


if __name__ == "__main__":
    main()
