"""Corpora with known firings, and tiny random models with SAEs for them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sae_persona.activations.lm import LM
from sae_persona.features.firings import Firings, Piece, TokenRows
from sae_persona.sae.model import SAE
from sae_persona.sae.sparsity import TopK
from sae_persona.types import SparseLatents

LENSED = ("Llama", "GPT2", "GPTNeoX", "Gemma2", "Gemma3Text", "Qwen3", "OPT", "Phi", "GPTJ", "Mixtral")


@dataclass(frozen=True)
class Corpus:
    """pieces of texts, and dense [n, n_latents] on their counted tokens."""

    pieces: list[Piece]
    dense: torch.Tensor

    @property
    def bounds(self) -> list[int]:
        return np.cumsum([0, *(int(piece.kept.sum()) for piece in self.pieces)]).tolist()

    def part(self, first: int, stop: int | None = None, every: int = 1) -> "Corpus":
        """Some of its pieces."""
        chosen = range(len(self.pieces))[first:stop:every]
        rows = [row for i in chosen for row in range(self.bounds[i], self.bounds[i + 1])]
        return Corpus([self.pieces[i] for i in chosen], self.dense[rows])

    @property
    def rows(self) -> TokenRows:
        return TokenRows.of(self.pieces)

    @property
    def latents(self) -> SparseLatents:
        fires = self.dense > 0
        offsets = torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0))
        return SparseLatents(self.dense[fires], fires.nonzero()[:, 1], offsets)

    @property
    def firings(self) -> Firings:
        return Firings.of(self.rows, self.latents, self.dense.shape[1])

    def entries(self):
        """Every firing in words: latent, document, position in it, act, piece, index in the piece."""
        row = 0
        for piece in self.pieces:
            for at in piece.kept.nonzero().flatten().tolist():
                for latent in self.dense[row].nonzero().flatten().tolist():
                    yield latent, piece.document, piece.first + at, float(self.dense[row, latent]), piece, at
                row += 1


@pytest.fixture(scope="session")
def make_corpus():
    """Latent 0 never fires; strengths repeat; the first token of each piece is not counted; some texts have two."""

    def make(seed: int, n: int = 20, first: int = 0, n_latents: int = 6) -> Corpus:
        draw = np.random.default_rng(seed)
        pieces = []
        for document in range(first, first + n):
            for number in range(2 if document % 4 == 1 else 1):
                ids = draw.integers(3, 99, draw.integers(1, 40)).tolist()
                kept = torch.ones(len(ids), dtype=torch.bool)
                kept[0] = False
                pieces.append(Piece(document, 40 * number, ids, kept))
        size = (sum(int(piece.kept.sum()) for piece in pieces), n_latents)
        dense = draw.integers(0, 6, size) * (draw.random(size) < 0.15)
        dense[:, 0] = 0
        return Corpus(pieces, torch.tensor(dense, dtype=torch.float32))

    return make


def random_sae(d_in: int = 16, n_latents: int = 12) -> SAE:
    torch.manual_seed(1)
    w = torch.nn.functional.normalize(torch.randn(n_latents, d_in), dim=1)
    return SAE(w, torch.zeros(n_latents), w, torch.zeros(d_in), TopK(4), {"hook": "layers.1.resid_post"})


def shaken(lm: LM) -> LM:
    """With gains and biases that are not their initial ones and zeros."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            elif "lm_head" in name or "embed" in name or "wte" in name:
                weight.mul_(10)
    return lm


@pytest.fixture
def make_tiny_lm(make_lm):
    return lambda family="Llama": shaken(make_lm(family))


@pytest.fixture(params=LENSED)
def lensed_lm(request, make_lm) -> LM:
    return shaken(make_lm(request.param))


@pytest.fixture
def tiny_sae() -> SAE:
    return random_sae()
