"""The way of texts through an encoder: instructions, windows, packs, vectors; overflown ones again in fp32."""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime import engine
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.engine import Engine
from flashvec.runtime.forked import use_threads_that_exist
from flashvec.runtime.memory import fits
from flashvec.runtime.non_finite import NonFiniteRows, report
from flashvec.runtime.options import Instruction
from flashvec.runtime.pooling import DenseHead
from flashvec.runtime.program import Program, embedding_program
from flashvec.runtime.progress import Progress
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import TruncationWarning, as_instructions, callers_level, check_whole
from flashvec.runtime.wide import widened
from flashvec.runtime.windows import Call, Done, RunSettings, run_call


class TextRunner:
    """What every method of an encoder does with its texts."""

    def __init__(self, spec: ModelSpec, decoder: Decoder, tokenizer: Any, heads: Sequence[DenseHead] = ()) -> None:
        self.spec = spec
        self.engine = Engine(decoder)
        self.tokenizer = tokenizer
        self.heads = list(heads)
        self.num_texts_run = self.num_tokens_run = 0  # since loading: a job reads off them how far it is
        self.workers = 1  # packs at the same time, one thread each (see `Engine.run`); more was slower where measured
        # A text whose vector overflows is run again in fp32: float16 ends at 65,504, below some models' states.
        narrow = decoder.dtype == torch.float16
        self.retry_non_finite = narrow or (decoder.device.type == "cuda" and decoder.dtype != torch.float32)

    @property
    def decoder(self) -> Decoder:
        """The packed decoder that runs."""
        return self.engine.decoder

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights and products; vectors are float32 whatever it is."""
        return self.decoder.dtype

    def _instructions(self, instruction: Instruction, prompt_name: str | None, n: int) -> list[str] | None:
        prompts = self.spec.prompts
        if instruction is not None and prompt_name is not None:
            raise ValueError("give instruction or prompt_name, not both")
        if prompt_name is not None:
            if not isinstance(prompt_name, str) or prompt_name not in prompts:
                known = ", ".join(prompts) or "none"
                raise ValueError(f"prompt_name is {prompt_name!r}; this model's prompts are: {known}")
            instruction = prompts[prompt_name]
        elif instruction is None and self.spec.default_prompt_name is not None:
            instruction = prompts.get(self.spec.default_prompt_name)
        found = as_instructions(instruction, n)
        return None if found is None or not any(found) else found

    def _check_dim(self, truncate_dim: int | None) -> int:
        if truncate_dim is not None:
            check_whole("truncate_dim", truncate_dim)
        if truncate_dim is not None and not 1 <= truncate_dim <= self.spec.embedding_size:
            raise ValueError(f"truncate_dim is {truncate_dim}, the vectors have {self.spec.embedding_size} dimensions")
        return truncate_dim or self.spec.embedding_size

    def _embed_rows(
        self,
        rows: list[str],
        instructions: list[str] | None,
        run: RunSettings,
        normalize: bool | None,
        truncate_dim: int | None,
        on_device: bool,
    ) -> Tensor:
        """fp32 [n, d], on the device or on the host."""
        dim = truncate_dim or self.spec.embedding_size
        vectors = torch.empty(len(rows), dim, dtype=torch.float32, device=self.device if on_device else "cpu")
        program = embedding_program(self.spec, self.heads, normalize=normalize, truncate_dim=truncate_dim)
        for done in self._run(rows, instructions, run, program, on_device=on_device):
            vectors[self._beside(vectors, done.rows)] = done.ran.outputs[0]
        return vectors

    def _run(
        self,
        texts: list[str],
        instructions: list[str] | None,
        settings: RunSettings,
        program: Program,
        *,
        offsets: bool = False,
        on_device: bool = False,
    ) -> Iterator[Done]:
        """Run texts in windows and packs; warns once if some were cut.

        Yields:
            Packs as they are done. A text that comes again was not finite the first time: the last one counts.
        """
        use_threads_that_exist()
        limit = self.spec.max_length if settings.max_length is None else settings.max_length
        check_whole("max_length", limit)
        if limit < 1:
            raise ValueError(f"max_length is {limit}; expected at least 1")
        if limit > self.spec.decoder.max_positions:
            raise ValueError(f"max_length is {limit}, the model has {self.spec.decoder.max_positions} positions")
        if settings.split_special and self.spec.compat:
            raise ValueError(
                f"split_special and compat={self.spec.compat!r} do not go together: there the special tokens' strings "
                "in a text and those of the template are one string"
            )
        call = Call(texts, instructions, limit, settings.split_special, program, offsets, on_device)
        budget = self._budget(settings.batch_tokens)
        overflown, num_truncated = NonFiniteRows(program.counts), 0
        with Progress(len(texts), settings.show_progress) as progress:
            for done in run_call(call, self.spec, self.tokenizer, self.engine, budget, self.workers):
                num_truncated += int(done.window.tokens.truncated[done.ran.indices].sum())
                if self.retry_non_finite:
                    overflown.look_at(done)
                yield done
                self.num_texts_run += len(done.rows)
                self.num_tokens_run += done.ran.num_tokens
                progress.advance(len(done.rows), done.ran.num_tokens)
        yield from self._run_again(call, overflown.rows(), settings.first_row)
        if num_truncated:
            warning = TruncationWarning.of(num_truncated, len(texts), limit, self.spec.document_limit)
            warnings.warn(warning, stacklevel=callers_level())

    def _run_again(self, call: Call, rows: np.ndarray, first_row: int) -> Iterator[Done]:
        """Texts whose results were not finite, one at a time in fp32."""
        if not len(rows):
            return
        still, too_large = NonFiniteRows(call.program.counts), []
        wide = Engine(widened(self.decoder), self.engine.accelerator, graphs=False)
        for row in rows:
            alone = partial(self._run_alone, call.take(row[None]), wide)
            found, ran = fits(alone)
            if not found:
                self.engine.make_room()
                found, ran = fits(alone)
            if not found:  # what all the others gave is worth more than this one
                too_large.append(row)
                continue
            for done in ran:
                done = done._replace(rows=row[None])
                still.look_at(done)
                yield done
        left = np.sort(np.append(still.rows(), np.array(too_large, np.int64)))
        report(rows + first_row, left + first_row, len(call.texts), self.dtype)

    def _run_alone(self, call: Call, engine: Engine) -> list[Done]:
        return list(run_call(call, self.spec, self.tokenizer, engine, 1))

    def _beside(self, vectors: Tensor, rows: np.ndarray) -> Tensor:
        """Row numbers as an index into `vectors`, on its device."""
        accelerator = self.engine.accelerator
        return torch.from_numpy(rows) if accelerator is None or vectors.device.type == "cpu" else accelerator.send(rows)

    def _budget(self, batch_tokens: int | None) -> int:
        if batch_tokens is not None:
            check_whole("batch_tokens", batch_tokens)
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1")
        return batch_tokens or engine.default_budget(self.device)
