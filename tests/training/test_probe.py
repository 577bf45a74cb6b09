import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from flashvec.training.probe import MAX_EPOCHS, fit_probe

TAGS, DIMS = 5, 24


def clusters(count, seed):
    """Overlapping clusters in a space with one dimension far larger than the rest, as decoders have."""
    rng = np.random.default_rng(seed)
    tags = rng.choice(TAGS, count, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    centres = np.random.default_rng(7).normal(size=(TAGS, DIMS)) * 0.8
    x = centres[tags] + rng.normal(size=(count, DIMS))
    x[:, 3] = x[:, 3] * 500 + 4000
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(tags)


def test_as_right_as_scikit_learns_logistic_regression():
    (x, tags), (other_x, other_tags) = clusters(2000, 0), clusters(4000, 1)
    held_out = torch.arange(2000) % 10 == 0
    probe = fit_probe(x, tags, TAGS, held_out)
    accuracy = (probe.predict(other_x) == other_tags).double().mean().item()
    standardised, other = ((part - probe.mean) / probe.std for part in (x, other_x))
    peer = LogisticRegression(max_iter=500).fit(standardised[~held_out], tags[~held_out])
    wanted = peer.score(other, other_tags)
    error = (wanted * (1 - wanted) / len(other_tags)) ** 0.5  # of a share of so many
    assert wanted > 0.9 and accuracy > wanted - 2 * error


def test_same_seed_same_bits_whatever_the_threads():
    x, tags = clusters(400, 0)
    held_out = torch.arange(400) % 10 == 0
    first, other = fit_probe(x, tags, TAGS, held_out, seed=1), fit_probe(x, tags, TAGS, held_out, seed=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = fit_probe(x, tags, TAGS, held_out, seed=1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_held_out_words_are_not_trained_on():
    """Wrong tags of theirs stop the training early, and are not learned."""
    x, tags = clusters(400, 0)
    held_out = torch.arange(400) % 10 == 0
    wrong = torch.where(held_out, (tags + 1) % TAGS, tags)
    epochs = []
    probe = fit_probe(x, wrong, TAGS, held_out, on_epochs=epochs.append)
    assert probe.num_epochs < 5 < len(epochs) and sum(epochs) == MAX_EPOCHS
    assert (probe.predict(x[held_out]) == wrong[held_out]).float().mean() < 0.3


@pytest.mark.parametrize("held", [True, False])
def test_refuses_nothing_to_train_on_or_to_stop_by(held):
    x, tags = clusters(10, 0)
    with pytest.raises(ValueError, match="there are"):
        fit_probe(x, tags, TAGS, torch.full((10,), held))
    with pytest.raises(ValueError, match="not finite"):
        fit_probe(x * torch.nan, tags, TAGS, torch.arange(10) < 5)
