"""A shuffle buffer for activations, with a seed.

Our own, because neighbouring tokens of a text must not share a batch, and because the buffers of data loaders lose or
repeat rows when a stream is taken up again.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sae_persona.errors import ConfigError


def shuffled(chunks: Iterable[Tensor], *, buffer_tokens: int, batch_tokens: int, seed: int) -> Iterator[Tensor]:
    """Mix the rows of a stream: fill a buffer, serve a random half of it in batches, fill it again.

    chunks          [m, d] each, m of any size: how the rows are cut makes no difference
    buffer_tokens   rows held at a time; at least batch_tokens
    yields          [batch_tokens, d]. Every row comes once, except that rows left at the end which do not fill a batch
                    are dropped, unless they are all there is: then they are one short batch

    ConfigError if the sizes are impossible. The same seed and rows give the same batches.
    """
    if not 1 <= batch_tokens <= buffer_tokens:
        raise ConfigError(f"a buffer of {buffer_tokens} tokens cannot serve batches of {batch_tokens}: make it larger")
    generator = torch.Generator().manual_seed(seed)
    buffer, n, served = torch.empty(0), 0, False
    for chunk in chunks:
        if not buffer.numel():
            buffer = chunk.new_empty(buffer_tokens, chunk.shape[1])
        while len(chunk):
            taken = min(len(chunk), buffer_tokens - n)
            buffer[n : n + taken] = chunk[:taken]
            chunk, n = chunk[taken:], n + taken
            if n == buffer_tokens:
                order = torch.randperm(n, generator=generator).to(buffer.device)
                half = max(n // 2 // batch_tokens, 1) * batch_tokens
                for rows in order[:half].split(batch_tokens):
                    yield buffer[rows]
                n, served = n - half, True
                buffer[:n] = buffer[order[half:]]
    for rows in torch.randperm(n, generator=generator).to(buffer.device).split(batch_tokens):
        if len(rows) == batch_tokens or (len(rows) and not served):
            yield buffer[rows]
            served = True
