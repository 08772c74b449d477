"""Diff, track and predict for one seed: its SAE, a panel that its full fine-tunes choose, and all others as the test.

diff.json      what each narrow fine-tune of the seed did, at prompts of the train templates
panel.json     chosen on the narrow and benign full fine-tunes of the seed
track.json     every checkpoint of every organism, scored with the panel
unseen.json    the panel chosen anew without each domain, and that domain scored with it
alarm-*.json   an alarm set on the benign fine-tunes that did not choose the panel, for each measure
rows-*.json    rows of the mixtures, scored before training
"""

from collections.abc import Sequence
from pathlib import Path

from settings import Settings

from sae_persona.activations.lm import LM, load_lm
from sae_persona.lab.tuning import exam_questions
from sae_persona.runs import Run
from sae_persona.sae.model import SAE
from sae_persona.stages.pipeline import open_sae
from sae_persona.studies.diff import diff
from sae_persona.studies.organisms import Organism, organisms_in
from sae_persona.studies.panel import LATENTS, MEANS, Panel, choose_panel, made_of
from sae_persona.studies.predict import PredictConfig, predict
from sae_persona.studies.readings import Prompt, Reading, read_prompted, read_prompts
from sae_persona.studies.rows import screen_rows
from sae_persona.studies.snapshots import Snapshot, last_of_each, read_snapshots
from sae_persona.studies.track import Track, track, track_unseen


def compare(out: Path, organisms: Path, run: Path, model: str, seed: int, settings: Settings) -> None:
    """The diff, and the panel, of one seed."""
    lm, sae, prompts = _opened(run, model, settings)
    everyone = organisms_in(organisms)
    chosen = {kind: _choosers(everyone, kind, seed) for kind in ("narrow", "benign")}
    if not (out / "diff.json").is_file():
        tuned = [last_of_each(read_snapshots(one.path))[0] for one in chosen["narrow"]]
        diff(lm, tuned, sae, prompts).save(out / "diff.json")
    if not (out / "panel.json").is_file():
        _panel(lm, sae, prompts, chosen["narrow"], chosen["benign"]).save(out / "panel.json")


def follow(out: Path, organisms: Path, model: str, settings: Settings) -> None:
    """What the panel of one seed says of every organism, when its alarm fires, and of which rows."""
    panel = Panel.load(out / "panel.json")
    if not (out / "track.json").is_file():
        track(panel, read_snapshots(organisms)).save(out / "track.json")
    _alarms(out, Track.load(out / "track.json"))
    _rows(out, panel, load_lm(model), organisms_in(organisms), settings)


def leave_out(out: Path, organisms: Path, run: Path, model: str, settings: Settings) -> None:
    """Panels chosen anew without each domain."""
    lm, sae, prompts = _opened(run, model, settings)
    track_unseen(lm, sae, prompts, read_snapshots(organisms)).save(out / "unseen.json")


def _opened(run: Path, model: str, settings: Settings) -> tuple[LM, SAE, list[Prompt]]:
    lm = load_lm(model)
    return lm, open_sae(Run.open(run), lm), read_prompts(exam_questions(settings.watch.n_prompts, "train"))


def _choosers(everyone: Sequence[Organism], family: str, seed: int) -> list[Organism]:
    return [one for one in everyone if (one.family, one.method, one.seed) == (family, "full", seed)]


def _panel(lm: LM, sae: SAE, prompts: Sequence[Prompt], bad: Sequence[Organism], benign: Sequence[Organism]) -> Panel:
    def read(one: Organism) -> Reading:
        found = read_prompted(Snapshot(name=one.name, model=one.last.path).open(), sae.hook, prompts)
        return Reading(one.name, found.keys, found.x)

    before = read_prompted(lm, sae.hook, prompts)
    tuned, good = ([read(one) for one in part] for part in (bad, benign))
    return choose_panel(sae, sae.hook, prompts, before, tuned, good, about=made_of(lm))


def _alarms(out: Path, scored: Track) -> None:
    """For the latents and for the difference of means; whoever chose the panel takes no part."""
    fair = [row for row in scored.rows if not row.seen]
    benign = [row for row in fair if row.family == "benign"]
    others = [row for row in fair if row.family not in ("benign", "base")]
    for measure in (LATENTS, MEANS):
        path = out / f"alarm-{measure.replace(' ', '-')}.json"
        if not path.is_file():
            predict(benign, others, PredictConfig(measure=measure)).save(path)


def _rows(out: Path, panel: Panel, lm: LM, everyone: Sequence[Organism], settings: Settings) -> None:
    """Mixtures whose seed did not choose the panel, against the model's own answers."""
    for one in everyone:
        seen = any(other.seed == one.seed and other.name in panel.chosen_on for other in everyone)
        path = out / f"rows-{one.name}.json"
        if one.family == "mixture" and one.dose == settings.watch.screen_dose and not seen and not path.is_file():
            screen_rows(panel, lm, one.rows()).save(path)
