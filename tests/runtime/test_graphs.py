"""Recorded packs, on a stand-in for a GPU whose recordings run again what was recorded, on the same tensors."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_accelerator import FakeAccelerator, attention_by_definition
from family_models import models, texts_of

from flashvec.kernels.schedule import TileClass
from flashvec.runtime import decoder as decoder_module
from flashvec.runtime import graphs as graphs_module
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.graphs import Graphs, most_rows
from flashvec.runtime.pooling import DenseHead
from flashvec.runtime.program import embedding_program
from flashvec.runtime.spec import ModelSpec


@pytest.fixture(autouse=True)
def _attention_that_reads_only_tensors(monkeypatch):
    """As a kernel does: what the host knew of the batch that was recorded is no use for the next one."""
    monkeypatch.setattr(decoder_module, "attention", attention_by_definition)


def rows_of(lengths, seed=0):
    texts = texts_of([100, *lengths])[1:]
    lengths = np.array(lengths, dtype=np.int32)
    spans = np.stack([lengths // 3, lengths], 1).astype(np.int64)
    return TokenRows(np.concatenate(texts), lengths, spans)


def alone(program, decoder, rows):
    from flashvec.runtime.batches import host_batch

    return program.run(decoder, host_batch(rows, decoder.row_plan(len(rows.ids))))


def setup(family="llama", **settings):
    _, decoder = models(family, "bidirectional")
    spec = ModelSpec(decoder.spec, "bidirectional", settings.pop("pooling", ("mean",)), "hf", **settings)
    accelerator = FakeAccelerator()
    return decoder, spec, accelerator, Graphs(decoder, accelerator, largest=4096)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "max", "last", "cls"])
def test_a_recording_serves_every_batch_of_its_bucket(pooling):
    decoder, spec, accelerator, graphs = setup(pooling=(pooling,))
    program = embedding_program(spec, ())
    # from one text that fills all rows to as many as there may be; padding sequences then begin past the last row
    for lengths in ([9, 5, 40, 2], [61, 1, 1, 1], [20, 20, 20], [16, 16, 16, 16], [64 - 2, 1, 1], [1, 1, 1, 1]):
        rows = rows_of(lengths)
        (got,) = graphs.run(program, rows, 64, ())
        (want,) = alone(program, decoder, rows)
        assert len(got) == 4
        torch.testing.assert_close(got[: len(lengths)], want, rtol=0, atol=1e-5)
        assert not torch.equal(want[0], want[-1])
    assert (accelerator.count("record"), accelerator.count("replay"), len(graphs)) == (1, 5, 1)


@pytest.mark.parametrize("family", ["gemma3_text", "ministral3", "qwen3"])
def test_nothing_of_a_family_depends_on_the_recorded_batch(family):
    """Windows, several rotary tables, and queries scaled by position."""
    decoder, spec, accelerator, graphs = setup(family)
    program = embedding_program(spec, (), states=True)
    for lengths in ([3, 2], [100, 28], [64, 1]):
        rows = rows_of(lengths)
        got, want = graphs.run(program, rows, 128, ()), alone(program, decoder, rows)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(got[1][: sum(lengths)], want[1][: sum(lengths)], rtol=0, atol=1e-4)
    assert accelerator.count("replay") == 2


def test_would_notice_a_program_that_remembers_its_batch():
    decoder, spec, _, graphs = setup()
    program = embedding_program(spec, ())
    remembering = replace(
        program, run=lambda decoder, batch: (program.run(decoder, batch)[0] * batch.schedule.lengths[0],)
    )
    for lengths in ([9, 5], [9, 5], [20, 5]):
        got = graphs.run(remembering, rows_of(lengths), 64, ())[0]
    assert not torch.allclose(got, alone(program, decoder, rows_of([20, 5]))[0] * 20, atol=1e-3)


def test_results_outlive_the_next_replay():
    decoder, spec, _, graphs = setup()
    program, rows = embedding_program(spec, ()), rows_of([9, 5])
    first, second, third = (graphs.run(program, rows, size, ())[0] for size in (64, 64, 64))
    other = [graphs.run(program, rows, 128, ())[0] for _ in range(3)]
    for got in (first, second, third, *other):
        torch.testing.assert_close(got, alone(program, decoder, rows)[0], rtol=0, atol=1e-5)


def test_longer_texts_replace_the_rotary_tables_a_recording_reads(monkeypatch):
    decoder, spec, _, graphs = setup()
    monkeypatch.setattr(decoder, "_tables", [])
    program, rows = embedding_program(spec, ()), rows_of([9, 5])
    for _ in range(2):
        graphs.run(program, rows, 64, ())
    (entry,) = graphs._entries.values()
    held = decoder._tables
    alone(program, decoder, rows_of([3000]))
    assert decoder._tables is not held
    assert [t.data_ptr() for t in entry.tables] == [t.data_ptr() for pair in held for t in pair]


def test_tile_lists_that_kernels_ask_for_become_part_of_the_buffers(monkeypatch):
    short, long = TileClass(64, 0, 64), TileClass(128, 64)
    seen = []

    def asking(q, k, v, schedule, **facts):
        seen.append([schedule.tiles(c)[:, 3].tolist() for c in (short, long)])
        return attention_by_definition(q, k, v, schedule, **facts)

    monkeypatch.setattr(decoder_module, "attention", asking)
    _, spec, accelerator, graphs = setup()
    program = embedding_program(spec, ())
    for lengths in ([100, 20], [9, 9], [5, 80]):
        seen.clear()
        graphs.run(program, rows_of(lengths), 128, ())
        own = [[i for i, n in enumerate(lengths) if n <= 64], [i for i, n in enumerate(lengths) if n > 64]]
        assert [[i for i in tiles if i >= 0] for tiles in seen[-1]] == own
        assert len(seen[-1][0]) == 128 // 64 + 2  # as many as any such batch could need
    # the first run showed the classes, the second was the warm-up on whole buffers, the third was recorded
    assert accelerator.count("record") == 1 and accelerator.count("replay") == 1


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(graphs_module, "KEPT", 3)
    _, spec, accelerator, graphs = setup()
    program, rows = embedding_program(spec, ()), rows_of([4])
    for size in (64, 128, 192, 64, 256, 64, 128):  # 128 is the least recently used when 256 comes
        graphs.run(program, rows, size, ())
    assert len(graphs) == 3
    assert accelerator.count("record") == 1  # 64, at its second coming; 128 came anew


def test_programs_do_not_share_recordings():
    decoder, spec, accelerator, graphs = setup()
    rows = rows_of([9, 5])
    for normalize in (True, False, True, False):
        program = embedding_program(spec, (), normalize=normalize)
        got = graphs.run(program, rows, 64, ())[0]
        torch.testing.assert_close(got, alone(program, decoder, rows)[0], rtol=0, atol=1e-5)
    assert len(graphs) == 2 and accelerator.count("record") == 2


def test_where_recording_fails_packs_run_and_one_notice_says_so(caplog):
    decoder, spec, accelerator, graphs = setup()
    accelerator.refuses = RuntimeError("operation not permitted when stream is capturing\nlong story")
    program, rows = embedding_program(spec, ()), rows_of([9, 5])
    with caplog.at_level(logging.WARNING, "flashvec"):
        for size in (64, 64, 128, 128, 64):
            if graphs.take(size):
                got = graphs.run(program, rows, size, ())[0]
                torch.testing.assert_close(got, alone(program, decoder, rows)[0], rtol=0, atol=1e-5)
    assert accelerator.count("record") == 1 and not graphs.take(64)
    (record,) = caplog.records
    assert "CUDA graphs are off" in record.getMessage() and "long story" not in record.getMessage()


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_recording_that_runs_out_of_memory_says_so_and_may_be_tried_again(ends_badly, caplog):
    decoder, spec, accelerator, graphs = setup()
    program, rows = embedding_program(spec, ()), rows_of([9, 5])
    graphs.run(program, rows, 64, ())
    accelerator.refuses = torch.OutOfMemoryError("CUDA out of memory (injected)")
    if ends_badly:  # as torch's own error at the end of a recording that an error has broken
        refused, accelerator.refuses = accelerator.refuses, RuntimeError("capture failed")
        accelerator.refuses.__context__ = refused
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        graphs.run(program, rows, 64, ())
    accelerator.refuses = None
    assert graphs.take(64) and not caplog.records
    got = graphs.run(program, rows, 64, ())[0]
    torch.testing.assert_close(got, alone(program, decoder, rows)[0], rtol=0, atol=1e-5)
    assert (accelerator.count("record"), accelerator.count("replay")) == (2, 1)


def test_an_error_that_is_no_refusal_is_not_hidden():
    _, spec, accelerator, graphs = setup()
    accelerator.refuses = TypeError("a bug")
    program = embedding_program(spec, ())
    graphs.run(program, rows_of([9]), 64, ())
    with pytest.raises(TypeError, match="a bug"):
        graphs.run(program, rows_of([9]), 64, ())


def shaped(layers, hidden, mlp, heads, kv_heads, head_size):
    """A decoder of these sizes without memory behind its weights."""
    from flashvec.runtime.decoder import Layer

    def weight(rows, columns):
        return torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")

    layer = Layer(
        None, weight((heads + 2 * kv_heads) * head_size, hidden), None, None, None, weight(hidden, heads * head_size),
        None, None, None, weight(2 * mlp, hidden), None, weight(hidden, mlp), None, None,
    )  # fmt: skip
    decoder = Decoder.__new__(Decoder)
    decoder.layers = [layer] * layers
    return decoder


def test_graphs_are_for_small_models_and_small_packs():
    smollm2_135m = shaped(30, 576, 1536, 9, 3, 64)
    qwen3_600m = shaped(28, 1024, 3072, 16, 8, 128)
    llama_1b = shaped(16, 2048, 8192, 32, 8, 64)
    llama_8b = shaped(32, 4096, 14336, 32, 8, 128)
    sizes = [most_rows(d) for d in (smollm2_135m, qwen3_600m, llama_1b, llama_8b)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4096 and sizes[-1] == 0
    assert 512 <= sizes[1] <= 2048 and 128 <= sizes[2] <= 1024


def test_a_head_that_is_added_later_is_no_part_of_earlier_recordings():
    """As `Encoder.whiten` adds one: the vectors keep their width, and nothing else would tell."""
    decoder, spec, accelerator, graphs = setup()
    rows, width = rows_of([9, 5]), decoder.spec.hidden_size
    head = DenseHead(torch.randn(width, width, generator=torch.Generator().manual_seed(0)), None, "identity")
    for heads in ((), (head,)):
        program = embedding_program(spec, heads)
        for _ in range(3):
            (got,) = graphs.run(program, rows, 64, ())
            torch.testing.assert_close(got, alone(program, decoder, rows)[0], rtol=0, atol=1e-5)
    assert accelerator.count("record") == 2


def test_a_caller_in_inference_mode_changes_nothing_for_later_ones():
    decoder, spec, _, graphs = setup()
    program, rows = embedding_program(spec, ()), rows_of([9, 5])
    with torch.inference_mode():
        graphs.run(program, rows, 64, ())
    for _ in range(2):
        torch.testing.assert_close(graphs.run(program, rows, 64, ())[0], alone(program, decoder, rows)[0])


def test_what_one_bucket_learns_of_tile_lists_the_next_one_knows(monkeypatch):
    _, spec, accelerator, graphs = setup()
    asked = TileClass(16, 0, None)

    def attention(q, k, v, schedule, *rest, **more):
        schedule.tiles(asked)
        return attention_by_definition(q, k, v, schedule, *rest, **more)

    monkeypatch.setattr(decoder_module, "attention", attention)
    program = embedding_program(spec, ())
    for num_rows, visits in ((64, 3), (128, 2)):  # the first must make its buffers anew once it is asked
        before = accelerator.count("record")
        for _ in range(visits):
            graphs.run(program, rows_of([9, 5]), num_rows, ())
        assert accelerator.count("record") == before + 1
