"""Make the next item while the caller works on this one."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The items in their order, each drawn on a thread of its own while the one before it is being used.

    Never more than one item waits. What drawing an item raises is raised here, in its place; closing the generator
    waits for the item that is being made, then closes `items`.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="flashvec-ahead") as thread:
        try:
            coming = thread.submit(next, source, _END)
            while (item := coming.result()) is not _END:
                coming = thread.submit(next, source, _END)
                yield item  # type: ignore[misc]  # the sentinel is no T, and was just ruled out
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                thread.submit(close)
