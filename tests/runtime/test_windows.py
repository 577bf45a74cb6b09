import dataclasses

import numpy as np
import pytest
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime import windows as windows_module
from flashvec.runtime.program import embedding_program
from flashvec.runtime.windows import FIRST_WINDOW, WINDOW, Call, read_windows, run_call, window_starts


@pytest.fixture(scope="module")
def enc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return Encoder.load(folder, dtype="float32", attention="bidirectional", pooling="mean")


def call_of(enc, texts, instructions=None, offsets=False):
    return Call(texts, instructions, 64, False, embedding_program(enc.spec, ()), offsets, False)


def test_where_windows_begin():
    assert window_starts(0, False) == [0] and window_starts(5, True) == [0, 5]
    assert window_starts(2 * WINDOW + 1, False) == [0, WINDOW, 2 * WINDOW, 2 * WINDOW + 1]
    starts = window_starts(5 * WINDOW, True)
    sizes = np.diff(starts).tolist()
    assert sizes[:4] == [FIRST_WINDOW, 2 * FIRST_WINDOW, 4 * FIRST_WINDOW, WINDOW] and starts[-1] == 5 * WINDOW
    assert max(sizes) == WINDOW


def test_windows_hold_the_texts_in_order(enc):
    texts, instructions = list(TEXTS), [f"{i}: " for i in range(len(TEXTS))]
    (whole,) = read_windows(call_of(enc, texts, instructions), enc.spec, enc.tokenizer, [0, 8])
    parts = list(read_windows(call_of(enc, texts, instructions), enc.spec, enc.tokenizer, [0, 3, 5, 8]))
    assert [w.at for w in parts] == [0, 3, 5]
    np.testing.assert_array_equal(np.concatenate([w.rows.ids for w in parts]), whole.rows.ids)
    np.testing.assert_array_equal(np.concatenate([w.rows.spans for w in parts]), whole.rows.spans)
    assert [n for w in parts for n in w.text_starts] == [3] * 8
    own = parts[1].own(1)
    assert parts[1].tokens.ids[own].tolist() == whole.tokens.ids[whole.own(4)].tolist()


def test_some_of_a_calls_texts(enc):
    call = call_of(enc, list("abcd"), ["1", "2", "3", "4"]).take(np.array([3, 1]))
    assert call.texts == ["d", "b"] and call.instructions == ["4", "2"]
    assert call_of(enc, list("abcd")).take(np.array([0])).instructions is None


def test_tokens_of_another_model_are_refused(enc):
    spec = dataclasses.replace(enc.spec, decoder=dataclasses.replace(enc.spec.decoder, vocab_size=50))
    with pytest.raises(ValueError, match="the model's embedding has 50 rows"):
        list(read_windows(call_of(enc, ["z" * 9]), spec, enc.tokenizer, [0, 1]))


def test_rows_number_the_calls_texts(enc, monkeypatch):
    monkeypatch.setattr(windows_module, "WINDOW", 3)
    rows = [d.rows for d in run_call(call_of(enc, list(TEXTS)), enc.spec, enc.tokenizer, enc.engine, 10)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(8)) and set(rows[0].tolist()) <= {0, 1, 2}
