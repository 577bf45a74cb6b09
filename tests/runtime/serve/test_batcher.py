"""Requests embedded together: each gets its own vectors, none waits for all of another, failures stay apart."""

import asyncio

import numpy as np
import pytest

from flashvec.runtime.serve.batcher import Batcher, Busy


class Model:
    """A vector is a text's number; remembers the rounds it was asked for."""

    def __init__(self):
        self.rounds = []

    def __call__(self, texts, dimensions):
        self.rounds.append(list(texts))
        if "bad" in texts:
            raise ValueError("a bad text")
        return np.array([[int(text)] * (dimensions or 4) for text in texts], dtype=np.float32)


def counts(texts):
    return np.full(len(texts), 10)


def run(scenario, **options):
    model = Model()

    async def main():
        batcher = Batcher(model, **{"batch_tokens": 30, "max_waiting_tokens": 2000} | options)
        try:
            return await scenario(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main()), model


async def ask(batcher, *texts, dimensions=None):
    return await batcher.submit(texts, counts(texts), dimensions)


def test_each_request_gets_its_own_vectors_in_rounds_of_the_budget():
    async def scenario(batcher):
        return await asyncio.gather(ask(batcher, "1"), ask(batcher, "2", "3"), ask(batcher, "4"), ask(batcher, "5"))

    found, model = run(scenario)
    assert [vectors[:, 0].tolist() for vectors in found] == [[1], [2, 3], [4], [5]]
    assert model.rounds == [["1", "2", "3"], ["4", "5"]]


def test_a_large_request_lets_small_ones_pass():
    async def scenario(batcher):
        large = asyncio.create_task(ask(batcher, *map(str, range(100))))
        await asyncio.sleep(0)
        small = await ask(batcher, "7")
        assert not large.done()
        return small, await large

    (small, large), model = run(scenario)
    assert small[:, 0].tolist() == [7] and large[:, 0].tolist() == list(range(100))
    assert model.rounds[1][0] == "7" and all(len(texts) <= 3 for texts in model.rounds)


def test_a_text_beyond_the_budget_runs_alone():
    async def scenario(batcher):
        return await asyncio.gather(batcher.submit(["1"], np.array([500]), None), ask(batcher, "2"))

    found, model = run(scenario)
    assert [vectors[0, 0] for vectors in found] == [1, 2] and model.rounds == [["1"], ["2"]]


def test_dimensions_are_not_mixed():
    async def scenario(batcher):
        return await asyncio.gather(ask(batcher, "1", dimensions=2), ask(batcher, "2"), ask(batcher, "3", dimensions=2))

    found, model = run(scenario)
    assert [vectors.shape[1] for vectors in found] == [2, 4, 2] and model.rounds == [["1", "3"], ["2"]]


def test_a_failure_reaches_its_own_request_alone():
    async def scenario(batcher):
        return await asyncio.gather(ask(batcher, "1"), ask(batcher, "bad"), ask(batcher, "3"), return_exceptions=True)

    (first, failed, third), _ = run(scenario)
    assert first[0, 0] == 1 and third[0, 0] == 3 and isinstance(failed, ValueError)


def test_too_much_waiting_is_turned_away_and_what_waits_is_not_lost():
    async def scenario(batcher):
        tasks = [asyncio.create_task(ask(batcher, str(i))) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Busy) as busy:
            await ask(batcher, "9")
        assert 1 <= busy.value.retry_after_s <= 60
        found = await asyncio.gather(*tasks)
        assert batcher.waiting_tokens == 0
        return found

    found, _ = run(scenario, max_waiting_tokens=50)
    assert [vectors[0, 0] for vectors in found] == [0, 1, 2, 3, 4]


def test_what_nobody_waits_for_is_not_embedded():
    async def scenario(batcher):
        first = asyncio.create_task(ask(batcher, "1", "1", "1"))
        left = asyncio.create_task(ask(batcher, "2"))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting_tokens == 0  # at once: others could be turned away for it
        last = await ask(batcher, "3")
        assert batcher.waiting_tokens == 0
        return await first, last

    _, model = run(scenario)
    assert model.rounds == [["1", "1", "1"], ["3"]]


def test_small_rounds_say_nothing_of_the_speed():
    async def scenario(batcher):
        await ask(batcher, "1")
        assert batcher.tokens_per_s == 0
        await ask(batcher, "1", "2", "3")
        assert batcher.tokens_per_s > 0

    run(scenario)


def test_what_would_wait_too_long_is_turned_away_once_the_speed_is_known():
    async def scenario(batcher):
        first = asyncio.create_task(ask(batcher, *map(str, range(60))))  # 600 tokens, no speed known: taken
        await asyncio.sleep(0)
        batcher.tokens_per_s = 100.0
        with pytest.raises(Busy):
            await ask(batcher, *map(str, range(50)))
        small = await ask(batcher, "1")
        return await first, small

    (large, small), _ = run(scenario, max_waiting_s=10.0)
    assert len(large) == 60 and len(small) == 1
