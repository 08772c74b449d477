"""The dictionary pass beside the harvest that it reads: texts, a language model up to its hook point, an SAE's encoder.

    python -m experiments.bench.scan [--shapes llama,gpt2] [--rules topk,threshold] [--tokens 2000000]
    python -m experiments.bench.scan --device cpu --shapes tiny --tokens 20000      small, to see that it runs

The models are random, of the shapes of `stream.py`; so is the SAE, whose thresholds are set so that k latents a token
fire. First it is checked that the accumulators on the device hold what those on the CPU do, to the bit, and that the
encoder finds what an fp32 product finds; what differs is printed as RED, and there is no row. Then are timed, one after
the other over the same tokens: the model alone; model and encoder (the harvest); all of it; and writing the file.
``half`` is the pace of the second half of the pass, when the tables of contexts are full. Appends a row a shape and
rule to <out>/gpu_scan.csv.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from experiments.bench import ledger, stream
from experiments.bench.stream import Shape
from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.activations.stream import from_model
from sae_persona.features.corpus import ROWS, located, scan
from sae_persona.features.firings import Piece, TokenRows
from sae_persona.features.scan import Scan, ScanConfig
from sae_persona.sae.encoder import Encoder
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Rule, Threshold, TopK, calibrate
from sae_persona.types import HookPoint, SparseLatents

TINY = Shape(
    transformers.LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1,
    ), 1, 2048, 16, 4,
)  # fmt: skip
MOST_MODEL_TOKENS = 2_000_000  # that the model alone is timed on: its pace is even
MOST_PARTS = 12  # of the accumulators' check


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def make(shape: Shape, device: str) -> LM:
    if device.startswith("cuda"):
        return stream.make(shape)
    model = transformers.AutoModelForCausalLM.from_config(shape.model, attn_implementation="sdpa")
    return wrap_lm(model.requires_grad_(False), stream.byte_tokenizer(), name=type(shape.model).__name__)


def random_sae(shape: Shape, d: int, rule: str, x: torch.Tensor) -> SAE:
    """Encoder and decoder are one tensor, which a GPU's memory is glad of; nothing here decodes."""
    draw = torch.Generator(device=x.device).manual_seed(0)
    w = torch.randn(shape.n_latents, d, generator=draw, device=x.device)
    w = torch.nn.functional.normalize(w, dim=1)
    zeros = torch.zeros(shape.n_latents, device=x.device)

    def made(how: Rule) -> SAE:
        return SAE(w, zeros, w, torch.zeros(d, device=x.device), how)

    if rule == "topk":
        return made(TopK(shape.k))
    theta = calibrate(made(TopK(shape.k)).pre_acts, [x.float()], shape.k)
    return made(Threshold(torch.full_like(zeros, theta)))


def differing(a: Scan, b: Scan) -> list[str]:
    """What two scans of the same firings do not agree on."""
    a.cofiring.settle()
    b.cofiring.settle()
    names = {
        "stats": ("fired", "maximum", "histogram"),
        "seen": ("first", "last"),
        "contexts": a.contexts.PARTS,
        "sampled": a.sampled.PARTS,
        "cofiring": ("drawn", "offsets", "idx"),
    }
    pairs = [(f"{p}.{n}", getattr(getattr(a, p), n), getattr(getattr(b, p), n)) for p in names for n in names[p]]
    found = [name for name, x, y in pairs if not torch.equal(x.cpu(), y.cpu())]
    for name in ("total", "squares"):
        x, y = getattr(a.stats, name).cpu(), getattr(b.stats, name).cpu()
        found += [] if torch.allclose(x, y, rtol=1e-12, atol=0) else [f"stats.{name}"]
    near, far = a.cofiring.neighbours(4), b.cofiring.neighbours(4)
    found += [] if torch.equal(near.jaccard.cpu(), far.jaccard.cpu()) else ["neighbours"]
    return found


def check_accumulators(device: str) -> list[str]:
    """The same random firings on the CPU and on the device."""
    n_latents, k, draw = 3000, 24, torch.Generator().manual_seed(0)
    config = ScanConfig(contexts=8, sampled=20, cofiring_tokens=2000)
    one, other = Scan(n_latents, config), Scan(n_latents, config, device)
    for part in range(MOST_PARTS):
        lengths = torch.randint(2, 300, (20,), generator=draw).tolist()
        pieces = [
            Piece(20 * part + i, 0, torch.randint(3, 250, (n,), generator=draw).tolist(), torch.arange(n) > 0)
            for i, n in enumerate(lengths)
        ]
        rows = TokenRows.of(pieces)
        scores = torch.randn(rows.n, n_latents, generator=draw).abs().topk(k, dim=1)
        acts = (scores.values * 8).round() / 8  # many equal ones
        one.update(rows, SparseLatents(acts, scores.indices))
        other.update(rows, SparseLatents(acts.to(device), scores.indices.to(device)))
    return differing(one, other)


def check_encoder(sae: SAE, x: torch.Tensor) -> list[str]:
    """Against an fp32 product, on a few tokens: a latent may differ only where its rounding decides."""
    wanted, found = sae.encode(x.float()), Encoder(sae)(x)
    error = (wanted.dense(sae.n_latents) - found.dense(sae.n_latents)).abs()
    scale = float(wanted.acts.max())
    differ = int((error > 1e-4 * scale).sum())
    return [] if differ <= 1e-3 * wanted.acts.numel() else [f"{differ} of {wanted.acts.numel()} activations"]


def paced(device: str, call: Callable[[], object]) -> float:
    """Seconds of a call."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def measure(name: str, shape: Shape, rule: str, *, tokens: int, device: str, corpus: list[str]) -> dict[str, object]:
    lm, hook, width = make(shape, device), HookPoint(shape.layer), stream.WIDTH if device != "cpu" else 128
    config = ScanConfig(context_size=width, lm_batch=shape.rows, limit_tokens=tokens)
    source = from_model(lm, [hook], corpus, config.streaming)
    x = next(located(source, hook, 2048))[1]
    sae = random_sae(shape, lm.d_model, rule, x)
    encode = Encoder(sae)
    if red := [*check_accumulators(device), *check_encoder(sae, x[:256])]:
        raise SystemExit(f"RED {name} {rule}: {', '.join(red)}")
    counts = {"n": 0, "fired": 0}

    def model_only(limit: int) -> None:
        counts["n"] = sum(rows.n for rows, _ in located(source, hook, limit))

    def harvest(limit: int) -> None:
        counts["fired"] = 0
        for rows, acts in located(source, hook, limit):
            for part, _ in rows.parts(ROWS):
                counts["fired"] += encode(acts[part]).acts.numel()

    marks: list[tuple[float, int]] = []

    def on_rows(n: int) -> None:
        wait(device)
        marks.append((time.perf_counter(), n + (marks[-1][1] if marks else 0)))

    def whole() -> Scan:
        return scan(lm, hook, sae, corpus, config, on_rows=on_rows)

    few = min(tokens, 8 * shape.rows * width)
    model_only(few)
    harvest(few)
    model_us = 1e6 * paced(device, lambda: model_only(min(tokens, MOST_MODEL_TOKENS))) / counts["n"]
    harvest_s = paced(device, lambda: harvest(tokens))
    found: list[Scan] = []
    whole_s = paced(device, lambda: found.append(whole()))
    middle = next(mark for mark in marks if mark[1] >= marks[-1][1] / 2)
    half_us = 1e6 * (marks[-1][0] - middle[0]) / max(1, marks[-1][1] - middle[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        save_s = paced(device, lambda: found[0].save(path))
        size = path.stat().st_size
    n = marks[-1][1]
    row = {
        "commit": ledger.commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "torch": torch.__version__,
        "model": name,
        "rule": rule,
        "layer": shape.layer,
        "d_in": lm.d_model,
        "n_latents": shape.n_latents,
        "l0": round(counts["fired"] / n, 1),
        "tokens": n,
        "model_us": round(model_us, 3),
        "harvest_us": round(1e6 * harvest_s / n, 3),
        "scan_us": round(1e6 * whole_s / n, 3),
        "half_us": round(half_us, 3),
        "speed_of_harvest": round(harvest_s / whole_s, 3),
        "speed_of_model": round(model_us * n / (1e6 * whole_s), 3),
        "save_s": round(save_s, 1),
        "file_gb": round(size / 1e9, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device != "cpu" else 0,
    }
    print("  ".join(f"{key} {value}" for key, value in row.items() if key not in ("commit", "date")), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama,gpt2")
    parser.add_argument("--rules", default="topk,threshold")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    corpus, known = stream.texts(a.texts), {"tiny": TINY, **stream.shapes()}
    for name in a.shapes.split(","):
        for rule in a.rules.split(","):
            row = measure(name, known[name], rule, tokens=a.tokens, device=a.device, corpus=corpus)
            ledger.append(a.out / "gpu_scan.csv", row)
            if a.device != "cpu":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
