import numpy as np
import torch
from family_models import models, texts_of

from flashvec.runtime.batches import TokenRows, host_batch
from flashvec.runtime.pooling import DenseHead
from flashvec.runtime.program import embedding_program, hidden_program
from flashvec.runtime.spec import ModelSpec


def test_one_pass_gives_what_is_asked_for():
    _, decoder = models("llama", "bidirectional")
    spec = ModelSpec(decoder.spec, "bidirectional", ("mean", "last"), "hf")
    lengths = np.array([9, 4], np.int32)
    rows = TokenRows(np.concatenate(texts_of([9, 4])), lengths, np.stack([lengths * 0, lengths], 1).astype(np.int64))
    batch = host_batch(rows, decoder.row_plan(13))
    both = embedding_program(spec, (), states=True)
    vectors, states = both.run(decoder, batch)
    assert both.counts == ("texts", "rows") and vectors.shape == (2, 96) and states.shape == (13, 48)
    assert torch.equal(embedding_program(spec, ()).run(decoder, batch)[0], vectors)
    assert torch.equal(embedding_program(spec, (), vectors=False, states=True).run(decoder, batch)[0], states)
    raw = embedding_program(spec, (), normalize=False).run(decoder, batch)[0]
    torch.testing.assert_close(raw[0], torch.cat([states[:9].mean(0), states[8]]))
    head = DenseHead(torch.randn(5, 96), None, "tanh")
    assert embedding_program(spec, (head,), truncate_dim=3).run(decoder, batch)[0].shape == (2, 3)
    (hidden,) = hidden_program(False).run(decoder, batch)
    assert len(hidden) == sum(batch.row_plan)


def test_keys_tell_programs_apart():
    _, decoder = models("llama", "bidirectional")
    spec = ModelSpec(decoder.spec, "bidirectional", ("mean",), "hf")
    variants = [
        embedding_program(spec, ()),
        embedding_program(spec, (), normalize=False),
        embedding_program(spec, (), truncate_dim=8),
        embedding_program(spec, (), states=True),
        embedding_program(ModelSpec(decoder.spec, "causal", ("mean",), "hf"), ()),
        embedding_program(ModelSpec(decoder.spec, "bidirectional", ("last",), "hf"), ()),
        hidden_program(True),
        hidden_program(False),
    ]
    assert len({hash(p.key) for p in variants}) == len(variants)
    assert embedding_program(spec, ()).key == variants[0].key
