import threading
import time
from itertools import count

import pytest

from sae_persona.activations.ahead import ahead


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def settle():
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return workers()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_items_come_in_order(n):
    assert list(ahead(range(20), n)) == list(range(20))
    assert list(ahead(range(5), n, str)) == ["0", "1", "2", "3", "4"]
    assert settle() == []


def test_no_more_than_n_are_made_before_they_are_asked_for():
    made = []
    items = ahead(map(made.append, range(20)), 3)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1  # given, in the queue, in hand
    items.close()
    assert settle() == []


@pytest.mark.parametrize("n", [0, 2])
def test_an_error_comes_in_its_place(n):
    def items():
        yield 1
        raise KeyError("here")

    got = ahead(items(), n)
    assert next(got) == 1
    with pytest.raises(KeyError, match="here"):
        next(got)


def test_a_thread_ends_with_its_iterator_even_if_items_never_do():
    items = ahead(count(), 2)
    next(items)
    assert workers()
    del items
    assert settle() == []
