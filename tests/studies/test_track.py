import math

import pytest

from sae_persona.attribution.association import Interval
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.runs import write_json
from sae_persona.studies.panel import LATENTS, MEANS, choose_panel
from sae_persona.studies.readings import read_prompted, read_prompts
from sae_persona.studies.snapshots import Snapshot
from sae_persona.studies.track import Track, TrackConfig, track, track_unseen
from sae_persona.types import HookPoint

HOOK = HookPoint(0)
CONFIG = TrackConfig(resamples=100)


def rate(value):
    return Interval(value, max(value - 0.05, 0), value + 0.05)


@pytest.fixture
def prompts(prompt_rows):
    return read_prompts(prompt_rows)


@pytest.fixture
def snapshots(base, make_moved):
    """Two bad and two harmless fine-tunes in each of two groups; each group also moves a latent of its own."""
    found = []
    for group, own in (("a", 8), ("b", 9)):
        for i in (1, 2):
            for kind, by, judged in (("bad", 2.0 + i, 0.8), ("good", -0.1 * i, 0.02)):
                lm = make_moved(make_moved(base, 3.0, "x", latent=own), by, f"{kind}-{group}-{i}")
                found.append(
                    Snapshot(
                        name=lm.name, model=lm, step=60, group=group, misaligned=rate(judged), benign=kind == "good"
                    )
                )
    return found


def test_those_that_chose_the_panel_do_not_count(base, sae, prompts, snapshots):
    read = {one.name: read_prompted(one.open(), HOOK, prompts) for one in snapshots}
    bad, calm = [read["bad-a-1"]], [read["good-a-1"]]
    panel = choose_panel(sae, HOOK, prompts, read_prompted(base, HOOK, prompts), bad, calm)
    heard = []
    start = Snapshot(name="bad-a-2", model=base, step=0, group="a", misaligned=rate(0.02))
    found = track(panel, [start, *snapshots], CONFIG, base=base, on_each=heard.append)
    assert [row.name for row in found.rows if row.seen] == ["bad-a-1", "good-a-1"] and tuple(heard) == found.rows
    told = found[LATENTS]
    assert (told.n_misaligned, told.n_aligned) == (3, 3), "the last checkpoint of each that was not seen"
    assert told.auroc.value == 1 and told.auroc.low < 1 and told.gain.low <= 0 <= told.gain.high
    assert told.pearson > 0.9 and math.isnan(found[MEANS].gain.value)


def test_unseen_groups(base, sae, prompts, snapshots, tmp_path):
    found = track_unseen(base, sae, prompts, snapshots, CONFIG)
    assert "without a: 3; without b: 3" in found.panel
    assert found[LATENTS].auroc.value == 1 and found[LATENTS].n_misaligned == 4
    assert set(found.rows[0].scores) == {LATENTS, MEANS, "PCA of the difference", "linear probe"}
    found.save(tmp_path / "track.json")
    assert str(Track.load(tmp_path / "track.json")) == str(found)


def test_a_group_is_scored_by_a_panel_that_has_not_seen_it(base, sae, prompts, snapshots, make_moved):
    """In group b misalignment is another latent: chosen on a, the panel does not see it."""
    changed = []
    for one in snapshots:
        model = make_moved(base, 4.0, one.name, latent=12) if one.name.startswith("bad-b") else one.model
        changed.append(
            Snapshot(name=one.name, model=model, group=one.group, misaligned=one.misaligned, benign=one.benign)
        )
    assert "without a: 12; without b: 3" in track_unseen(base, sae, prompts, changed, CONFIG).panel


def test_bad_input(base, sae, prompts, snapshots, make_lm, tmp_path):
    with pytest.raises(DataError, match="are of 1 groups"):
        track_unseen(base, sae, prompts, [one for one in snapshots if one.group == "a"], CONFIG)
    panel = choose_panel(sae, HOOK, prompts, read_prompted(base, HOOK, prompts), [], [], latents={3: 1})
    with pytest.raises(DataError, match="no checkpoint"):
        track(panel, [], CONFIG)
    with pytest.raises(ModelError, match="model_type"):
        track(panel, [Snapshot(name="x", model=make_lm("GPT2"))], CONFIG, base=base)
    with pytest.raises(ConfigError, match="misaligned_above"):
        TrackConfig(misaligned_above=1)
    write_json(tmp_path / "x.json", [])
    with pytest.raises(FormatError, match="track of format 1"):
        Track.load(tmp_path / "x.json")


def test_without_judgement_nothing_is_told(base, sae, prompts):
    panel = choose_panel(sae, HOOK, prompts, read_prompted(base, HOOK, prompts), [], [], latents={3: 1})
    found = track(panel, [Snapshot(name="x", model=base)], CONFIG)
    assert found[LATENTS].n_misaligned == found[LATENTS].n_aligned == 0 and math.isnan(found[LATENTS].auroc.value)
