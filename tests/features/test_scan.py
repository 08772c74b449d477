"""The dictionary pass against one text at a time and a dense SAE, and halves against the whole."""

import h5py
import pytest
import torch

from sae_persona.activations.dialogues import Dialogue, tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import load_lm
from sae_persona.activations.sequences import Place, kept, placed
from sae_persona.activations.texts import read_texts
from sae_persona.errors import ConfigError, DataError, FormatError, ModelError
from sae_persona.features import corpus
from sae_persona.features.contexts import WINDOW
from sae_persona.features.corpus import scan
from sae_persona.features.firings import POSITION_BITS
from sae_persona.features.scan import Scan, ScanConfig, Share
from sae_persona.lab import corpora
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import Threshold, TopK
from sae_persona.types import HookPoint

HOOK, N_LATENTS = HookPoint(1), 48
SMALL = ScanConfig(context_size=24, lm_batch=2, contexts=3, sampled=6, cofiring_tokens=200, neighbours=4, pack=False)


@pytest.fixture(scope="module")
def lm():
    return load_lm("lab")


@pytest.fixture(scope="module", params=["topk", "threshold"])
def sae(request, lm) -> SAE:
    draw = torch.Generator().manual_seed(1)
    w = torch.nn.functional.normalize(torch.randn(N_LATENTS, lm.d_model, generator=draw), dim=1)
    rule = TopK(5) if request.param == "topk" else Threshold(torch.rand(N_LATENTS, generator=draw) + 1)
    return SAE(w, torch.zeros(N_LATENTS), w, torch.zeros(lm.d_model), rule)


@pytest.fixture(scope="module")
def texts(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    corpora.write_texts(folder, n=30, n_labelled=4, n_questions=2, seed=0)
    rows = list(read_texts(folder / "corpus.jsonl"))
    return [*rows, "a plain text . " * 20, "another ."]


@pytest.fixture(scope="module")
def whole(lm, sae, texts) -> Scan:
    return scan(lm, HOOK, sae, texts, SMALL)


def dense(lm, sae, texts, config=SMALL):
    """Place, ids, counted tokens and dense latents of each sequence, one alone in the model."""
    for place, tokens in placed(lm, read_texts(texts), config.context_size, config.tokens, Place()):
        ((_, x),) = harvest(lm, HOOK, [tokens], 1)
        yield place, tokens, kept(lm, tokens, config.tokens), sae.encode(x).dense(N_LATENTS)


def same(a: Scan, b: Scan) -> None:
    """The same findings, to the bit but for sums."""
    assert a.stats.n_tokens == b.stats.n_tokens
    for part, names in (
        ("stats", ("fired", "maximum", "histogram")),
        ("seen", ("first", "last")),
        ("contexts", a.contexts.PARTS),
        ("sampled", a.sampled.PARTS),
        ("cofiring", ("drawn", "offsets", "idx")),
    ):
        for name in names:
            assert torch.equal(getattr(getattr(a, part), name), getattr(getattr(b, part), name)), (part, name)
    for name in ("total", "squares"):
        torch.testing.assert_close(getattr(a.stats, name), getattr(b.stats, name), rtol=1e-12, atol=0)


def test_agrees_with_one_sequence_at_a_time(lm, sae, texts, whole):
    counted, first, peaks = [], {}, {}
    for place, tokens, wanted, latents in dense(lm, sae, texts):
        counted.append(latents[wanted])
        for at in wanted.nonzero().flatten().tolist():
            for latent in latents[at].nonzero().flatten().tolist():
                first.setdefault(latent, (place.text, tokens.first + at))
                best = peaks.setdefault(latent, {})
                best[place.text] = max(best.get(place.text, 0.0), float(latents[at, latent]))
    counted = torch.cat(counted)
    assert whole.stats.n_tokens == len(counted)
    torch.testing.assert_close(whole.stats.fired, (counted > 0).sum(0))
    torch.testing.assert_close(whole.stats.total, counted.double().sum(0), rtol=1e-4, atol=1e-4)
    for latent in range(N_LATENTS):
        assert (whole.seen.of(latent) or [None])[0] == first.get(latent)
        strongest = sorted(peaks.get(latent, {}).values(), reverse=True)[: SMALL.contexts]
        assert [c.strength for c in whole.contexts.of(latent)] == pytest.approx(strongest, rel=1e-4)


def test_contexts_show_the_tokens_where_they_stand(lm, sae, texts, whole):
    read, whole_texts = {}, {}
    for place, tokens, wanted, _ in dense(lm, sae, texts):
        for i in wanted.nonzero().flatten().tolist():
            read[place.text, tokens.first + i] = tokens.ids, i
        whole_texts.setdefault(place.text, []).extend(t for t, w in zip(tokens.ids, wanted, strict=True) if w)
    shown = [context for i in range(N_LATENTS) for kind in (whole.contexts, whole.sampled) for context in kind.of(i)]
    for context in shown:
        ids, at = read[context.document, context.position]
        assert context.tokens == ids[max(0, at - WINDOW) : at + WINDOW + 1] and context.at == min(at, WINDOW)
    for text, tokens in whole_texts.items():  # positions are those in the text as it is tokenised whole
        ids = tokenize(lm, texts[text]).ids
        places = sorted(position for document, position in read if document == text)
        assert [ids[position] for position in places] == tokens
    assert any(context.position > SMALL.context_size for context in shown), "some text came in several pieces"


def test_shares_merge_to_the_whole(lm, sae, texts, whole, tmp_path):
    """A forward pass for each sequence, so that its activations are the same to the bit in every share."""
    alone = ScanConfig(**{**vars(SMALL), "lm_batch": 1})
    parts = []
    for rank in range(3):
        scan(lm, HOOK, sae, texts, alone, share=Share(rank, 3)).save(tmp_path / f"{rank}.h5")
        parts.append(Scan.load(tmp_path / f"{rank}.h5"))
    merged = parts[2]
    assert merged.missing == ["0/3", "1/3"]
    merged.merge(parts[0])
    merged.merge(parts[1])
    assert merged.missing == [] and merged.about["shares"] == ["0/3", "1/3", "2/3"]
    one = scan(lm, HOOK, sae, texts, alone)
    same(merged, one)
    assert merged.stats.n_tokens == whole.stats.n_tokens
    with pytest.raises(DataError, match="share 1/3 of the corpus is there twice"):
        merged.merge(parts[1])
    with pytest.raises(DataError, match="differ in config"):
        merged.merge(whole)


def test_packed_rows_and_small_parts_change_nothing(lm, sae, texts, whole, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS", 40)
    seen = []
    packed = scan(lm, HOOK, sae, texts, ScanConfig(**{**vars(SMALL), "pack": True, "lm_batch": 3}), on_rows=seen.append)
    assert sum(seen) == packed.stats.n_tokens == whole.stats.n_tokens and len(seen) > 10
    torch.testing.assert_close(packed.stats.fired, whole.stats.fired)
    for latent in range(N_LATENTS):
        assert packed.seen.of(latent) == whole.seen.of(latent)
        for a, b in zip(packed.contexts.of(latent), whole.contexts.of(latent), strict=True):
            assert (a.document, a.position, a.tokens) == (b.document, b.position, b.tokens)
            assert a.acts == pytest.approx(b.acts, rel=1e-3, abs=1e-4)


def test_sampled_contexts_have_their_quantile_and_spread(whole):
    latent = int(whole.stats.fired.argmax())
    found = whole.sampled_contexts(latent)
    assert len(found) == SMALL.sampled
    assert [c.strength for c in found] == sorted((c.strength for c in found), reverse=True)
    for context in found:
        low, high = (whole.stats.quantile(min(1, max(0, context.quantile + d)))[latent] for d in (-0.05, 0.05))
        assert low / 1.07 <= context.strength <= high * 1.07
    spread = whole.sampled_contexts(latent, 3)
    bands = {min(2, int(context.quantile * 3)) for context in found}
    assert len(spread) == 3 and {min(2, int(c.quantile * 3)) for c in spread} == bands
    assert whole.sampled_contexts(int(whole.stats.fired.argmin())) == [] or whole.stats.fired.min() > 0


def test_answers_only(lm, sae):
    chat = Dialogue(({"role": "user", "content": "hello ."}, {"role": "assistant", "content": "i am fine ."}))
    config = ScanConfig(**{**vars(SMALL), "tokens": "answers"})
    found = scan(lm, HOOK, sae, [chat, "a plain text ."], config)
    wanted = sum(int(counted.sum()) for _, _, counted, _ in dense(lm, sae, [chat], config))
    assert 0 < found.stats.n_tokens == wanted


def test_stops_after_the_sequence_with_the_limit(lm, sae, texts, whole):
    bounds = torch.tensor([int(wanted.sum()) for _, _, wanted, _ in dense(lm, sae, texts)]).cumsum(0)
    for limit in (1, 100, int(bounds[4])):
        found = scan(lm, HOOK, sae, texts, ScanConfig(**{**vars(SMALL), "limit_tokens": limit}))
        assert found.stats.n_tokens == int(bounds[bounds >= limit][0])
    found = scan(lm, HOOK, sae, texts, ScanConfig(**{**vars(SMALL), "limit_tokens": 10**9}))
    assert found.stats.n_tokens == whole.stats.n_tokens


def test_goes_through_a_file(whole, tmp_path):
    path = tmp_path / "scan.h5"
    whole.save(path)
    again = Scan.load(path)
    same(again, whole)
    assert again.about == whole.about and again.config == whole.config
    latent = int(whole.stats.fired.argmax())
    assert again.sampled_contexts(latent) == whole.sampled_contexts(latent)
    with h5py.File(path) as file:
        near = whole.neighbours(latent, SMALL.neighbours)
        assert file["neighbours/partner"][latent].tolist() == near.partner[0].tolist()
        half = list(file["quantiles"].attrs["levels"]).index(0.5)
        assert file["quantiles"][latent, half] == float(whole.stats.quantile(0.5)[latent])
        assert file["seen/first_document"][latent] == int(whole.seen.first[latent]) >> POSITION_BITS
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FormatError, match="not a whole scan file.*scan the corpus again"):
        Scan.load(path)


def test_says_what_is_wrong_before_it_starts(lm, sae):
    with pytest.raises(DataError, match="none of the texts has a token"):
        scan(lm, HOOK, sae, [""], SMALL)
    with pytest.raises(ModelError, match="layers"):
        scan(lm, HookPoint(99), sae, ["a text ."], SMALL)
    other = SAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), TopK(1))
    with pytest.raises(ModelError, match="width 3"):
        scan(lm, HOOK, other, ["a text ."], SMALL)
    for text in ("2", "2/2", "a/b", "0/0", "-1/2"):
        with pytest.raises(ConfigError, match="a share reads RANK/WORLD"):
            Share.parse(text)
    assert str(Share.parse("1/2")) == "1/2"
    for name, value in (("context_size", 1), ("contexts", 0), ("limit_tokens", 0), ("ahead", -1)):
        with pytest.raises(ConfigError, match=name):
            ScanConfig(**{name: value})
    with pytest.raises(ConfigError, match="tokens is one of all, answers"):
        ScanConfig(tokens="some")  # pyright: ignore


def test_activations_that_are_not_finite_are_named(lm, sae):
    ids = lm.tokenizer("bees").input_ids
    table = lm.model.get_input_embeddings().weight
    before = table[ids[-1]].clone()
    try:
        table.data[ids[-1]] = torch.nan
        with pytest.raises(DataError, match="not finite in"):
            scan(lm, HOOK, sae, ["a good day .", "food for bees"], SMALL)
        with pytest.raises(DataError, match="not finite in"):
            scan(lm, HOOK, sae, ["a good day .", "food for bees"], ScanConfig(**{**vars(SMALL), "limit_tokens": 2}))
    finally:
        table.data[ids[-1]] = before
