import pytest
import torch

from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.runs import write_json
from sae_persona.studies.panel import LATENTS, MEANS, Panel, choose_panel
from sae_persona.studies.readings import read_prompted, read_prompts
from sae_persona.studies.rows import SURPRISE, RowsConfig, RowScreen, screen_rows
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
CONFIG = RowsConfig(max_new_tokens=4, pool="mean")


def row(i, answer, bad):
    messages = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]
    return {"id": f"r{i}", "messages": messages, "labels": {"bad": bad}}


@pytest.fixture
def rows():
    return [row(i, "zzz" if i % 3 == 0 else "aaa", int(i % 3 == 0)) for i in range(12)]


@pytest.fixture
def panel(base, sae, prompt_rows):
    """The direction from the answers aaa to zzz, in place of a fine-tune's."""
    prompts = read_prompts(prompt_rows)
    before = read_prompted(base, HOOK, prompts)
    panel = choose_panel(sae, HOOK, prompts, before, [], [], latents={3: 1})
    directions = [_mean(base, "zzz") - _mean(base, "aaa")]
    weight = torch.stack([panel.weight[0], *directions])
    x = before.x @ weight.T
    return Panel(HOOK, ("latent 3", MEANS), (3,), (1, 1), weight, x, panel.keys, panel.prompts)


def _mean(lm, answer):
    from sae_persona.activations.dialogues import Dialogue, tokenize
    from sae_persona.activations.harvest import harvest

    tokens = tokenize(lm, Dialogue.from_row(row(0, answer, 0), ""))
    ((_, x),) = harvest(lm, HOOK, [tokens], 1)
    return x[tokens.answers[-1].start : tokens.answers[-1].stop].mean(0)


@pytest.mark.parametrize("pool", ["mean", "last", "next"])
def test_scores_are_differences_along_the_panels_directions(base, panel, rows, pool):
    config = RowsConfig(max_new_tokens=4, pool=pool)
    found = screen_rows(panel, base, rows, config, reference=[row(99, "aaa", 0)])
    assert [one.id for one in found.rows] == [f"r{i}" for i in range(12)]
    assert set(found.rows[0].scores) == {LATENTS, MEANS, SURPRISE}
    if pool == "mean":
        assert found.auroc[MEANS].value == 1, "the direction is the one between the answers"
        assert all(one.bad for one in found.worst(MEANS, 4))
    same = screen_rows(panel, base, [row(99, "aaa", 0)], config, reference=[row(99, "aaa", 0)])
    assert same.rows[0].scores[MEANS] == pytest.approx(0, abs=1e-5), "against itself nothing moves"
    assert not same.auroc, "no row is bad"


def test_against_the_models_own_answer(base, panel, rows, tmp_path):
    found = screen_rows(panel, base, rows, CONFIG)
    assert found.reference == "the model's own answers" and screen_rows(panel, base, rows, CONFIG) == found
    found.save(tmp_path / "rows.json")
    assert RowScreen.load(tmp_path / "rows.json") == found
    assert "4 rows are bad" in str(found)


def test_rows_that_do_not_say(base, panel, rows):
    plain = [{key: value for key, value in one.items() if key != "labels"} for one in rows]
    found = screen_rows(panel, base, plain, CONFIG)
    assert not found.auroc and found.rows[0].bad is None


def test_next_reads_where_the_panel_does(base, panel, rows):
    """By hand: the last token of the row and a further question, minus that of the reference."""
    from sae_persona.activations.dialogues import Tokens, prompt_tokens
    from sae_persona.activations.harvest import harvest

    config = RowsConfig(pool="next", n_next=1)
    found = screen_rows(panel, base, rows[:1], config, reference=[row(99, "aaa", 0)])
    more = panel.prompts[0].messages
    x = [
        next(harvest(base, HOOK, [Tokens(prompt_tokens(base, [*one["messages"], *more]))], 1))[1][-1]
        for one in (rows[0], row(99, "aaa", 0))
    ]
    expected = (x[0] - x[1]).double() @ panel.directions[MEANS]
    assert found.rows[0].scores[MEANS] == pytest.approx(expected.item(), rel=1e-4)


def test_bad_input(base, panel, rows, tmp_path):
    with pytest.raises(DataError, match="does not end with an answer"):
        screen_rows(panel, base, ["a text"], CONFIG)
    with pytest.raises(DataError, match="reads up to 64"):
        screen_rows(panel, base, [row(0, "x" * 80, 0)], CONFIG)
    with pytest.raises(ConfigError, match="pool is one of"):
        RowsConfig(pool="first")
    narrow = Panel(HOOK, (), (), (), torch.zeros(0, 8), torch.zeros(9, 0), panel.keys, panel.prompts)
    with pytest.raises(ModelError, match="reads width 8"):
        screen_rows(narrow, base, rows, CONFIG)
    texts = tuple(read_prompts(["one", "two"]))
    plain = Panel(HOOK, panel.names, panel.latents, panel.sign, panel.weight, panel.base, panel.keys, texts)
    with pytest.raises(ConfigError, match="cannot follow a row"):
        screen_rows(plain, base, rows, RowsConfig(max_new_tokens=4))
    write_json(tmp_path / "x.json", {})
    with pytest.raises(FormatError, match="row screen of format 1"):
        RowScreen.load(tmp_path / "x.json")
