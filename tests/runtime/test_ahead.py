import threading

import pytest

from flashvec.runtime.ahead import ahead


def test_order_is_kept_and_only_one_item_waits():
    made, used, most = [], [], 0

    def items():
        for i in range(20):
            made.append(i)
            yield i

    for item in ahead(items()):
        used.append(item)
        most = max(most, len(made) - len(used))
    assert used == list(range(20)) and most <= 1


def test_the_next_item_is_made_while_this_one_is_used():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    stream = ahead(items())
    assert next(stream) == 1
    assert second.wait(10)  # nobody has asked for it yet
    assert list(stream) == [2]


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        yield 2
        raise KeyError("third")

    stream = ahead(items())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(stream)
    assert next(stream, None) is None


def test_closed_early_it_closes_its_source_and_leaves_no_thread():
    closed = threading.Event()

    def items():
        try:
            yield from range(100)
        finally:
            closed.set()

    before = threading.enumerate()  # threads of other tests may end meanwhile
    stream = ahead(items())
    assert next(stream) == 0
    stream.close()
    assert closed.is_set() and set(threading.enumerate()) <= set(before)


def test_empty():
    assert list(ahead([])) == []
