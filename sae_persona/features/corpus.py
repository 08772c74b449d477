"""The dictionary pass: one reading of a corpus, and what every latent does in it.

texts ─► groups ─► model ─► SAE ─► firings ─► statistics, first and last, contexts, sampled contexts, co-firing
         a thread, ahead           sorted     all of it on the model's device
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sae_persona.activations.groups import Group
from sae_persona.activations.harvest import is_finite
from sae_persona.activations.lm import LM
from sae_persona.activations.sequences import Place, kept
from sae_persona.activations.stream import FromModel, from_model
from sae_persona.activations.texts import read_texts
from sae_persona.features.firings import Piece, TokenRows
from sae_persona.features.scan import Scan, ScanConfig, Share
from sae_persona.sae.encoder import Encoder
from sae_persona.sae.model import SAE
from sae_persona.types import HookPoint

ROWS = 2**17  # tokens whose latents are added at once


@torch.no_grad()
def scan(
    lm: LM,
    hook: HookPoint,
    sae: SAE,
    texts: Any,
    config: ScanConfig | None = None,
    *,
    share: Share | None = None,
    on_rows: Callable[[int], object] | None = None,
) -> Scan:
    """Run the language model and the SAE over ``texts`` (whatever ``read_texts`` takes) once.

    share     of the texts; scans of all shares merge to that of the whole, with the texts numbered as there
    on_rows   called with a number of tokens, as they have been counted

    Errors as `measure`; DataError for activations that are not finite.
    """
    config, share = config or ScanConfig(), share or Share()
    sae.check_width(lm.d_model)
    texts = read_texts(texts).share(share.rank, share.world)
    source = from_model(lm, [hook], texts, config.streaming)
    about = {"model": lm.config_hash, "hook": str(hook), "config": asdict(config), "shares": [str(share)]}
    found = Scan(sae.n_latents, config, lm.device, about)
    limit = None if config.limit_tokens is None else -(-config.limit_tokens // share.world)
    encode = Encoder(sae)
    with ThreadPoolExecutor(1) as beside:  # hashing gigabytes of weights takes seconds, and no GPU
        fingerprint = beside.submit(lambda: sae.fingerprint)
        for rows, x in located(source, hook, limit):
            for part, some in rows.parts(ROWS):
                found.update(some, encode(x[part]))
                if on_rows is not None:
                    on_rows(some.n)
        found.about["sae"] = fingerprint.result()
    found.cofiring.settle()
    return found


def located(source: FromModel, hook: HookPoint, limit: int | None = None) -> Iterator[tuple[TokenRows, Tensor]]:
    """Of each group of texts its activations [n, d_in], on the model's device, and where they stand, on the CPU.

    limit   rows after which it ends, at the end of a sequence
    """
    lm, which, texts = source.lm, source.layout.which, source.texts

    def about(group: Group) -> TokenRows:
        each = zip(group.places, group.sequences, strict=True)
        return TokenRows.of(
            [Piece(texts.number(place.text), one.first, one.ids, kept(lm, one, which)) for place, one in each]
        )

    left = limit
    for group, rows, found in source.read(Place(), about):
        x = found[hook]
        if left is not None and left <= group.n:
            n = next(bound for bound in group.bounds if bound >= left)
            source.check(group, {hook: is_finite(x)})  # the source does so only as it goes on
            yield next(part for _, part in rows.parts(n)), x[:n]
            return
        yield rows, x
        left = None if left is None else left - group.n
