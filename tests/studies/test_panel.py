import json
import math

import numpy as np
import pytest
import torch

from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.studies.panel import LATENTS, MEANS, Panel, PanelConfig, choose_panel, made_of
from sae_persona.studies.readings import Reading, read_prompted, read_prompts
from sae_persona.types import HookPoint

HOOK = HookPoint(0)


@pytest.fixture
def prompts(prompt_rows):
    return read_prompts(prompt_rows)


@pytest.fixture
def reading(prompts):
    return lambda lm: read_prompted(lm, HOOK, prompts)


@pytest.fixture
def panel(base, sae, prompts, reading, make_moved):
    """Chosen on one that moved latent 3, and a harmless one that moved latent 5 further."""
    bad, calm = make_moved(make_moved(base, 9.0, "x", latent=5), 2.0, "bad"), make_moved(base, 9.0, "calm", latent=5)
    return choose_panel(sae, HOOK, prompts, reading(base), [reading(bad)], [reading(calm)], about=made_of(base))


def test_what_is_bad_and_not_what_any_fine_tune_does(panel):
    assert panel.latents == (3,) and set(panel.sign) == {1}
    assert panel.measures == (LATENTS, "latent 3", MEANS, "PCA of the difference", "linear probe")
    assert panel.chosen_on == {"bad", "calm"}


def test_scores_are_standard_deviations_from_the_base(panel, base, make_moved):
    assert panel.score(base)[LATENTS] == pytest.approx((0, 0, 0), abs=1e-6)
    x = panel.base[:, 0].double().numpy()
    moved = panel.score(make_moved(base, 1.5, "new"))
    assert moved["latent 3"].value == pytest.approx(1.5 / np.std(x, ddof=1), rel=0.3)
    assert moved["latent 3"].low <= moved["latent 3"].value <= moved["latent 3"].high
    assert moved[LATENTS] == moved["latent 3"], "there is only one"
    assert moved[MEANS].value > 0 > panel.score(make_moved(base, -1.5, "back"))[MEANS].value
    along = panel.directions[LATENTS]
    assert along[3] == pytest.approx(1 / np.std(x, ddof=1)) and along.count_nonzero() == 1


def test_latents_that_fall(base, sae, prompts, reading, make_moved):
    bad = reading(make_moved(base, 3.0, "bad"))
    panel = choose_panel(sae, HOOK, prompts, reading(base), [bad], [], PanelConfig(n_up=1, n_down=1))
    assert dict(zip(panel.latents, panel.sign, strict=False)) == {19: -1, 3: 1}
    assert panel.score(make_moved(base, 3.0, "again"))[LATENTS].value > 1


def test_given_latents(base, sae, prompts, reading):
    panel = choose_panel(sae, HOOK, prompts, reading(base), [], [], latents={7: -1})
    assert panel.measures == (LATENTS, "latent 7") and panel.sign == (-1,)
    with pytest.raises(ConfigError, match="latents 0 to 31"):
        choose_panel(sae, HOOK, prompts, reading(base), [], [], latents={32: 1})


def test_saved_and_loaded(panel, base, make_moved, tmp_path):
    path = panel.save(tmp_path / "panel.json")
    again = Panel.load(path)
    assert str(again) == str(panel) and again.about == panel.about and again.prompts == panel.prompts
    lm = make_moved(base, 1.0, "new")
    assert again.score(lm) == panel.score(lm)
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "format": 7}))
    with pytest.raises(FormatError, match="panel of format 1"):
        Panel.load(path)
    path.write_text(json.dumps(said))
    path.with_suffix(".safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="not what panel.json was written with"):
        Panel.load(path)
    with pytest.raises(ConfigError, match="to a .json file"):
        panel.save(tmp_path / "panel.pt")


def test_bad_input(panel, base, sae, prompts, reading, make_lm):
    with pytest.raises(DataError, match="there are neither"):
        choose_panel(sae, HOOK, prompts, reading(base), [], [])
    with pytest.raises(DataError, match="no direction between them"):
        choose_panel(sae, HOOK, prompts, reading(base), [reading(base)], [])
    with pytest.raises(ConfigError, match="a latent or more"):
        PanelConfig(n_up=0)
    with pytest.raises(DataError, match="share 0 prompts"):
        panel.of_reading(Reading("other", ("a", "b"), torch.zeros(2, 16)))
    still = Reading("still", reading(base).keys, torch.ones(9, 16))
    with pytest.raises(DataError, match="the same on every prompt"):
        choose_panel(sae, HOOK, prompts, still, [], [], latents={1: 1})
    other = Panel(HOOK, (), (), (), torch.zeros(0, 8), torch.zeros(9, 0), panel.keys, panel.prompts)
    with pytest.raises(ModelError, match="reads width 8"):
        other.score(base)
    assert math.isfinite(panel.spread.sum().item())
