"""Where batches come from, and from where they go on."""

import pytest
import torch

from sae_persona.errors import DataError
from sae_persona.sae.feed import ONLY, Feed


def batches(n=5):
    return [torch.full((2, 3), float(i)) for i in range(n)]


def numbers(feed, n=None):
    found = []
    for batch in feed:
        found.append(int(batch[ONLY][0, 0]))
        if n is not None and len(found) == n:
            break
    return found


def test_each_batch_once_or_over_and_over():
    assert numbers(Feed(batches(), None)) == [0, 1, 2, 3, 4]
    assert numbers(Feed(batches(), 7)) == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(DataError, match="ended after 5 of 7 steps"):
        numbers(Feed(iter(batches()), 7))


@pytest.mark.parametrize("done", [0, 1, 5, 6, 11])
def test_it_goes_on_where_it_was(done):
    whole = numbers(Feed(batches(), 12))
    first = Feed(batches(), 12)
    assert [int(next(first)[ONLY][0, 0]) for _ in range(done)] == whole[:done]
    rest = Feed(batches(), 12)
    rest.resume(first.snapshot())
    assert numbers(rest) == whole[done:]


def test_what_is_beyond_the_last_step_was_not_trained_on():
    feed = Feed(batches(), 2)
    assert numbers(feed) == [0, 1]
    assert [int(batch[ONLY][0, 0]) for batch in feed.beyond(3)] == [2, 3]
    assert len(feed.beyond(100)) == 1 and feed.beyond(100) == []


def test_another_number_of_ranks_goes_on_near_it():
    feeds = [Feed(batches(), 12) for _ in range(2)]
    for feed in feeds:
        numbers(feed, 3)
    alone = Feed(batches(), 12)
    alone.join([feed.snapshot() for feed in feeds], 0, 1)
    assert alone.served == 3 and numbers(alone)[0] == 3


def test_batches_of_several_names_are_checked_each():
    with pytest.raises(DataError, match=r"batch 1 must be floats \[n, 3\], got torch.float32 \[2, 4\]"):
        list(Feed([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4)}], None))
