"""What is fitted to texts: the value ranges of int8 vectors, and a layer that tells a collection's texts apart."""

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flashvec.runtime.pooling import DenseHead, vector_length
from flashvec.runtime.spec import DenseSpec
from flashvec.runtime.text_runner import TextRunner
from flashvec.runtime.whitening import POWER, check_finite, check_power, fit_whitening
from flashvec.runtime.windows import RUN_SETTINGS, check_settings

logger = logging.getLogger("flashvec")

FEW_TEXTS = 100  # to calibrate with
ALIKE = 1e-6  # of the largest value: a device's last bits, no difference between texts
INSTRUCTED = ("instruction", "prompt_name", *RUN_SETTINGS)  # what fits vectors to texts takes beside its own


class FittedVectors(TextRunner):
    """`Encoder`'s methods that fit its vectors to texts."""

    embed: Callable[..., Any]

    def calibrate(self, texts: Iterable[str], **settings: Any) -> None:
        """Set the value ranges of int8 vectors from typical texts; kept in `spec` and by `save`.

        Args:
            texts: some hundreds of texts like those to come; a notice says so where they are fewer than 100.
            settings: `instruction`, `prompt_name`, `normalize` and `truncate_dim` as they will be used (a vector that
                is cut and brought back to unit length needs ranges of its own); those of a run as in `whiten`.

        Raises:
            TypeError, ValueError: a str, fewer than two texts, ones that are all alike or have no finite vector, or as
                `embed`.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str: give a list of typical texts")
        check_settings(settings, (*INSTRUCTED, "normalize", "truncate_dim"))
        vectors = self.embed(texts, **settings)
        if len(vectors) < 2:
            raise ValueError(f"calibrate needs at least two texts, got {len(vectors)}")
        check_finite(vectors, "calibrate")
        low, high = vectors.min(0), vectors.max(0)
        if not (high - low).max() > np.abs(vectors).max() * ALIKE:
            raise ValueError("calibrate: the texts' vectors are all alike: give texts that differ")
        if len(vectors) < FEW_TEXTS:
            logger.warning(
                "int8 ranges are of %d texts, and many values of others will lie outside: better give some hundreds",
                len(vectors),
            )
        self.spec = replace(
            self.spec,
            int8_ranges=(tuple(low.tolist()), tuple(high.tolist())),
            int8_length=vector_length(self.spec, len(low), settings.get("normalize")),
        )

    def whiten(self, texts: Iterable[str], *, power: float = POWER, **settings: Any) -> None:
        """Fit vectors to a collection: what its texts have in common weighs less (`runtime/whitening.py`).

        A dense head is added, which `save` keeps and sentence-transformers runs too. Queries and documents go through
        it alike; vectors from before do not compare with those that come after. The leading dimensions hold most:
        `truncate_dim` may cut them. int8 ranges are forgotten.

        Args:
            texts: the collection's documents, or some hundreds of them.
            power: 0 takes only the mean off, 0.5 makes all axes weigh the same.
            settings: `instruction`, `prompt_name`, `max_length`, `batch_tokens`, `split_special` and `show_progress`,
                as in `embed`.

        Raises:
            TypeError, ValueError: a str, fewer than two texts, ones that are all alike or have no finite vector, or as
                `embed`.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str: give a list of the collection's texts")
        check_power(power)
        check_settings(settings, INSTRUCTED)
        whole = copy.copy(self)
        whole.spec = replace(self.spec, truncate_dim=None)
        weight, bias = map(torch.from_numpy, fit_whitening(whole.embed(texts, normalize=False, **settings), power))
        width = len(bias)
        self.heads = [*self.heads, DenseHead(weight.to(self.device), bias.to(self.device), "identity")]
        head = DenseSpec(width, width, bias=True, activation="identity")
        self.spec = replace(self.spec, dense=(*self.spec.dense, head), int8_ranges=None, int8_length=None)
