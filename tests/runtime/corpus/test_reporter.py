import io
import json

import pytest

from flashvec.runtime.corpus.reporter import Reporter, Tally, duration

EVENTS = [
    {"event": "plan", "shards": 4, "rows": 400, "done": 1},
    {"event": "ready", "rows_done": 100},
    {"event": "step", "shard": 1, "rows": 60, "tokens": 600, "read_s": 1.0, "embed_s": 8.0, "write_s": 1.0},
    {"event": "done", "shard": 1, "rows": 99, "errors": 1, "bytes": 5_000_000, "read": 100},
    {"event": "step", "shard": 2, "rows": 50, "tokens": 400, "read_s": 0.0, "embed_s": 10.0, "write_s": 0.0},
    {"event": "retry", "shard": 2, "message": "killed"},
]


def test_sums():
    seconds = iter([0.0, *[10.0] * 20])
    tally = Tally(lambda: next(seconds))
    for event in EVENTS:
        tally.take(event)
    assert tally.line() == (
        "2 of 4 shards, 200 of about 400 rows, 20 s left, 1 error, 10 rows/s, 100 tokens/s, model waited 10.0%, "
        "5 MB written"
    )


def test_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Reporter(False, out) as report:
        for event in EVENTS:
            report(event)
    first, last = out.getvalue().splitlines()
    assert first.startswith("1 of 4 shards") and last == "shard 2 is tried again: killed"


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with Reporter(False, out, is_terminal=True) as report:
        for event in EVENTS:
            report(event)
    assert "2 of 4 shards" in out.getvalue() and "tried again" in out.getvalue()
    assert "1 error" in out.getvalue()  # within 80 columns, where the line's end is cut


def test_events_for_machines():
    out = io.StringIO()
    with Reporter(True, out) as report:
        for event in EVENTS:
            report(event)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == EVENTS


def test_durations():
    assert [duration(s) for s in (5, 600, 36_000)] == ["5 s", "10 min", "10.0 h"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_note_is_one_line_without_orders_to_the_terminal(is_terminal):
    out = io.StringIO()
    with Reporter(False, out, is_terminal=is_terminal) as report:
        report({"event": "note", "text": "a\x1b]0;title\x07\nb.md: passed over"})
    assert r"note: a\x1b]0;title\x07\nb.md: passed over" in out.getvalue()
