"""Find the features that make a language model play a persona, and turn them up or down.

The public names, each loaded when it is first asked for: `import sae_persona` itself loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_persona.activations.dialogues import Dialogue as Dialogue
    from sae_persona.activations.hooks import read as read
    from sae_persona.activations.lm import LM as LM
    from sae_persona.activations.lm import load_lm as load_lm
    from sae_persona.activations.lm import wrap_lm as wrap_lm
    from sae_persona.activations.stream import StreamConfig as StreamConfig
    from sae_persona.activations.stream import stream as stream
    from sae_persona.activations.stream import streams as streams
    from sae_persona.attribution.rank import RankConfig as RankConfig
    from sae_persona.attribution.rank import rank as rank
    from sae_persona.attribution.ranking import Ranking as Ranking
    from sae_persona.errors import SaePersonaError as SaePersonaError
    from sae_persona.features.corpus import scan as scan
    from sae_persona.features.describe import describe as describe
    from sae_persona.features.descriptions import Description as Description
    from sae_persona.features.descriptions import Descriptions as Descriptions
    from sae_persona.features.explain import explain as explain
    from sae_persona.features.explainers import open_explainer as open_explainer
    from sae_persona.features.logit_lens import LogitLens as LogitLens
    from sae_persona.features.matching import MatchConfig as MatchConfig
    from sae_persona.features.matching import Matching as Matching
    from sae_persona.features.matching import match as match
    from sae_persona.features.measure import MeasureConfig as MeasureConfig
    from sae_persona.features.measure import measure as measure
    from sae_persona.features.query import Query as Query
    from sae_persona.features.scan import Scan as Scan
    from sae_persona.features.scan import ScanConfig as ScanConfig
    from sae_persona.features.stats import LatentStats as LatentStats
    from sae_persona.report.page import write_report as write_report
    from sae_persona.runs import Run as Run
    from sae_persona.sae.checkpoints import Checkpoints as Checkpoints
    from sae_persona.sae.formats import hook_metadata as hook_metadata
    from sae_persona.sae.formats import load_sae as load_sae
    from sae_persona.sae.formats import save_sae as save_sae
    from sae_persona.sae.model import SAE as SAE
    from sae_persona.sae.quality import quality as quality
    from sae_persona.sae.recipe import TrainConfig as TrainConfig
    from sae_persona.sae.train import Job as Job
    from sae_persona.sae.train import train as train
    from sae_persona.sae.train import train_many as train_many
    from sae_persona.stages.finding import Search as Search
    from sae_persona.steering.answers import answer as answer
    from sae_persona.steering.answers import say as say
    from sae_persona.steering.apply import intervene as intervene
    from sae_persona.steering.apply import intervene_rows as intervene_rows
    from sae_persona.steering.compose import compose as compose
    from sae_persona.steering.conditions import When as When
    from sae_persona.steering.dial import DialConfig as DialConfig
    from sae_persona.steering.dial import solve_strength as solve_strength
    from sae_persona.steering.export.approximate import approximate as approximate
    from sae_persona.steering.export.formats import write_as as write_as
    from sae_persona.steering.export.importing import import_intervention as import_intervention
    from sae_persona.steering.export.intervention import Intervention as Intervention
    from sae_persona.steering.export.native import export as export
    from sae_persona.steering.export.native import load_intervention as load_intervention
    from sae_persona.steering.interference import Ingredient as Ingredient
    from sae_persona.steering.interference import Mix as Mix
    from sae_persona.steering.interventions import Ablate as Ablate
    from sae_persona.steering.interventions import Add as Add
    from sae_persona.steering.interventions import Cap as Cap
    from sae_persona.steering.interventions import Ceiling as Ceiling
    from sae_persona.steering.interventions import Clamp as Clamp
    from sae_persona.steering.interventions import Floor as Floor
    from sae_persona.steering.interventions import Pin as Pin
    from sae_persona.steering.interventions import Placed as Placed
    from sae_persona.steering.interventions import ProjectionClamp as ProjectionClamp
    from sae_persona.steering.interventions import ProjectOut as ProjectOut
    from sae_persona.steering.interventions import Scale as Scale
    from sae_persona.steering.interventions import Steer as Steer
    from sae_persona.steering.positions import Spans as Spans
    from sae_persona.steering.solver import Targets as Targets
    from sae_persona.steering.sweep import SweepConfig as SweepConfig
    from sae_persona.steering.sweep import sweep as sweep
    from sae_persona.studies.alarm import Alarm as Alarm
    from sae_persona.studies.battery import Variant as Variant
    from sae_persona.studies.callback import Watch as Watch
    from sae_persona.studies.callback import trainer_callback as trainer_callback
    from sae_persona.studies.candidates import MeasuredSAE as MeasuredSAE
    from sae_persona.studies.certificate import Certificate as Certificate
    from sae_persona.studies.diff import DiffConfig as DiffConfig
    from sae_persona.studies.diff import diff as diff
    from sae_persona.studies.induce import InduceConfig as InduceConfig
    from sae_persona.studies.induce import induce as induce
    from sae_persona.studies.panel import Panel as Panel
    from sae_persona.studies.panel import PanelConfig as PanelConfig
    from sae_persona.studies.panel import choose_panel as choose_panel
    from sae_persona.studies.predict import PredictConfig as PredictConfig
    from sae_persona.studies.predict import predict as predict
    from sae_persona.studies.readings import read_prompted as read_prompted
    from sae_persona.studies.readings import read_prompts as read_prompts
    from sae_persona.studies.reverse import Case as Case
    from sae_persona.studies.reverse import ReverseConfig as ReverseConfig
    from sae_persona.studies.reverse import reverse as reverse
    from sae_persona.studies.rows import RowsConfig as RowsConfig
    from sae_persona.studies.rows import screen_rows as screen_rows
    from sae_persona.studies.snapshots import Snapshot as Snapshot
    from sae_persona.studies.snapshots import read_snapshots as read_snapshots
    from sae_persona.studies.track import TrackConfig as TrackConfig
    from sae_persona.studies.track import track as track
    from sae_persona.studies.track import track_unseen as track_unseen
    from sae_persona.types import HookPoint as HookPoint
    from sae_persona.types import SparseLatents as SparseLatents

_HOMES = {
    "activations.dialogues": ("Dialogue",),
    "activations.hooks": ("read",),
    "activations.lm": ("LM", "load_lm", "wrap_lm"),
    "activations.stream": ("StreamConfig", "stream", "streams"),
    "attribution.rank": ("RankConfig", "rank"),
    "attribution.ranking": ("Ranking",),
    "errors": ("SaePersonaError",),
    "features.corpus": ("scan",),
    "features.describe": ("describe",),
    "features.descriptions": ("Description", "Descriptions"),
    "features.explain": ("explain",),
    "features.explainers": ("open_explainer",),
    "features.logit_lens": ("LogitLens",),
    "features.measure": ("MeasureConfig", "measure"),
    "features.scan": ("Scan", "ScanConfig"),
    "features.matching": ("MatchConfig", "Matching", "match"),
    "features.query": ("Query",),
    "features.stats": ("LatentStats",),
    "stages.finding": ("Search",),
    "report.page": ("write_report",),
    "runs": ("Run",),
    "sae.checkpoints": ("Checkpoints",),
    "sae.formats": ("hook_metadata", "load_sae", "save_sae"),
    "sae.model": ("SAE",),
    "sae.quality": ("quality",),
    "sae.recipe": ("TrainConfig",),
    "sae.train": ("Job", "train", "train_many"),
    "steering.answers": ("answer", "say"),
    "steering.apply": ("intervene", "intervene_rows"),
    "steering.compose": ("compose",),
    "steering.conditions": ("When",),
    "steering.export.approximate": ("approximate",),
    "steering.export.formats": ("write_as",),
    "steering.export.importing": ("import_intervention",),
    "steering.export.intervention": ("Intervention",),
    "steering.dial": ("DialConfig", "solve_strength"),
    "steering.export.native": ("export", "load_intervention"),
    "steering.interference": ("Ingredient", "Mix"),
    "steering.interventions": (
        "Ablate",
        "Add",
        "Cap",
        "Ceiling",
        "Clamp",
        "Floor",
        "Pin",
        "Placed",
        "ProjectOut",
        "ProjectionClamp",
        "Scale",
        "Steer",
    ),
    "steering.positions": ("Spans",),
    "steering.solver": ("Targets",),
    "steering.sweep": ("SweepConfig", "sweep"),
    "studies.alarm": ("Alarm",),
    "studies.battery": ("Variant",),
    "studies.callback": (
        "Watch",
        "trainer_callback",
    ),
    "studies.candidates": ("MeasuredSAE",),
    "studies.certificate": ("Certificate",),
    "studies.diff": (
        "DiffConfig",
        "diff",
    ),
    "studies.induce": ("InduceConfig", "induce"),
    "studies.panel": (
        "Panel",
        "PanelConfig",
        "choose_panel",
    ),
    "studies.predict": (
        "PredictConfig",
        "predict",
    ),
    "studies.readings": (
        "read_prompted",
        "read_prompts",
    ),
    "studies.reverse": ("Case", "ReverseConfig", "reverse"),
    "studies.rows": (
        "RowsConfig",
        "screen_rows",
    ),
    "studies.snapshots": (
        "Snapshot",
        "read_snapshots",
    ),
    "studies.track": (
        "TrackConfig",
        "track",
        "track_unseen",
    ),
    "types": ("HookPoint", "SparseLatents"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
