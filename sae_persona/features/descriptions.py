"""What is said of each latent, and its file.

descriptions.jsonl    first line {"kind": "descriptions", "format": 1, "sae": FINGERPRINT, "z_scored": false,
                      "n": DESCRIPTIONS}
                      then a Description a line, by latent
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from sae_persona.errors import FormatError
from sae_persona.runs import Run, write_whole

KIND, FORMAT = "descriptions", 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """One latent in tokens, words and scores. None: not asked for, or not to be known (see ``error``)."""

    latent: int
    promoted: tuple[tuple[str, float], ...] = ()
    """Tokens that its direction makes likelier and their logits (or z-scores), the strongest first: see `LogitLens`."""
    suppressed: tuple[tuple[str, float], ...] = ()
    """Those that it makes less likely, the strongest first."""
    concentration: float | None = None
    """See `token_concentration`."""
    input_score: float | None = None
    """See `input_score`."""
    output_score: float | None = None
    """See `OutputScores.score`."""
    explanation: str | None = None
    """What it fires on, in the explainer's words."""
    detection: float | None = None
    """Balanced accuracy of telling, by the explanation, texts on which it fires from others; 0.5 is chance."""
    fuzzing: float | None = None
    """Balanced accuracy of telling texts marked where it fires from texts marked elsewhere; 0.5 is chance."""
    explainer: str | None = None
    error: str | None = None
    """Why there is no explanation or no score, where one was asked for."""

    def __str__(self) -> str:
        lines = [f"promotes {_tokens(self.promoted)}", f"suppresses {_tokens(self.suppressed)}"]
        scores = ("concentration", "input_score", "output_score", "detection", "fuzzing")
        known = [(name, getattr(self, name)) for name in scores]
        told = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in known if value is not None)
        if told:
            lines.append(told)
        if self.explanation:
            lines.append(f"{self.explainer}: {self.explanation}")
        if self.error:
            lines.append(f"error: {self.error}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Descriptions(Mapping[int, Description]):
    """The descriptions of an SAE's latents, by latent. Not every latent need have one."""

    sae: str
    """Fingerprint of the SAE."""
    by_latent: Mapping[int, Description]
    z_scored: bool = False
    """Tokens and their numbers are z-scores over the latents, not logits."""

    def __getitem__(self, latent: int) -> Description:
        return self.by_latent[latent]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.by_latent))

    def __len__(self) -> int:
        return len(self.by_latent)

    def with_new(self, new: Iterable[Description]) -> "Descriptions":
        """These and the new ones, which take the place of those of the same latent."""
        return Descriptions(self.sae, {**self.by_latent, **{each.latent: each for each in new}}, self.z_scored)

    def save(self, run: Run) -> None:
        """Write ``descriptions.jsonl`` into the run, whole or not at all."""
        header = {"kind": KIND, "format": FORMAT, "sae": self.sae, "z_scored": self.z_scored, "n": len(self)}

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                for value in (header, *(asdict(self[latent]) for latent in self)):
                    file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

        write_whole(run.descriptions, write)

    @classmethod
    def load(cls, run: Run) -> Self:
        """Read what ``save`` wrote. FormatError if it is missing, cut short, of another kind or of another format."""
        path = run.descriptions
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            header, *rows = (json.loads(line) for line in lines[:-1])
            found = (header["kind"], header["format"])
            if found != (KIND, FORMAT) or lines[-1]:
                raise FormatError(
                    f"{path} holds {found[0]} format {found[1]}, wanted whole {KIND} format {FORMAT}: describe again"
                )
            if header["n"] != len(rows):
                raise FormatError(f"{path} has {len(rows)} of {header['n']} descriptions: describe the run again")
            read = [_description(row) for row in rows]
            return cls(header["sae"], {each.latent: each for each in read}, header["z_scored"])
        except OSError as error:
            raise FormatError(f"no descriptions at {path}: `sae-persona describe {run.path}` makes them") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{path} is not a whole {KIND} file ({error}): describe the run again") from error


def _description(row: dict[str, Any]) -> Description:
    if set(row) != (names := {field.name for field in fields(Description)}):
        raise KeyError(f"fields {', '.join(sorted(set(row) ^ names))}")
    tokens = {name: tuple((str(t), float(v)) for t, v in row[name]) for name in ("promoted", "suppressed")}
    return Description(**{**row, **tokens})


def _tokens(tokens: tuple[tuple[str, float], ...], n: int = 8) -> str:
    return " ".join(f"{json.dumps(token, ensure_ascii=False)} {value:+.2f}" for token, value in tokens[:n])
