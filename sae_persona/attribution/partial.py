"""What is known of each example beside the persona, and may explain a latent instead of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_persona.errors import ConfigError, DataError


@dataclass(frozen=True)
class Covariates:
    """What is known of each example beside the persona.

    values  [examples, c]   any real numbers; NaN where one is not known
    names   one a column; "topic=food" is one of the columns of "topic"
    """

    names: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise DataError(f"covariates are [examples, {len(self.names)}], one a name: got {self.values.shape}")

    def named(self, given: Sequence[str]) -> "Covariates":
        """The columns of the covariates ``given``. ConfigError for a name that there is not."""
        whole = [name.partition("=")[0] for name in self.names]
        known = dict.fromkeys([*whole, *self.names])
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"no covariate is named {', '.join(unknown)}: there are {', '.join(known) or 'none'}")
        here = [i for i, name in enumerate(self.names) if name in given or whole[i] in given]
        return Covariates(tuple(self.names[i] for i in here), self.values[:, here])
