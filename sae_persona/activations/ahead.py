"""Work of the CPU done beside that of the model: a thread that is a few items ahead."""

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
PATIENCE = 30  # seconds for an item in hand, when nobody wants it any longer
POLL = 0.1  # seconds between two looks at whether anyone still wants the items


def ahead(items: Iterable[T], n: int, finish: Callable[[T], U] | None = None) -> Iterator[T | U]:
    """The items in their order, up to ``n`` of them made in a thread before they are asked for; 0: in no thread.

    finish   done to each item in the thread, too

    An error comes where its item would have come. The thread ends with the iterator.
    """
    made = items if finish is None else map(finish, items)
    return iter(made) if n == 0 else _from_thread(made, n)


def _from_thread(items: Iterable[T], n: int) -> Iterator[T]:
    queue: Queue[tuple[bool, T | BaseException | None]] = Queue(maxsize=n)
    done = threading.Event()

    def put(what: tuple[bool, T | BaseException | None]) -> None:
        while not done.is_set():
            try:
                return queue.put(what, timeout=POLL)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if done.is_set():
                    return
            put((False, None))
        except BaseException as error:  # noqa: BLE001 whatever it is, it belongs to who asks for the items
            put((False, error))

    thread = threading.Thread(target=work, daemon=True, name="ahead")
    thread.start()
    try:
        while True:
            there, item = queue.get()
            if not there:
                if item is not None:
                    raise item  # pyright: ignore[reportGeneralTypeIssues]
                return
            yield item  # pyright: ignore[reportReturnType]
    finally:
        done.set()
        thread.join(timeout=PATIENCE)
