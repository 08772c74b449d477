"""What the experiment is told: a TOML file, each table one of these."""

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sae_persona.errors import ConfigError
from sae_persona.studies.families import OrganismsConfig


@dataclass(frozen=True, kw_only=True)
class SAEs:
    """One SAE for each seed and hook point, with the demo's settings but for these."""

    hooks: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    """By default those of the organisms."""
    n_corpus: int = 2700
    n_labelled: int = 1000
    steps: int = 1600
    n_latents: int = 512


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Diff, track and predict."""

    n_prompts: int = 20
    screen_dose: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Undo:
    """Reversals, guards, healing and coupling."""

    families: tuple[str, ...] = ("narrow",)
    """Those of the organisms tuned in full that are reversed."""
    studies: tuple[str, ...] = ("reversals", "prevent", "realign", "coupling")
    """What is made."""
    small: bool = False
    """With few questions and tries."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    organisms: OrganismsConfig = field(default_factory=OrganismsConfig)
    saes: SAEs
    watch: Watch = field(default_factory=Watch)
    undo: Undo = field(default_factory=Undo)

    @property
    def sae_seeds(self) -> tuple[int, ...]:
        return self.saes.seeds or self.organisms.seeds


def read_settings(path: Path) -> Settings:
    """ConfigError for tables and keys that nobody knows."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    kinds = {"organisms": OrganismsConfig, "saes": SAEs, "watch": Watch, "undo": Undo}
    if unknown := set(raw) - set(kinds):
        raise ConfigError(f"{path} has the tables {', '.join(kinds)}, got {min(unknown)}")
    return Settings(**{name: _table(path, name, kinds[name], table) for name, table in raw.items()})


def _table(path: Path, name: str, kind: Any, table: dict[str, Any]) -> Any:
    if unknown := set(table) - {one.name for one in fields(kind)}:
        raise ConfigError(f"{path}: [{name}] has no {min(unknown)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
