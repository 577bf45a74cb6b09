"""A linear probe: multinomial logistic regression on fixed vectors.

    p(tag | x) = softmax(W (x - mean) / std + b)

`mean` and `std` are those of the training vectors: states of decoders have a few dimensions a thousand times larger
than the rest, and a gradient step that suits those never moves the others. The model stays linear in x.

Shapes: n words, D dimensions, C tags.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH_WORDS = 256
MAX_EPOCHS = 100
PATIENCE = 2  # epochs without a smaller loss on what is held out; then on from the best one with smaller steps
CUT, MAX_CUTS = 0.25, 3
STEP = 0.04  # of a logit: a signed step of size s on D standardised, unrelated dimensions moves one by about s √D
BIAS_STEP = 0.01
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Probe:
    """A trained probe: fp32 weight [C, D], bias [C], mean and std [D], and the epochs it took."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    num_epochs: int

    def logits(self, vectors: Tensor) -> Tensor:
        """fp32 [n, C] of vectors fp32 [n, D]."""
        return F.linear((vectors - self.mean) / self.std, self.weight, self.bias)

    def predict(self, vectors: Tensor) -> Tensor:
        """The likeliest tag of each vector, int64 [n]."""
        return torch.cat([self.logits(part).argmax(1) for part in vectors.split(BATCH_WORDS * 16)])


@contextmanager
def _one_thread() -> Iterator[None]:
    """A batch's products are too small to share: with threads that wait for one another a step took 15 times as long
    on a busy machine. The result does not depend on their number either."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def fit_probe(
    vectors: Tensor,
    tags: Tensor,
    num_tags: int,
    held_out: Tensor,
    *,
    seed: int = 0,
    on_epochs: Callable[[int], None] = lambda num: None,
) -> Probe:
    """Train by AdamW on shuffled mini-batches until the loss on held-out words stops falling, with any step size.

    Args:
        vectors: [n, D] fp32 on the CPU.
        tags: [n] int64 below `num_tags`.
        held_out: [n] bool, words that choose the epoch and are not trained on.
        seed: of the order of words.
        on_epochs: told how many of `MAX_EPOCHS` are done or no longer needed, after each epoch.

    Returns:
        The probe of the best epoch; the same bits for the same arguments on one machine.

    Raises:
        ValueError: nothing to train on, or nothing held out.
    """
    own, kept = torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
    if not len(own) or not len(kept):
        raise ValueError(f"a probe needs words to train on and words held out, there are {len(own)} and {len(kept)}")
    std, mean = torch.std_mean(vectors, 0, correction=0)
    std = std.clamp(min=1e-6)
    order = torch.Generator().manual_seed(seed)
    num_dims = vectors.shape[1]
    weight = torch.zeros(num_tags, num_dims, requires_grad=True)
    counts = torch.bincount(tags[own], minlength=num_tags) + 1.0
    bias = torch.log(counts / counts.sum()).requires_grad_()  # begins as the tags' shares
    groups = [
        {"params": [weight], "lr": STEP / math.sqrt(num_dims), "weight_decay": WEIGHT_DECAY},
        {"params": [bias], "lr": BIAS_STEP, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    best, best_loss, since, cuts = None, math.inf, 0, 0
    for epoch in range(1, MAX_EPOCHS + 1):
        for batch in own[torch.randperm(len(own), generator=order)].split(BATCH_WORDS):
            logits = F.linear((vectors[batch] - mean) / std, weight, bias)
            optimizer.zero_grad()
            F.cross_entropy(logits, tags[batch]).backward()
            optimizer.step()
        now = Probe(weight.detach().clone(), bias.detach().clone(), mean, std, epoch)
        loss = sum(F.cross_entropy(now.logits(vectors[b]), tags[b], reduction="sum").item() for b in kept.split(4096))
        on_epochs(1)
        if not math.isfinite(loss):
            raise ValueError("the loss of the probe is not finite: are the vectors?")
        since += 1
        if loss < best_loss:
            best, best_loss, since = now, loss, 0
        elif since == PATIENCE:
            if cuts == MAX_CUTS:
                on_epochs(MAX_EPOCHS - epoch)
                break
            cuts, since = cuts + 1, 0
            _go_on_from(best, weight, bias, optimizer)
    assert best is not None
    return best


def _go_on_from(best: Probe | None, weight: Tensor, bias: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Back to the best epoch, with smaller steps."""
    assert best is not None
    with torch.no_grad():
        weight.copy_(best.weight)
        bias.copy_(best.bias)
    for group in optimizer.param_groups:
        group["lr"] *= CUT
