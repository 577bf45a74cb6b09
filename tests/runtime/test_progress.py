import io

import pytest

from flashvec.runtime.progress import WORTH_A_BAR, Progress


@pytest.mark.parametrize(("total", "show"), [(5, False), (5, None), (WORTH_A_BAR, None)])
def test_silent_unless_asked_for_or_on_a_terminal(total, show, capsys):
    with Progress(total, show) as progress:
        progress.advance(total, 100)
    captured = capsys.readouterr()
    assert not captured.out and not captured.err


def test_shows_texts_and_rate_on_stderr(capsys):
    with Progress(5, True) as progress:
        progress.advance(5, 100)
    captured = capsys.readouterr()
    assert not captured.out and "5/5" in captured.err and "tokens/s" in captured.err


@pytest.mark.parametrize("closed", [False, True])
def test_is_silent_where_stderr_is_closed_or_missing(monkeypatch, closed):
    stderr = io.StringIO()
    stderr.close()
    monkeypatch.setattr("sys.stderr", stderr if closed else None)
    with Progress(WORTH_A_BAR, None) as progress:
        progress.advance(1, 1)
    assert progress.bar is None
