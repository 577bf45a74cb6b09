"""A scikit-learn transformer over an `Encoder`. Needs the extra `sklearn`: pip install 'flashvec[sklearn]'."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[sklearn]'") from None

from flashvec.runtime.encoder import Encoder
from flashvec.runtime.integrations.two_sides import open_encoder
from flashvec.runtime.texts import as_texts

LOADING = ("model", "max_length", "device", "dtype", "load")


class FlashvecVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Texts in, vectors out: `make_pipeline(FlashvecVectorizer("smollm2-encoder"), LogisticRegression())`.

    It learns nothing: `fit` checks and loads, `transform` works without it. Pickles hold the parameters, never weights,
    and load the model where they are used; clones, as cross-validation makes them, share the loaded one.
    """

    def __init__(
        self,
        model: Encoder | str | Path,
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        load: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model: an `Encoder` (then it cannot be pickled), or what `Encoder.load` takes.
            instruction, prompt_name, normalize, truncate_dim, batch_tokens: as in `Encoder.embed`.
            max_length, device, dtype: as in `Encoder.load`.
            load: its other arguments.
        """
        self.model = model
        self.instruction = instruction
        self.prompt_name = prompt_name
        self.normalize = normalize
        self.truncate_dim = truncate_dim
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self.load = load

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded now if it is not yet."""
        wanted = {name: getattr(self, name) for name in LOADING}
        held = getattr(self, "_loaded", None)
        if held is None or held[0] != wanted:
            arguments = {name: wanted[name] for name in ("max_length", "device", "dtype") if wanted[name] is not None}
            if twice := [name for name in arguments if name in (self.load or {})]:
                raise ValueError(f"{twice[0]} is given by itself and in load: leave one of them out")
            self._loaded = held = (wanted, open_encoder(self.model, {**arguments, **(self.load or {})}))
        return held[1]

    def fit(self, X: Iterable[str], y: Any = None) -> "FlashvecVectorizer":
        """Check the texts and the parameters, load the model.

        Args:
            X: texts, as `Encoder.embed` takes them: a list, an array [n], a column.

        Raises:
            TypeError, ValueError: what cannot be embedded, no texts at all among it.
        """
        texts = _rows(X)
        if not texts:
            raise ValueError("no texts to fit on")
        self._embed(texts[:0])
        return self

    def transform(self, X: Iterable[str]) -> np.ndarray:
        """fp32 [n, d], one row per text; [0, d] of none.

        Raises:
            TypeError, ValueError: what cannot be embedded; the message names the row or the parameter.
        """
        return self._embed(_rows(X))

    def _embed(self, texts: list[str]) -> np.ndarray:
        vectors: np.ndarray = self.encoder.embed(
            texts,
            instruction=self.instruction,
            prompt_name=self.prompt_name,
            normalize=self.normalize,
            truncate_dim=self.truncate_dim,
            batch_tokens=self.batch_tokens,
        )
        return vectors

    @property
    def _n_features_out(self) -> int:  # what get_feature_names_out counts
        return self.truncate_dim or self.encoder.spec.embedding_size

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.string, tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False, True
        return tags

    def __sklearn_clone__(self) -> "FlashvecVectorizer":
        copy = type(self)(**self.get_params(deep=False))  # scikit-learn's own way would copy an Encoder's weights
        if hasattr(self, "_loaded"):
            copy._loaded = self._loaded
        return copy

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self.model, Encoder):
            raise TypeError("model is an Encoder, whose weights are not pickled: give its folder, file or hub id")
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_loaded"}


def _rows(X: Any) -> list[str]:
    texts, single = as_texts(X, "X")
    if single:
        raise TypeError("X is one str: give a list of str")
    return texts
