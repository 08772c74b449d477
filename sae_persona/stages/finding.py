"""Search the features of a run: by words, example text, direction, persona and numbers, and all of these at once."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae_persona.activations.dialogues import tokenize
from sae_persona.activations.harvest import harvest
from sae_persona.activations.lm import LM
from sae_persona.activations.sequences import kept
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.errors import DataError, RunError
from sae_persona.features.directions import Directions
from sae_persona.features.files import reading_h5
from sae_persona.features.passage import Surprise, surprise
from sae_persona.features.pooled import Pooled, to_csr
from sae_persona.features.query import Hit, Query, within
from sae_persona.features.search import RANKED, find_words, having_words, quoted
from sae_persona.features.stats import LatentStats
from sae_persona.runs import Run
from sae_persona.sae.model import SAE
from sae_persona.stages.indexes import open_dictionary, open_directions
from sae_persona.stages.pipeline import mean_difference, open_ranking
from sae_persona.stages.training import open_model, open_sae

_SCORES = ("cosine", "surprise", "times", "z", "auroc", "p_max_t", "words")


class Search:
    """A run, ready to be searched again and again. What a query needs is opened when the first one does.

    say   hears when an index is made, or when an answer is not all that was asked for

    RunError if the run is not measured; other errors as each part's.
    """

    def __init__(
        self, run: Run | str | Path, *, device: str = "cpu", say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.run = run if isinstance(run, Run) else Run.open(run)
        self.device, self.say = device, say
        self.dictionary = open_dictionary(self.run, say)

    @cached_property
    def directions(self) -> Directions:
        return open_directions(self.run, self.say)

    @cached_property
    def _stats(self) -> LatentStats:
        with reading_h5(self.run.latents, "latents") as file:
            return LatentStats.from_h5(file["stats"])

    @cached_property
    def _model(self) -> tuple[LM, SAE]:
        lm = open_model(self.run, device=self.device)
        return lm, open_sae(self.run, lm)

    def find(self, query: Query) -> list[Hit]:
        """Latents that satisfy all of the query, in its order: at most its limit, perhaps none.

        ConfigError, DataError or RunError for what cannot be asked: a query that does not parse, a latent that does
        not exist, a vector of another width, a persona that has no ranking.
        """
        words = quoted(query.words) if query.plain and query.words else query.words
        direction = self.direction(query)
        fired = None if query.text is None else self.passage(query.text)
        rankings = self._rankings(query)
        allowed, free = self._by_numbers(query), query.by == "words"
        if fired is not None:
            allowed &= np.isin(np.arange(len(allowed)), fired.latents)
        if query.persona is not None:
            allowed &= np.isin(np.arange(len(allowed)), list(rankings[0]))
        if query.auroc != (None, None):
            good = {latent for rows in rankings for latent, row in rows.items() if within(_auroc(row), query.auroc)}
            allowed &= np.isin(np.arange(len(allowed)), list(good))
        if words is not None and not free:
            allowed &= having_words(self.dictionary, words)
        if direction is not None and query.cosine != (None, None):
            allowed &= within(self.directions.cosines(direction), query.cosine)
        scores: dict[str, dict[int, float]] = {name: {} for name in _SCORES}
        if free and words is not None:
            found = find_words(self.dictionary, words, query.limit, None if allowed.all() else allowed)
            if found.cut:
                self.say(f"more than {RANKED} latents have these words: only the first {RANKED} were put in order")
            order = found.latents
            scores["words"] = dict(zip(order.tolist(), found.score.tolist(), strict=True))
        else:
            order = self._ordered(query, allowed, direction, fired, rankings)[: query.limit]
        if fired is not None:
            for name in ("surprise", "times"):
                scores[name] = dict(zip(fired.latents.tolist(), getattr(fired, name).tolist(), strict=True))
        if direction is not None and len(order):
            cosines = self.directions.cosines(direction, order)
            scores["cosine"] = dict(zip(order.tolist(), cosines.tolist(), strict=True))
        return self._hits(order, words, scores, rankings if query.persona or query.auroc != (None, None) else [])

    def direction(self, query: Query) -> Tensor | None:
        """What a query's directions are compared with: [d] fp32, or None. DataError for a latent that is not there."""
        if query.like is not None:
            if not 0 <= query.like < self.dictionary.n_latents:
                last = self.dictionary.n_latents - 1
                raise DataError(f"latent {query.like} does not exist: {self.run.path} has latents 0 to {last}")
            return self.directions.rows[query.like]
        if query.persona_vector is not None:
            ranked = self.run.ranking(query.persona_vector).is_file()
            pool = Ranking.load(self.run.ranking(query.persona_vector)).config["pool"] if ranked else "pre"
            return mean_difference(Pooled.load(self.run.examples), query.persona_vector, pool)
        return query.vector

    @torch.no_grad()
    def passage(self, text: str) -> Surprise:
        """The latents that fire on a text, the most surprising first. DataError for a text without a token."""
        lm, sae = self._model
        config = self.run.stage("measure")["config"]
        whole = tokenize(lm, text)
        tokens = tokenize(lm, text, context_size=config["context_size"])
        if len(tokens.ids) < len(whole.ids):
            self.say(f"only the first {len(tokens.ids)} of the text's {len(whole.ids)} tokens are read")
        counted = kept(lm, tokens).numpy()
        if not counted.any():
            raise DataError("the text has no token in it: give some words")
        ((_, x),) = harvest(lm, sae.hook, [tokens], 1)
        return surprise(to_csr(sae.encode(x), sae.n_latents)[counted], self._stats)

    def _rankings(self, query: Query) -> list[dict[int, RankedLatent]]:
        """Rows by latent, of the persona's ranking or, for a range of AUROCs alone, of all; none if none is needed."""
        if query.persona is not None:
            found = [open_ranking(self.run, query.persona)]
        elif query.auroc != (None, None):
            found = [Ranking.load(path) for path in sorted((self.run.path / "rankings").glob("*.json"))]
            if not found:
                raise RunError(f"{self.run.path} has no rankings: run `sae-persona rank {self.run.path} PERSONA` first")
        else:
            found = []
        return [{row.latent: row for row in ranking} for ranking in found]

    def _by_numbers(self, query: Query) -> np.ndarray:
        """Which latents' rate is within bounds: bool [n_latents]. A latent is not like itself."""
        rate = self.dictionary.numbers["firing_rate"]
        allowed = within(rate, query.rate)
        if query.dead is not None:
            allowed &= (rate == 0) == query.dead
        if query.like is not None:
            allowed[query.like] = False
        return allowed

    def _ordered(
        self,
        query: Query,
        allowed: np.ndarray,
        direction: Tensor | None,
        fired: Surprise | None,
        rankings: list[dict[int, RankedLatent]],
    ) -> np.ndarray:
        """The allowed latents in any order but that of words."""
        if query.by == "direction" and direction is not None:
            return self.directions.top(direction, query.limit, allowed)[0]
        if query.by == "text" and fired is not None:
            order = fired.latents
        elif query.by == "persona":
            order = np.array(list(rankings[0]), np.int64)
        else:
            order = np.argsort(-self.dictionary.numbers["firing_rate"], kind="stable")
        return order[allowed[order]]

    def _hits(
        self,
        order: np.ndarray,
        words: str | None,
        scores: dict[str, dict[int, float]],
        rankings: list[dict[int, RankedLatent]],
    ) -> list[Hit]:
        numbers = self.dictionary.numbers
        hits = []
        for entry in self.dictionary.entries(order, words):
            i = entry.latent
            found = {name: by[i] for name, by in scores.items() if i in by}
            rows = [rows[i] for rows in rankings if i in rows]
            if rows:
                row = max(rows, key=lambda row: abs(_auroc(row) - 0.5))
                found |= {"z": row.z, "auroc": _auroc(row), "p_max_t": row.p_max_t}
            hits.append(Hit(entry, float(numbers["firing_rate"][i]), float(numbers["p999"][i]), found))
        return hits


def _auroc(row: RankedLatent) -> float:
    return float(row.held_out_auroc.value)
