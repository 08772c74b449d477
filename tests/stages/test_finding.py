"""Search over a run in which every stage was run, against what the run's own files say."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from sae_persona.attribution.ranking import Ranking
from sae_persona.errors import ConfigError, DataError, ModelError, RunError
from sae_persona.features.descriptions import Description, Descriptions
from sae_persona.features.measure import Measurement
from sae_persona.features.query import Query
from sae_persona.runs import Run
from sae_persona.sae.formats import load_sae
from sae_persona.stages.finding import Search
from sae_persona.stages.pipeline import mean_difference


@pytest.fixture(scope="module")
def run(demo_run, tmp_path_factory):
    return Run(shutil.copytree(demo_run.path, tmp_path_factory.mktemp("search") / "run"))


@pytest.fixture(scope="module")
def search(run):
    return Search(run)


@pytest.fixture(scope="module")
def found(run):
    return Measurement.load(run)


@pytest.fixture(scope="module")
def sae(run):
    return load_sae(run.sae)


def latents(search, **query):
    return [hit.latent for hit in search.find(Query(**query))]


def test_numbers(search, found):
    rates = found.stats.firing_rate.numpy()
    got = latents(search, rate=(0.01, 0.05), limit=999)
    assert set(got) == set(np.flatnonzero((rates >= 0.01) & (rates <= 0.05)).tolist())
    assert (np.diff(rates[got]) <= 0).all()
    assert set(latents(search, dead=True, limit=999)) == set(np.flatnonzero(rates == 0).tolist())
    assert len(latents(search, dead=False, limit=999)) == (rates > 0).sum()
    assert latents(search, rate=(0.99, None)) == []


def test_words_are_those_of_the_contexts(search, found, run):
    tokenizer = search._model[0].tokenizer
    contexts = [" ".join(tokenizer.decode(c.tokens) for c in found.contexts.of(i)) for i in range(256)]
    having = {i for i, text in enumerate(contexts) if "kindly" in text.split()}
    assert 0 < len(having) < 200
    assert set(latents(search, words="kindly", limit=999)) == having
    peaks = [{tokenizer.decode([c.tokens[np.argmax(c.acts)]]) for c in found.contexts.of(i)} for i in range(256)]
    token = next(token for token in sorted(set.union(*peaks)) if token.isalpha())
    hits = search.find(Query(words=f"tokens: {token}", limit=999))
    assert {hit.latent for hit in hits} == {i for i, one in enumerate(peaks) if token in one}
    assert all(hit.scores["words"] > 0 for hit in hits)


def test_directions(search, sae):
    w = sae.w_dec.double()
    w = w / w.norm(dim=1, keepdim=True)
    cosines = (w @ w[12]).numpy()
    order = np.argsort(-cosines)
    assert latents(search, like=12, limit=5) == order[1:6].tolist()
    assert latents(search, vector=sae.w_dec[12], limit=5) == order[:5].tolist()
    hits = search.find(Query(like=12, cosine=(0.1, 0.5), limit=999))
    assert {hit.latent for hit in hits} == set(np.flatnonzero((cosines >= 0.1) & (cosines <= 0.5)).tolist())
    for hit in hits:
        assert hit.scores["cosine"] == pytest.approx(cosines[hit.latent], abs=1e-9)


def test_a_personas_vector_finds_its_latent(search, run, found, sae):
    ranking = Ranking.load(run.ranking("formal"))
    direction = mean_difference(found.pooled, "formal", ranking.config["pool"]).double()
    cosines = torch.nn.functional.cosine_similarity(sae.w_dec.double(), direction[None]).numpy()
    got = latents(search, persona_vector="formal", limit=3)
    assert got == np.argsort(-cosines)[:3].tolist()
    assert got[0] in [row.latent for row in ranking[:5]]


def test_a_personas_ranking(search, run):
    ranking = Ranking.load(run.ranking("formal"))
    hits = search.find(Query(persona="formal", limit=999))
    assert [hit.latent for hit in hits] == [row.latent for row in ranking]
    assert hits[0].scores == {
        "z": ranking[0].z,
        "auroc": ranking[0].held_out_auroc.value,
        "p_max_t": ranking[0].p_max_t,
    }
    good = [row.latent for row in ranking if row.held_out_auroc.value >= 0.8]
    assert good
    assert latents(search, persona="formal", auroc=(0.8, None), limit=999) == good
    other = Ranking.load(run.ranking("cheerful"))
    any_of = set(good) | {row.latent for row in other if row.held_out_auroc.value >= 0.8}
    assert set(latents(search, auroc=(0.8, None), limit=999)) == any_of


def test_a_text_finds_what_fires_on_it(search, sae):
    lm = search._model[0]
    hits = search.find(Query(text="kindly note that aspirin is the remedy for fever .", limit=999))
    surprise = [hit.scores["surprise"] for hit in hits]
    assert (np.diff(surprise) <= 0).all()
    from sae_persona.activations.dialogues import tokenize
    from sae_persona.activations.harvest import harvest

    tokens = tokenize(lm, "kindly note that aspirin is the remedy for fever .")
    ((_, x),) = harvest(lm, sae.hook, [tokens], 1)
    counted = torch.tensor(tokens.ids) != (-1 if lm.bos_id is None else lm.bos_id)
    fires = (sae.encode(x).dense(256)[counted] > 0).any(0)
    assert {hit.latent for hit in hits} == set(fires.nonzero().flatten().tolist())
    assert hits[0].scores["times"] > 1


def test_all_at_once_is_the_intersection(search):
    words = set(latents(search, words="kindly", limit=999))
    ranked = latents(search, persona="formal", limit=999)
    alive = set(latents(search, rate=(0.005, 0.5), limit=999))
    near = latents(search, like=12, limit=999)
    both = [i for i in ranked if i in words & alive]
    assert both
    given = {"words": "kindly", "persona": "formal", "rate": (0.005, 0.5), "limit": 999}
    assert latents(search, **given) == both  # the persona orders
    assert set(latents(search, **given, order="words")) == set(both)
    assert latents(search, **given, like=12) == [i for i in near if i in both]
    rated = latents(search, **given, order="rate")
    assert set(rated) == set(both)
    hit = search.find(Query(**{**given, "limit": 1}, like=12))[0]
    assert {"cosine", "z", "auroc", "p_max_t"} <= set(hit.scores)
    json.dumps(hit.to_json(), allow_nan=False)


def test_indexes_are_made_once_and_again_when_their_inputs_change(demo_run, tmp_path):
    run = Run(shutil.copytree(demo_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("sweeps")))
    said: list[str] = []

    def heard(**query):
        said.clear()
        hits = Search(run, say=said.append).find(Query(**query))
        return hits, " ".join(said)

    assert "search.sqlite: there is none yet" in heard(words="zebra")[1]
    assert "directions.safetensors: there is none yet" in heard(like=1)[1]
    assert heard(words="zebra", like=1) == ([], "")
    about = Description(latent=7, explanation="a zebra's stripes", promoted=((" zoo", 1.0),))
    Descriptions("", {7: about}).save(run)
    hits, told = heard(words="zebra")
    assert "descriptions changed" in told
    assert [(hit.latent, hit.entry.explanation, hit.entry.promoted) for hit in hits] == [
        (7, "a zebra's stripes", "zoo")
    ]
    os.utime(run.latents)  # another time, the same bytes
    assert heard(words="zebra", like=1)[1] == ""
    run.search.write_bytes(b"broken")
    assert "the old one cannot be read" in heard(words="zebra")[1]
    weights = run.sae / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert "directions.safetensors: sae changed" in heard(like=1)[1]
    assert not list(run.path.glob(".*"))


def test_what_cannot_be_asked(search, run, demo_run, tmp_path):
    with pytest.raises(ConfigError, match="nothing to search for"):
        Query()
    with pytest.raises(ConfigError, match="one direction at a time, got like and persona_vector"):
        Query(like=1, persona_vector="formal")
    with pytest.raises(ConfigError, match="needs a direction"):
        Query(cosine=(0.1, None))
    with pytest.raises(ConfigError, match="no text to order by"):
        Query(words="a", order="text")
    with pytest.raises(ConfigError, match="limit is how many latents are shown: give 1 or more, got 0"):
        Query(limit=0)
    with pytest.raises(DataError, match="latent 256 does not exist: .* has latents 0 to 255"):
        latents(search, like=256)
    with pytest.raises(ModelError, match=r"have width 128, the vector is \[3\]"):
        latents(search, vector=torch.ones(3))
    with pytest.raises(RunError, match="no ranking for pirate"):
        latents(search, persona="pirate")
    with pytest.raises(DataError, match="no token"):
        latents(search, text=" ")
    other = Run(shutil.copytree(demo_run.path, tmp_path / "run"))
    config = json.loads((other.sae / "cfg.json").read_text())
    (other.sae / "cfg.json").write_text(json.dumps({**config, "d_sae": 300}))
    with pytest.raises(DataError, match="an SAE of 300 latents and statistics of 256: measure it again"):
        Search(other)
    assert not other.search.exists()
