from hypothesis import given
from hypothesis import strategies as st

from flashvec.runtime.buckets import sequence_bucket, token_bucket


@given(st.integers(1, 1 << 22))
def test_a_bucket_holds_its_tokens_and_is_no_coarser_than_a_quarter(n):
    bucket = token_bucket(n)
    assert n <= bucket and bucket % 64 == 0 and token_bucket(bucket) == bucket
    assert bucket - n < max(64, 0.25 * n)
    assert token_bucket(n + 1) >= bucket


def test_usual_budgets_are_buckets():
    for budget in (64, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536):
        assert token_bucket(budget) == budget
    buckets = sorted({token_bucket(n) for n in range(1, 4097)})
    assert buckets[:6] == [64, 128, 192, 256, 320, 384] and len(buckets) == 20


def test_sequence_buckets_are_powers_of_two():
    assert [sequence_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
