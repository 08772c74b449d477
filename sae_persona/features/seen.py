"""When each latent fired first and last: where in the corpus."""

from typing import Any, Self

import h5py
import torch
from torch import Tensor

from sae_persona.errors import DataError
from sae_persona.features.firings import POSITION_BITS, Firings

_NEVER = 2**63 - 1


class Seen:
    """The first and the last token of the corpus on which each latent fires: mergeable in any order.

    first, last   [n_latents] int64   places: document << POSITION_BITS | position
    """

    def __init__(self, n_latents: int, device: str | torch.device = "cpu") -> None:
        self.first = torch.full((n_latents,), _NEVER, dtype=torch.int64, device=device)
        self.last = torch.full((n_latents,), -1, dtype=torch.int64, device=device)

    def update(self, firings: Firings) -> None:
        """Add the firings on some tokens."""
        latent, place = firings.latent.to(self.first.device), firings.place.to(self.first.device)
        self.first.scatter_reduce_(0, latent, place, "amin")
        self.last.scatter_reduce_(0, latent, place, "amax")

    def merge(self, other: "Seen") -> None:
        """Add what another process has seen of the corpus."""
        if len(other.first) != len(self.first):
            raise DataError(f"{len(other.first)} latents cannot be merged into {len(self.first)}")
        self.first = torch.minimum(self.first, other.first.to(self.first.device))
        self.last = torch.maximum(self.last, other.last.to(self.last.device))

    def of(self, latent: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(document, position) of the first and of the last token on which it fired. None if it never did."""
        if int(self.last[latent]) < 0:
            return None
        return _split(self.first[latent]), _split(self.last[latent])

    def to_h5(self, group: h5py.Group) -> None:
        """Write into an empty HDF5 group, documents and positions apart; -1 where a latent never fired."""
        for name, place in (("first", self.first.where(self.last >= 0, -1)), ("last", self.last)):
            document = place >> POSITION_BITS  # of -1 it is -1
            position = (place & ((1 << POSITION_BITS) - 1)).where(place >= 0, -1)
            group[f"{name}_document"], group[f"{name}_position"] = document.cpu().numpy(), position.cpu().numpy()

    @classmethod
    def from_h5(cls, group: Any) -> Self:
        """Read what ``to_h5`` wrote. KeyError if a part is missing."""
        found = cls(0)
        places = []
        for name in ("first", "last"):
            document, position = (torch.from_numpy(group[f"{name}_{part}"][:]) for part in ("document", "position"))
            places.append((document << POSITION_BITS | position).where(document >= 0, -1))
        found.first, found.last = places[0].where(places[0] >= 0, _NEVER), places[1]
        return found


def _split(place: Tensor) -> tuple[int, int]:
    return int(place) >> POSITION_BITS, int(place) & ((1 << POSITION_BITS) - 1)
