"""What one reading of a corpus finds of every latent, and the file of it.

Parts of a corpus, scanned apart, merge to the whole. Counts, maxima, contexts and the sample for co-firing are then the
same to the bit where the activations are; sums to the rounding of fp64.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args

import torch

from sae_persona.activations.sequences import Which
from sae_persona.activations.stream import StreamConfig
from sae_persona.errors import ConfigError, DataError, FormatError
from sae_persona.features.cofiring import CoFiring, Neighbours
from sae_persona.features.contexts import Context, SampledContexts, TopContexts
from sae_persona.features.files import reading_h5, write_h5
from sae_persona.features.firings import Firings, TokenRows
from sae_persona.features.measure import Measurement
from sae_persona.features.seen import Seen
from sae_persona.features.stats import N_BINS, LatentStats
from sae_persona.runs import Run
from sae_persona.types import SparseLatents

KIND = "scan"
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999)
_NEXT = "scan the corpus again"


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """How a corpus is read, and what is kept of it."""

    context_size: int = 128
    """Tokens a sequence, BOS included. Longer texts are cut into several, longer dialogues are cut off."""
    lm_batch: int = 32
    """Rows of sequences a forward pass."""
    pack: bool | None = None
    """Put several short sequences in one row, where each sees only itself. None: where the model is on a GPU."""
    ahead: int = 2
    """Groups of eight forward passes that a thread tokenises ahead of the model. 0: no thread."""
    tokens: Which = "all"
    """What is counted: every token, or each answer and the token before it. Never BOS."""
    limit_tokens: int | None = None
    """Stop after the sequence in which so many have been counted; a share of the texts stops after its share of it."""
    contexts: int = 8
    """Strongest contexts kept for a latent, one a text."""
    sampled: int = 20
    """Contexts of a random sample of a latent's firings."""
    cofiring_tokens: int = 262_144
    """Tokens of the random sample on which latents are counted that fire together."""
    neighbours: int = 16
    """Latents listed for each as those that fire most with it."""

    def __post_init__(self) -> None:
        for name in ("lm_batch", "contexts", "sampled", "cofiring_tokens", "neighbours"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("context_size", 2), ("ahead", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.limit_tokens is not None and self.limit_tokens < 1:
            raise ConfigError(f"limit_tokens must be at least 1, got {self.limit_tokens}")
        if self.tokens not in get_args(Which):
            raise ConfigError(f"tokens is one of {', '.join(get_args(Which))}, got {self.tokens!r}")

    @property
    def streaming(self) -> StreamConfig:
        """The same as the stream has it."""
        names = ("context_size", "lm_batch", "pack", "ahead", "tokens")
        return StreamConfig(**{name: getattr(self, name) for name in names})

    def memory(self, n_latents: int) -> dict[str, int]:
        """Bytes on the device by what they hold, beside the model, the SAE and what is in hand."""
        context = 12 + 8 * 25
        return {
            "statistics": n_latents * (8 * N_BINS + 28 + 16),
            "contexts": n_latents * (self.contexts + self.sampled) * context,
        }


@dataclass(frozen=True)
class Share:
    """Every ``world``-th text of a corpus, from the ``rank``-th on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read 0/2. ConfigError on anything else."""
        rank, slash, world = text.partition("/")
        if not (slash and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ConfigError(f"a share reads RANK/WORLD, such as 0/2 and 1/2, got {text!r}")
        return cls(int(rank), int(world))

    def __str__(self) -> str:
        return f"{self.rank}/{self.world}"


class Scan:
    """What one pass over a corpus found.

    stats      rates, moments, quantiles, maxima        seen      first and last firing
    contexts   the strongest, one a text                sampled   of a random sample of firings
    cofiring   what fires together on sampled tokens    about     JSON: model, SAE, texts, config, shares
    """

    def __init__(
        self,
        n_latents: int,
        config: ScanConfig,
        device: str | torch.device = "cpu",
        about: dict[str, Any] | None = None,
    ) -> None:
        self.about = dict(about or {})
        self.stats, self.seen = LatentStats(n_latents, device), Seen(n_latents, device)
        self.contexts = TopContexts(n_latents, config.contexts, device)
        self.sampled = SampledContexts(n_latents, config.sampled, device)
        self.cofiring = CoFiring(n_latents, config.cofiring_tokens, device)
        self.config = config

    @property
    def n_latents(self) -> int:
        return self.stats.n_latents

    def update(self, rows: TokenRows, latents: SparseLatents) -> None:
        """Add the latents of some tokens. DataError if they are of another number of tokens."""
        firings = Firings.of(rows, latents, self.n_latents)
        self.stats.add(firings.acts, firings.latent, rows.n)
        for part in (self.seen, self.contexts, self.sampled, self.cofiring):
            part.update(firings)

    def merge(self, other: "Scan") -> None:
        """Add what was found in other texts of the same corpus. DataError if it is of another one, or of the same."""
        mine, others = ({k: v for k, v in scan.about.items() if k != "shares"} for scan in (self, other))
        if mine != others:
            differ = sorted(k for k in mine.keys() | others.keys() if mine.get(k) != others.get(k))
            raise DataError(f"these scans differ in {', '.join(differ)}: they are not parts of one")
        shares = [*self.about.get("shares", []), *other.about.get("shares", [])]
        if len(set(shares)) < len(shares):
            raise DataError(f"share {max(shares, key=shares.count)} of the corpus is there twice: give each part once")
        for name in ("stats", "seen", "contexts", "sampled", "cofiring"):
            getattr(self, name).merge(getattr(other, name))
        self.about["shares"] = sorted(shares)

    @property
    def missing(self) -> list[str]:
        """Shares of the corpus that are not in it."""
        there = self.about.get("shares", [])
        world = {share.split("/")[1] for share in there}
        return [share for n in sorted(world) for i in range(int(n)) if (share := f"{i}/{n}") not in there]

    def sampled_contexts(self, latent: int, n: int | None = None) -> list[Context]:
        """Sampled contexts of a latent, each with its quantile, strongest first.

        n   as many, spread over the quantiles: of n bands of equal width one each, while there are any. None: all
        """
        found = self.sampled.of(latent)
        if not found:
            return []
        acts = torch.tensor([context.strength for context in found])
        shares = self.stats.share_below(torch.full((len(found),), latent), acts).tolist()
        found = [replace(context, quantile=share) for context, share in zip(found, shares, strict=True)]
        if n is not None:
            band: dict[int, list[int]] = {}
            for i, share in enumerate(shares):  # in the order of the sample, which is chance
                band.setdefault(min(n - 1, int(share * n)), []).append(i)
            turns = sorted((turn, i) for members in band.values() for turn, i in enumerate(members))
            found = [found[i] for _, i in turns[:n]]
        return sorted(found, key=lambda context: -context.strength)

    def neighbours(self, latent: int, n: int) -> Neighbours:
        """The latents that fire most with one."""
        return self.cofiring.neighbours(n, torch.tensor([latent], device=self.cofiring.idx.device))

    def save(self, path: Path) -> None:
        """Write one HDF5 file, whole or not at all: groups of the names above, and for those who read it without us

        quantiles    [n_latents, LEVELS] fp32   of the non-zero activations; NaN where a latent never fired
        neighbours   as `Neighbours` says, of every latent
        """
        table = self.cofiring.neighbours(self.config.neighbours)
        quantiles = torch.stack([self.stats.quantile(level) for level in LEVELS], dim=1)

        def fill(file) -> None:
            file.attrs["about"], file.attrs["config"] = json.dumps(self.about), json.dumps(asdict(self.config))
            for name in ("stats", "seen", "contexts", "sampled", "cofiring"):
                getattr(self, name).to_h5(file.create_group(name))
            for name, part in vars(table).items():
                file[f"neighbours/{name}"] = part.cpu().numpy()
            file["quantiles"] = quantiles.cpu().numpy()
            file["quantiles"].attrs["levels"] = LEVELS

        write_h5(path, KIND, fill)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote, on the CPU. FormatError if it is missing, cut short or of another format."""
        with reading_h5(path, KIND, _NEXT) as file:
            try:
                config, about = ScanConfig(**json.loads(file.attrs["config"])), json.loads(file.attrs["about"])
            except (TypeError, ValueError) as error:
                raise FormatError(f"{path} has no config of a scan ({error}): {_NEXT}") from error
            scan = cls(0, config, about=about)
            for name in ("stats", "seen", "contexts", "sampled", "cofiring"):
                setattr(scan, name, type(getattr(scan, name)).from_h5(file[name]))
        return scan


def findings_file(run: Run) -> tuple[Path, str]:
    """Where a run says what its latents do, and of which kind that file is: of a corpus, else of measured dialogues.

    RunError if it has neither.
    """
    if run.scan.is_file():
        return run.scan, KIND
    run.stage("measure")
    return run.latents, "latents"


def findings(run: Run) -> Scan | Measurement:
    """What a run knows of its latents: of the corpus that was scanned or, if none was, of the measured dialogues.

    RunError if neither is there.
    """
    path, kind = findings_file(run)
    return Scan.load(path) if kind == KIND else Measurement.load(run)
