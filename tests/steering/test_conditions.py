"""Edits that wait, requests that share a batch, spans, several hook points, and generations that stop."""

import math

import pytest
import torch

from sae_persona.activations.hooks import read
from sae_persona.activations.lm import padded
from sae_persona.errors import ConfigError
from sae_persona.steering.answers import AnswerConfig, answer
from sae_persona.steering.apply import intervene, intervene_rows
from sae_persona.steering.conditions import When
from sae_persona.steering.interventions import Add, Clamp, Placed, ProjectOut, Steer
from sae_persona.steering.positions import Spans, parse_positions
from sae_persona.types import HookPoint

HOOK = HookPoint(2)
GREEDY = AnswerConfig(temperature=0.0, max_new_tokens=8, batch=64)
STRONG = Clamp(3, 20.0, 6.0)


def stream(lm, prompts, hook=HOOK, side="left"):
    """Residual activations of each prompt, padding cut off."""
    ids, mask = padded(lm, prompts, side=side)
    acts = read(lm, [hook], ids, mask)[hook]
    return [x[keep.bool()] for x, keep in zip(acts, mask, strict=True)]


def edited_at(lm, prompts, *edits, sae=None, side="left", **settings):
    """Which tokens of each prompt an intervention changes."""
    before = stream(lm, prompts, side=side)
    with intervene(lm, sae, edits, **settings):
        after = stream(lm, prompts, side=side)
    return [(a != b).any(dim=1).nonzero().flatten().tolist() for a, b in zip(before, after, strict=True)]


def generate(lm, prompts, *, cache=True, **options):
    ids, mask = padded(lm, prompts)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": lm.pad_id, "use_cache": cache} | options
    return lm.model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_and_prompts(lm, prompts, side):
    steer = Steer(torch.ones(lm.d_model), 1.0)
    found = edited_at(lm, prompts, steer, hook=HOOK, positions=Spans(((0, 2), (4, 6))), side=side)
    assert found == [[1, 4, 5]] * len(prompts)  # 0 is BOS
    found = edited_at(lm, prompts, steer, hook=HOOK, positions="prompt", side=side)
    assert found == [list(range(1, len(prompt))) for prompt in prompts]


def test_positions_are_read_from_text():
    assert parse_positions("3:7,12:20") == Spans(((3, 7), (12, 20))) and parse_positions("pre") == "pre"
    assert str(parse_positions("3:7,12:20")) == "3:7,12:20"
    for text in ("3", "3:", "7:3", "a:b", "", "3:7;9:12", "last"):
        with pytest.raises(ConfigError):
            parse_positions(text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edit_waits_for_its_latent_at_the_token(lm, sae, prompts, side):
    acts = [sae.latents_at(x, torch.tensor([7]))[:, 0] for x in stream(lm, prompts)]
    level = float(torch.cat(acts).median())
    edit = Placed(edit=Steer(torch.ones(lm.d_model), 1.0), hook=HOOK, positions="all", when=When(latent=7, above=level))
    want = [[i for i, act in enumerate(one) if act > level and i] for one in acts]
    assert edited_at(lm, prompts, edit, sae=sae, side=side) == want
    assert 0 < sum(map(len, want)) < sum(map(len, prompts))


def test_a_condition_may_be_read_earlier_and_as_a_projection(lm, prompts):
    early, v = HookPoint(1), torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    at = [x @ (v / v.norm()) for x in stream(lm, prompts, early)]
    level = float(torch.cat(at).median()) + 1e-4  # not at a token's own value, which rounding decides
    when = When(direction=v, above=level, hook=early)
    edit = Placed(edit=Steer(v, 1.0), hook=HOOK, positions="all", when=when)
    want = [[i for i, one in enumerate(row) if one > level and i] for row in at]
    assert edited_at(lm, prompts, edit) == want


@pytest.mark.parametrize("order", [1, -1])
def test_one_condition_at_two_hook_points_is_read_at_each(lm, prompts, order):
    v, late = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)), HookPoint(3)

    def stream_with(*whens):
        places = list(zip((HOOK, late), whens, strict=True))[::order]
        edits = [Placed(edit=Steer(v, 1.0), hook=hook, positions="all", when=when) for hook, when in places]
        with intervene(lm, None, edits):
            return stream(lm, prompts, late)

    shared = When(direction=v, above=0.5)
    apart = [When(direction=v, above=0.5) for _ in range(2)]
    for one, other in zip(stream_with(shared, shared), stream_with(*apart), strict=True):
        assert torch.equal(one, other)


def test_a_turn_remembers_with_and_without_a_cache(lm, sae, prompts):
    plain = generate(lm, prompts)
    acts = [sae.latents_at(x, torch.tensor([7]))[:, 0] for x in stream(lm, [row.tolist() for row in plain])]
    level = float(torch.cat([a[-9:] for a in acts]).quantile(0.7))
    when = When(latent=7, above=level, scope="turn")
    edits = [Placed(edit=Clamp(3, 3.0, 6.0), positions="answer", when=when)]
    with intervene(lm, sae, edits):
        cached, fresh = generate(lm, prompts), generate(lm, prompts, cache=False)
        again = generate(lm, prompts)
    assert torch.equal(cached, fresh) and torch.equal(cached, again)
    by_token = [Placed(edit=Clamp(3, 3.0, 6.0), positions="answer", when=When(latent=7, above=level))]
    with intervene(lm, sae, by_token):
        assert not torch.equal(generate(lm, prompts), cached)
    with intervene(lm, sae, edits), pytest.raises(ConfigError, match="cannot follow a search with 3 beams"):
        generate(lm, prompts, num_beams=3)


def test_each_row_of_a_batch_has_its_own_edits(lm, sae, prompts):
    three, v = prompts[:3], torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    requests = [[STRONG], [], [Add(8, 1.0, 9.0), Placed(edit=Steer(v, 4.0), hook=HookPoint(1), positions="all")]]
    alone = []
    for prompt, edits in zip(three, requests, strict=True):
        with intervene(lm, sae, edits):
            alone.append(answer(lm, [prompt], GREEDY)[0].ids)
    ids, mask = padded(lm, three)
    with intervene_rows(lm, sae, requests):
        out = lm.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=lm.pad_id)
        twice = lm.model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=2, pad_token_id=lm.pad_id
        )
    for row, want in zip(out[:, ids.shape[1] :].tolist(), alone, strict=True):
        assert row[: len(want)] == want
    assert alone[0] != answer(lm, three[:1], GREEDY)[0].ids and len(twice) == 3
    with (
        intervene_rows(lm, sae, requests),
        pytest.raises(ConfigError, match="edits for 3 rows cannot be shared out over a batch of 2"),
    ):
        generate(lm, three[:2])


def test_several_hook_points_at_once(lm, sae, prompts):
    late = HookPoint(3)
    edits = [Placed(edit=STRONG, hook=HOOK), Placed(edit=Steer(torch.ones(lm.d_model), 2.0), hook=late)]
    with intervene(lm, sae, edits):
        both = generate(lm, prompts)
    with intervene(lm, sae, [STRONG]), intervene(lm, None, [edits[1]]):
        nested = generate(lm, prompts)
    assert torch.equal(both, nested)
    with intervene(lm, {HOOK: sae, late: sae}, [edits[0], Placed(edit=Clamp(9, 1.0, 3.0), hook=late)]):
        assert not torch.equal(generate(lm, prompts), both)


def test_a_bare_sae_serves_its_own_hook_point_only(lm, sae, prompts):
    late = HookPoint(3)
    steer = Placed(edit=Steer(torch.ones(lm.d_model), 2.0), hook=late)
    refused = [
        ([Placed(edit=STRONG, hook=late)], {}, r"latent 3 is to be edited at layers\.3\.resid_post, and the SAE reads"),
        ([STRONG], {"hook": late}, r"latent 3 is to be edited at layers\.3\.resid_post, and the SAE reads"),
        ([steer], {"abort_when": When(latent=7, above=1.0, hook=late)}, "where no SAE has it"),
        ([Placed(edit=steer.edit, hook=late, when=When(latent=7, above=1.0))], {}, "where no SAE has it"),
    ]
    for edits, settings, message in refused:
        with pytest.raises(ConfigError, match=message) as raised, intervene(lm, sae, edits, **settings):
            pass
        assert "\n" not in str(raised.value)
    with intervene(lm, sae, [STRONG]):
        own = generate(lm, prompts)
    with intervene(lm, {late: sae}, [STRONG], hook=late):
        assert not torch.equal(generate(lm, prompts), own), "a mapping means what it says"
    waits = Placed(edit=steer.edit, hook=late, when=When(latent=7, above=0.0, hook=HOOK))
    with intervene(lm, sae, [waits]):
        generate(lm, prompts)


def test_projections_out_of_one_place_are_one(lm, prompts):
    """Directions at 60 degrees: what they share is removed once, in either order."""
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    w = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    v = u / u.norm() + 0.3 * w / w.norm()
    found = []
    for order in ([u, v], [v, u]):
        with intervene(lm, None, [ProjectOut(d) for d in order], hook=HOOK, positions="every"):
            found.append(stream(lm, prompts))
    with intervene(lm, None, [ProjectOut(torch.stack([u, v]))], hook=HOOK, positions="every"):
        joint = stream(lm, prompts)
    for one, other, both in zip(*found, joint, strict=True):
        torch.testing.assert_close(one, both, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other, both, atol=1e-4, rtol=1e-4)
        assert (one @ (u / u.norm())).abs().max() < 1e-3 and (one @ (v / v.norm())).abs().max() < 1e-3


def test_spans_that_never_meet_do_not_collide(lm, sae):
    one, other = (
        Placed(edit=STRONG, positions=Spans(((1, 3), (6, 8)))),
        Placed(edit=Add(3, 1.0, 1.0), positions=Spans(((3, 6),))),
    )
    with intervene(lm, sae, [one, other]):
        pass
    meets = Placed(edit=Add(3, 1.0, 1.0), positions=Spans(((7, 9),)))
    with pytest.raises(ConfigError, match="latent 3 is edited twice"), intervene(lm, sae, [one, meets]):
        pass


def test_a_second_turn_goes_on_from_the_cache(lm, sae, prompts):
    """What is generated after a turn in the cache is what the whole text gives, for edits of the answer alone."""
    first = torch.tensor([prompts[0]])
    options = {"do_sample": False, "pad_token_id": lm.pad_id, "return_dict_in_generate": True}
    turn = lm.model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=4, **options)
    whole = torch.cat([turn.sequences, torch.tensor([prompts[1][1:]])], dim=1)
    options |= {"attention_mask": torch.ones_like(whole), "max_new_tokens": 6}
    with intervene(lm, sae, [STRONG]):
        fresh = lm.model.generate(whole, **options).sequences
        cached = lm.model.generate(whole, past_key_values=turn.past_key_values, **options).sequences
    assert torch.equal(cached, fresh) and not torch.equal(fresh, lm.model.generate(whole, **options).sequences)


def test_a_pass_from_a_cache_needs_to_know_its_prompt(lm, sae, prompts):
    ids = torch.tensor([prompts[0]])
    cache = lm.model(ids, use_cache=True).past_key_values
    with (
        intervene(lm, sae, [STRONG]),
        pytest.raises(ConfigError, match="goes on from a cache, and nothing tells where"),
    ):
        lm.model(ids[:, -2:], past_key_values=cache)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([0], "whole numbers from 1, got 0"),
        ([2.5], "whole numbers from 1, got 2.5"),
        ([5], "row 0 has 4 tokens, its prompt cannot have 5"),
    ],
)
def test_prompt_lengths_that_cannot_be(lm, sae, lengths, message):
    with pytest.raises(ConfigError, match=message), intervene(lm, sae, [STRONG], prompt_lengths=lengths):
        lm.model(torch.tensor([[1, 20, 21, 22]]))
    with pytest.raises(ConfigError, match="a priority is a whole number, got 1.5"):
        Placed(edit=STRONG, priority=1.5)


def test_priorities_decide_where_edits_meet(lm, sae, prompts):
    weak, strong = Clamp(3, 0.1, 1.0), STRONG
    with intervene(lm, sae, [Placed(edit=weak, priority=1), Placed(edit=strong, priority=2)]):
        found = generate(lm, prompts)
    with intervene(lm, sae, [strong]):
        assert torch.equal(generate(lm, prompts), found)


def test_a_generation_stops_where_its_condition_holds(lm, sae, prompts):
    written = [a.ids for a in answer(lm, prompts, AnswerConfig(temperature=0.0, max_new_tokens=12, batch=64))]
    n = max(map(len, prompts))
    whole = stream(lm, [prompt + ids for prompt, ids in zip(prompts, written, strict=True)])
    # at the pre-answer token and all that were written but the last, which is never read
    acts = [
        sae.latents_at(x, torch.tensor([7]))[len(p) - 1 : len(p) - 1 + len(ids), 0]
        for x, p, ids in zip(whole, prompts, written, strict=True)
    ]
    level = float(torch.cat(acts).quantile(0.85))
    with intervene(lm, sae, [], abort_when=When(latent=7, above=level, hook=HOOK)) as applied:
        out = generate(lm, prompts, max_new_tokens=12)
    first = [next((i for i, act in enumerate(one) if act > level), None) for one in acts]
    assert applied.aborted is not None and None in first and len(set(first)) > 2
    for row, was, at, aborted in zip(out[:, n:].tolist(), written, first, applied.aborted.tolist(), strict=True):
        assert aborted == (at is not None)
        end = len(was) if at is None else at + 1  # the token sampled by then stays
        assert row[:end] == was[:end] and set(row[end:]) <= {lm.pad_id}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: When(above=1.0), "reads either a latent or a direction"),
        (lambda: When(above=1.0, latent=1, direction=torch.ones(3)), "reads either a latent or a direction"),
        (lambda: When(above=math.nan, latent=1), "a condition needs a finite level, got nan"),
        (lambda: When(above=-1.0, latent=1), "a latent is never below 0"),
        (lambda: When(above=1.0, direction=torch.zeros(3)), "a direction is a finite vector .* that is not 0"),
        (lambda: When(above=1.0, direction=torch.tensor([1.0, math.nan])), "a direction is a finite vector"),
        (lambda: When(above=1.0, direction=torch.ones(2, 3)), "a direction is a finite vector"),
        (lambda: When(above=1.0, direction=[1.0, 2.0]), "a direction is a tensor .*, got list"),
        (lambda: When(above=1.0, latent=1, scope="day"), "holds at a token or in a turn, got 'day'"),
    ],
)
def test_what_is_no_condition(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_conditions_that_cannot_be_read(lm, sae):
    later = When(latent=7, above=1.0, hook=HookPoint(3))
    cases = [
        (
            [Placed(edit=STRONG, when=later)],
            {},
            r"an edit at layers\.2\.resid_post cannot wait for a condition at layers\.3",
        ),
        (
            [Placed(edit=STRONG, when=When(latent=99, above=1.0))],
            {},
            "the condition reads latent 99 at .*, where no SAE",
        ),
        (
            [Placed(edit=STRONG, when=When(direction=torch.ones(3), above=1.0))],
            {},
            "a direction has as many numbers as the stream, 128, got 3",
        ),
        ([], {"abort_when": When(latent=7, above=1.0)}, "a condition to stop at needs a hook point"),
    ]
    for edits, settings, message in cases:
        with pytest.raises(ConfigError, match=message), intervene(lm, sae, edits, **settings):
            pass
    assert not lm.model._forward_pre_hooks
