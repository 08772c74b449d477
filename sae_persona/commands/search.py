"""Commands that look into dictionaries: `search` a run's features, `match` two dictionaries."""

from pathlib import Path
from typing import Annotated

import typer

from sae_persona.commands.flags import with_flags
from sae_persona.commands.options import AsJson, Device, Texts, say, show_result
from sae_persona.errors import ConfigError, RunError
from sae_persona.features.matching import MatchConfig
from sae_persona.features.measure import MeasureConfig
from sae_persona.features.query import Hit, Order, Query, Range
from sae_persona.features.vectors import read_vector
from sae_persona.stages.finding import Search
from sae_persona.stages.pairing import match_stage

Bounds = "LOW:HIGH, of which either may be left out"
AROUND = 36
"""Characters shown on each side of the token on which a latent fires."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(search)
    app.command()(match)


def bounds(text: str | None) -> Range:
    """Read 1e-4:1e-2, 0.8: or :0.1."""
    if text is None:
        return (None, None)
    ends = text.split(":")
    try:
        low, high = (float(end) if end.strip() else None for end in ends)
    except ValueError as error:
        raise ConfigError(f"a range reads LOW:HIGH, LOW: or :HIGH, got {text!r}") from error
    if low is not None and high is not None and not low <= high:
        raise ConfigError(f"a range goes from low to high, got {text!r}")
    return low, high


def search(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that was measured.")],
    words: Annotated[
        str | None,
        typer.Argument(
            metavar="WORDS",
            help="Words of explanation, logits, tokens or contexts: all must occur as they are written; surpris* finds "
            'surprise, surprised and surprising; "a phrase", AND, OR, NOT, NEAR(a b), tokens: word.',
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Take the words as they stand, signs and all.")] = False,
    text: Annotated[str | None, typer.Option(help="Latents that fire on this text more than usual.")] = None,
    like: Annotated[int | None, typer.Option(metavar="LATENT", help="Directions like this latent's.")] = None,
    vector: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Directions like this vector: .npy or .safetensors.")
    ] = None,
    persona_vector: Annotated[
        str | None, typer.Option(metavar="PERSONA", help="Directions like this persona's difference of means.")
    ] = None,
    persona: Annotated[str | None, typer.Option(metavar="PERSONA", help="Latents in this persona's ranking.")] = None,
    rate: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help=f"Firing rate: {Bounds}.")] = None,
    auroc: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Held-out AUROC in the persona's ranking; without one, in any."),
    ] = None,
    cosine: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="Cosine with the direction.")] = None,
    dead: Annotated[bool | None, typer.Option("--dead/--alive", help="Latents that never fire, or the others.")] = None,
    order: Annotated[
        Order,
        typer.Option(
            metavar="auto|direction|text|persona|words|rate",
            help="What is shown first; auto: by the first given of direction, text, persona, words, else by rate.",
        ),
    ] = "auto",
    limit: Annotated[int, typer.Option(help="Latents that are shown.")] = 20,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Features by words, example text, direction, persona and numbers; what is given must all be true of them."""
    query = Query(
        words=words,
        plain=plain,
        text=text,
        like=like,
        vector=None if vector is None else read_vector(vector),
        persona_vector=persona_vector,
        persona=persona,
        rate=bounds(rate),
        auroc=bounds(auroc),
        cosine=bounds(cosine),
        dead=dead,
        order=order,
        limit=limit,
    )
    hits = Search(run, device=device, say=say).find(query)
    show_result(table(hits), [hit.to_json() for hit in hits], as_json)
    if not hits:
        say("nothing is found")
        raise typer.Exit(1)


def table(hits: list[Hit]) -> str:
    """Scores, rate, what the latent is about and its best context, a line a latent."""
    names = list(dict.fromkeys(name for hit in hits for name in hit.scores))
    rows = [["latent", *names, "rate", "about", "context"]]
    for hit in hits:
        entry, scores = hit.entry, [f"{hit.scores[name]:.3g}" if name in hit.scores else "" for name in names]
        about = entry.explanation or entry.promoted or entry.tokens
        context = entry.contexts[0].marked(AROUND) if entry.contexts else ""
        rows.append([str(hit.latent), *scores, f"{hit.firing_rate:.3%}", _short(about, 40), context])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows if hits else []:
        numbers = [cell.rjust(width) for cell, width in zip(row[:-2], widths, strict=False)]
        lines.append("  ".join([*numbers, row[-2].ljust(widths[-1]), row[-1]]).rstrip())
    return "\n".join(lines)


def _short(text: str, n: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= n else f"{text[: n - 1]}…"


@with_flags(skip={"reading": {"contexts"}}, config=MatchConfig, reading=MeasureConfig)
def match(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run or an SAE folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same hook point.")],
    config: MatchConfig,
    reading: MeasureConfig,
    texts: Annotated[
        Path | None, typer.Option(metavar="TEXTS", help=f"Correlate activations on these, too: {Texts}.")
    ] = None,
    top: Annotated[int, typer.Option(help="Pairs that are shown, nearest first.")] = 10,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="HDF5 file to write all pairs to.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is there.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Two dictionaries matched by decoder cosine and, on texts, by activation; mutual nearest neighbours."""
    if out is not None and out.exists() and not force:
        raise RunError(f"{out} is there already: choose another --out, or pass --force to replace it")
    found = match_stage(first, second, texts=texts, reading=reading, config=config, device=device)
    if out is not None:
        found.save(out)
    summary, pairs = found.summary(), found.pairs(top)
    lines = [
        f"{name:22}{value if isinstance(value, int) else f'{value:.3f}'}"
        for name, value in summary.items()
        if value is not None
    ]
    heads = list(pairs[0]) if pairs else []
    cells = [heads, *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in pair.values()] for pair in pairs)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines += ["", *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)]
    show_result("\n".join(lines), {"summary": summary, "pairs": pairs}, as_json)
    if not found.mutual.any():
        say("no latent is its nearest's nearest")
        raise typer.Exit(1)
