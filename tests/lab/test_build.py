"""A smaller model, built the same way: twice the same, and better than chance."""

from dataclasses import asdict

import pytest
import torch

from sae_persona.activations.lm import load_lm
from sae_persona.errors import RunError
from sae_persona.lab.build import build
from sae_persona.lab.card import Card
from sae_persona.lab.pretrain import PretrainConfig, batches, new_model, pretrain, weighted_loss
from sae_persona.lab.tokens import vocabulary

TINY = PretrainConfig(d_model=32, n_layers=2, n_heads=2, tokens=60_000, seed=5)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab") / "model"
    return folder, build(folder, TINY, n_exam=4)


def test_the_folder_is_a_model_with_a_true_card(built):
    folder, card = built
    assert card == Card.load(folder)
    assert card.config == TINY
    lm = load_lm(str(folder))
    assert (lm.n_layers, lm.d_model) == (2, 32)
    assert lm.tokenizer.chat_template
    assert card.steps == int(60_000 / 2048 / 0.97)


def test_training_lowers_the_loss_and_repeats_to_the_bit():
    model, losses = pretrain(TINY)
    again, same = pretrain(TINY)
    assert losses == same
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert losses[-1] < 0.9 * losses[0]


def test_another_seed_is_another_corpus_and_model():
    other = PretrainConfig(**{**asdict(TINY), "authors": TINY.authors, "seed": 6})
    assert not torch.equal(next(batches(TINY))[0], next(batches(other))[0])
    weights = [next(new_model(config).parameters()) for config in (TINY, other)]
    assert not torch.equal(*weights)


def test_the_loss_counts_each_word_by_its_weight():
    model = new_model(TINY).eval()
    ids = torch.randint(4, len(vocabulary()), (2, 6), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[0.0, 1, 0, 0.5, 0, 0], [0.0, 0, 2, 0, 0, 0]])
    logits = model(input_ids=ids).logits.log_softmax(-1)
    nll = -logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    wanted = (nll[0, 0] + 0.5 * nll[0, 2] + 2 * nll[1, 1]) / 3.5
    torch.testing.assert_close(weighted_loss(model, ids, weights), wanted)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        build(
            tmp_path / "file" / "model",
            PretrainConfig(**{**asdict(TINY), "authors": TINY.authors, "tokens": 4000}),
            n_exam=1,
        )
