"""Directions.top against all cosines in fp64, on rows that make quantisation hard."""

import pytest
import torch
from safetensors.torch import save_file

from sae_persona.errors import DataError, FormatError, ModelError
from sae_persona.features import directions
from sae_persona.features.directions import Directions

N, D, K = 3000, 48, 15


def cases():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(N, D, generator=generator)
    outlying = plain.clone()
    outlying[:, 3] *= 300  # one dimension far larger than the rest leaves few levels to the others
    crowded = plain[:1] + 0.01 * plain  # all nearly alike, so the codes cannot tell them apart
    scaled = plain * torch.logspace(-20, 20, N)[:, None]
    return {"plain": plain, "outlying": outlying, "crowded": crowded, "scaled": scaled, "one": plain[:, :1]}


CASES = cases()


def exact(rows, query):
    rows, query = rows.double(), query.double()
    return torch.nn.functional.cosine_similarity(rows, query[None], dim=1, eps=1e-300).numpy()


@pytest.mark.parametrize("few", [1, 2048], ids=["both parts", "first part"])
@pytest.mark.parametrize("name", CASES)
def test_the_best_are_those_of_all_cosines(name, few, monkeypatch):
    monkeypatch.setattr(directions, "FEW", few)
    rows = CASES[name]
    found = Directions.of(rows)
    for query in (torch.randn(rows.shape[1]), rows[7] + 0.1 * rows[8], -rows[5]):
        latents, cosines = found.top(query, K)
        truth = exact(rows, query)
        assert cosines == pytest.approx(truth[latents], abs=1e-12)
        assert sorted(truth)[-K:] == pytest.approx(sorted(cosines), abs=1e-12)
        assert (cosines[1:] <= cosines[:-1]).all()
        allowed = torch.rand(N).numpy() < 0.1
        latents, cosines = found.top(query, K, allowed)
        assert allowed[latents].all()
        assert sorted(truth[allowed])[-K:] == pytest.approx(sorted(cosines), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_error_is_a_bound(name):
    rows = CASES[name]
    found = Directions.of(rows)
    unit = torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-300)
    left_out = (unit - found.scale.double()[:, None] * found.codes.double()).norm(dim=1)
    assert (left_out <= found.error).all()
    assert (found.error <= 1.01 * left_out + 1e-5).all()


def test_few_rows_are_read_whole(monkeypatch):
    """A latent's neighbours stand out, so nearly all rows are settled by their codes."""
    read = []
    whole = Directions.cosines
    monkeypatch.setattr(Directions, "cosines", lambda self, q, rows: read.append(len(rows)) or whole(self, q, rows))
    Directions.of(CASES["plain"]).top(CASES["plain"][7], K)
    assert read[0] < N / 20


def test_of_equal_ones_the_first():
    rows = torch.eye(4)[[2, 1, 1, 0, 1]]
    latents, cosines = Directions.of(rows).top(torch.tensor([0.0, 2.0, 0.0, 0.0]), 4)
    assert latents.tolist() == [1, 2, 4, 0]
    assert cosines.tolist() == [1, 1, 1, 0]


def test_more_than_there_are_and_none():
    found = Directions.of(torch.cat([torch.zeros(1, 3), torch.eye(3)]))
    latents, cosines = found.top(torch.ones(3), 9)
    assert latents.tolist() == [1, 2, 3, 0]
    assert cosines[-1] == 0
    assert len(found.top(torch.ones(3), 9, torch.zeros(4, dtype=torch.bool).numpy())[0]) == 0


def test_a_file_is_what_was_saved(tmp_path):
    rows, path = CASES["plain"], tmp_path / "directions.safetensors"
    saved = Directions.of(rows)
    saved.save(path, {"inputs": "these"})
    found = Directions.open(path, rows)
    assert directions.directions_facts(path)["inputs"] == "these"
    assert (found.top(rows[3], K)[0] == saved.top(rows[3], K)[0]).all()
    with pytest.raises(FormatError, match=r"is for directions \[3000, 48\], these are \[10, 48\]"):
        Directions.open(path, rows[:10])
    save_file({"codes": saved.codes}, path)
    with pytest.raises(FormatError, match="holds None format None, wanted directions"):
        Directions.open(path, rows)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="no directions at"):
        Directions.open(path, rows)


def test_what_has_no_direction_is_refused():
    found = Directions.of(torch.eye(3))
    with pytest.raises(ModelError, match=r"have width 3, the vector is \[2\]"):
        found.top(torch.ones(2), 1)
    for bad in (torch.zeros(3), torch.tensor([1, torch.nan, 0])):
        with pytest.raises(DataError, match="has no direction"):
            found.top(bad, 1)
    with pytest.raises(DataError, match="not finite"):
        Directions.of(torch.tensor([[torch.inf, 0.0]]))
