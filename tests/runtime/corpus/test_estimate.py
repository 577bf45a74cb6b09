import pytest
from tiny_models import tiny_checkpoint

from flashvec.runtime.corpus.estimate import estimate_job, estimate_lines
from flashvec.runtime.corpus.settings import JobSettings


def test_an_estimate_is_near_the_truth(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "a.txt").write_text("".join(f"the cat sleeps {i % 750:04d}\n" for i in range(1000)))
    settings = JobSettings(precision="float16", max_length=4)
    found = estimate_job([tmp_path / "a.txt"], model=tmp_path / "model", settings=settings)
    assert found.rows == pytest.approx(1000, rel=0.02) and found.tokens == pytest.approx(4 * found.rows)
    assert found.duplicate_share == pytest.approx(0.25) and found.longest > 4
    assert found.bytes_out == found.rows * (32 * 2 + 32) and found.seconds > 0
    assert any("25.0% of the sampled rows" in line for line in estimate_lines(found))
