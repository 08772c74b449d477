"""A run, one of its latents, or an SAE folder, as plain text for the terminal."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_persona.activations.lm import LM
from sae_persona.attribution.ranking import Ranking
from sae_persona.errors import DataError
from sae_persona.features.contexts import Context
from sae_persona.features.descriptions import Descriptions
from sae_persona.features.scan import Scan, findings
from sae_persona.runs import Run, read_json
from sae_persona.sae.formats import sae_facts
from sae_persona.steering.arms import Sweep


def describe(run: Run) -> str:
    """What has been done in a run, a line a stage, and its main numbers."""
    trained = run.stage("train")
    training = trained["training"]
    lines = [
        f"{run.path}: {training['rule']} SAE, {training['n_latents']} latents, k {training['k']}, "
        f"at {trained['hook']} of {trained['model']['name']}"
    ]
    if run.quality.is_file():
        q = read_json(run.quality, "quality file")
        lines.append(
            f"held-out: FVU {q['fvu']:.4f}, L0 {q['l0']:.2f}, dead {q['dead']:.1%}; "
            f"cross-entropy {q['ce']:.3f}, spliced {q['ce_spliced']:.3f}, zero-ablated {q['ce_zero']:.3f} nats"
        )
    for path in sorted((run.path / "rankings").glob("*.json")):
        ranking = Ranking.load(path)
        best = ranking[0]
        lines.append(
            f"{ranking.persona}: latent {best.latent}, held-out AUROC {best.held_out_auroc.value:.3f}, "
            f"p {best.p_max_t:.2g} (max-T)"
        )
    for path in sorted((run.path / "sweeps").glob("*.json")):
        swept = Sweep.load(path)
        lines.append(
            f"{swept.persona}: latent {swept.latent} at {swept.strength:g} x p99.9 moves its rate "
            f"{swept.arm('baseline').rate.value:.2f} -> {swept.chosen.rate.value:.2f} "
            f"at {swept.chosen.cost.value:.2f} x perplexity"
        )
    return "\n".join(lines)


def describe_sae(folder: Path) -> tuple[str, dict[str, Any]]:
    """What an SAE folder's config says, without its weights, as text and as JSON values."""
    facts = sae_facts(folder)
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in facts.items() if value is not None), facts


def describe_latent(run: Run, lm: LM, latent: int, top: int) -> tuple[str, dict[str, Any]]:
    """Statistics, description and contexts of one latent, as text and as JSON values: of the corpus that was scanned,
    else of the measured dialogues.

    In the text, the token that a context is about stands in brackets: of the strongest, where the latent peaks.
    DataError if the run has no such latent.
    """
    found = findings(run)
    stats = found.stats
    if not 0 <= latent < stats.n_latents:
        raise DataError(f"latent {latent} does not exist: {run.path} has latents 0 to {stats.n_latents - 1}")
    facts: dict[str, Any] = {
        "latent": latent,
        "firing_rate": float(stats.firing_rate[latent]),
        "p999": _number(stats.p999[latent]),
        "maximum": float(stats.maximum[latent]),
    }
    lines = [
        f"latent {latent}: fires on {facts['firing_rate']:.3%} of tokens, "
        f"99.9th percentile {float(stats.p999[latent]):.3g}"
    ]
    if run.descriptions.is_file() and latent in (described := Descriptions.load(run)):
        facts["description"] = asdict(described[latent])
        lines += str(described[latent]).splitlines()
    contexts = found.contexts.of(latent)[:top]
    facts["contexts"] = [asdict(context) for context in contexts]
    lines += [f"{context.strength:8.3g}  {_marked(lm, context)}" for context in contexts]
    if isinstance(found, Scan):
        more, text = _scanned(found, lm, latent, top)
        facts |= more
        lines += text
    return "\n".join(lines), facts


def _marked(lm: LM, context: Context) -> str:
    """Its tokens, with the one that it is about in brackets."""
    shown = lm.tokenizer.convert_ids_to_tokens(context.tokens)
    at = context.acts.index(max(context.acts)) if context.at is None else context.at
    shown[at] = f"[{shown[at]}]"
    return " ".join(shown)


def _scanned(found: Scan, lm: LM, latent: int, top: int) -> tuple[dict[str, Any], list[str]]:
    """What only a scan knows of a latent: JSON values, and lines."""
    sampled, near, seen = found.sampled_contexts(latent, top), found.neighbours(latent, top), found.seen.of(latent)
    rows = zip(*(part[0].tolist() for part in vars(near).values()), strict=True)
    partners = [dict(zip(vars(near), row, strict=True)) for row in rows if row[0] >= 0]
    fires = int(found.cofiring.fires()[latent])
    facts = {
        "sampled": [asdict(context) for context in sampled],
        "first": None if seen is None else seen[0],
        "last": None if seen is None else seen[1],
        "cofiring": {"tokens": found.cofiring.n, "fires": fires, "neighbours": partners},
    }
    lines = ["a sample of its firings, with their quantiles:"] if sampled else []
    lines += [f"{c.strength:8.3g}  {100 * (c.quantile or 0):3.0f}%  {_marked(lm, c)}" for c in sampled]
    if partners:
        lines.append(f"fires together with (of {fires} firings among {found.cofiring.n} sampled tokens):")
    lines += [f"{p['both']:8}  latent {p['partner']}, Jaccard {p['jaccard']:.3f}, PMI {p['pmi']:.2f}" for p in partners]
    return facts, lines


def _number(value: Any) -> float | None:
    """None for what is not known: a latent that never fired has no percentile."""
    return float(value) if float(value) == float(value) else None
