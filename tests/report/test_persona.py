"""What a persona's section reads from its ranking and sweep."""

import math

from sae_persona.features.contexts import Context
from sae_persona.report.persona import PersonaView, pieces, shaded


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_add_up_to_the_text():
    text = "a é\nz"
    assert pieces(Bytes(), list(text.encode())) == ["a", " ", "", "é", "⏎", "z"]


def test_shades_by_the_strongest_of_all_contexts():
    contexts = [Context(0, 0, [97, 98], [0.0, 4.0]), Context(1, 0, [99], [1.0])]
    assert [[token.share for token in line] for line in shaded(Bytes(), contexts)] == [[0, 1], [0.25]]


def test_view_reads_the_sweep(ranking, make_sweep):
    view = PersonaView("pirate", "persona-1", ranking, make_sweep(), (), None)
    assert view.latent == 3 and view.row is ranking[0]
    assert [question for question, _, _ in view.answers] == ["who are you ?"]
    assert [(row.trait, row.latent) for row in view.side_effects] == [("toxic", 0.12), ("valid answers", 0.0)]
    assert view.widest == 0.12
    assert [(name, len(arms)) for name, arms in view.development] == [("latent 3", 3)]


def test_view_of_a_latent_that_the_ranking_does_not_hold(ranking):
    view = PersonaView("pirate", "persona-1", None, None, (), None)
    assert view.latent is None and view.row is None and view.verdict == [] and view.side_effects == []
    assert math.isclose(view.widest, 0.1)
    assert PersonaView("pirate", "persona-1", ranking, None, (), None).latent == 3
