"""Small packs as one launch each: CUDA graphs, kept by bucket.

A layer is about a dozen kernels. Launched one by one from Python they take the host some 6 µs each, so a small model
that runs a small pack waits for the host. A graph repeats recorded launches as one; what it records are addresses and
grids, so it serves every batch that fits its buffers: one number of rows and at most so many texts. The longest text is
no part of that, since tile lists are as long as any batch of these rows could need.
"""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashvec.kernels.schedule import TileClass
from flashvec.runtime.accelerator import Accelerator, Recording
from flashvec.runtime.batches import StaticBatch, TokenRows
from flashvec.runtime.buckets import sequence_bucket
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.program import Program

logger = logging.getLogger("flashvec")

KEPT = 32  # graphs; one holds some hundred launches and its buffers, about a megabyte
MOST_ROWS = 4096  # beyond it even the smallest models keep a GPU busy for longer than the host needs
# An estimate of when the host is the slower one, on the fast side for the device: a graph where none was needed costs
# one recording, a missing one costs every pack.
LAUNCHES_PER_LAYER = 12
LAUNCH_S = 6e-6
PRODUCT_FLOPS = 500e12  # per second that products of so few rows reach on an H100
BANDWIDTH = 3e12  # bytes per second


def most_rows(decoder: Decoder) -> int:
    """The largest pack that is worth a graph: 0 for models whose weights alone take longer to read than to launch.

    Both sides are counted a layer: launching it, against its weights' bytes and its products' FLOPs.
    """
    layer = decoder.layers[0]
    weights = (layer.qkv, layer.out, layer.gate_up, layer.down)
    numbers = sum(weight.numel() for weight in weights)
    launch_s = LAUNCHES_PER_LAYER * LAUNCH_S
    if numbers * layer.qkv.element_size() / BANDWIDTH >= launch_s:
        return 0
    return min(MOST_ROWS, int(launch_s * PRODUCT_FLOPS / (2 * numbers)))


@dataclass
class _Entry:
    buffers: StaticBatch
    recording: Recording | None = None
    is_warm: bool = False
    tables: list[Tensor] = field(default_factory=list)  # read by the recording; longer texts make the decoder drop them


class Graphs:
    """Recorded programs of one decoder, the least recently used dropped first.

    The first batch of a bucket runs on the bucket's buffers without being recorded: that compiles kernels and shows
    which tile lists they ask for, and a bucket that comes once costs no recording. The second is recorded.
    """

    def __init__(self, decoder: Decoder, accelerator: Accelerator, largest: int | None = None) -> None:
        self.decoder, self.accelerator = decoder, accelerator
        self.largest = most_rows(decoder) if largest is None else largest
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._classes: dict[TileClass, None] = {}  # tile lists that some program asked for

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, num_rows: int) -> bool:
        """True if packs of this many rows run here."""
        return num_rows <= self.largest

    def clear(self) -> None:
        """Forget all recordings, and free their memory."""
        self._entries.clear()

    @torch.inference_mode()  # buffers are made within it or not, whatever the caller is in: all calls write to them
    def run(self, program: Program, rows: TokenRows, num_rows: int, classes: Sequence[TileClass]) -> tuple[Tensor, ...]:
        """Run a program on a batch.

        Args:
            num_rows: the batch's token bucket.
            classes: tile lists that the kernels are known to ask for.

        Returns:
            What the program makes, for as many texts and rows as the bucket has; the batch's own come first.
        """
        num_sequences = sequence_bucket(len(rows.lengths))
        key = (program.key, num_rows, num_sequences)
        entry = self._entries.get(key)
        if entry is None:
            known = tuple(dict.fromkeys((*classes, *self._classes)))
            entry = _Entry(StaticBatch(rows, num_rows, num_sequences, known, self.accelerator))
            self._entries[key] = entry
            if len(self._entries) > KEPT:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(key)
            entry.buffers.write(rows)
            if entry.is_warm and entry.recording is None:
                self._record(program, entry)
        if entry.recording is not None:
            entry.recording.replay()
            # The next replay of any graph may write there: all share their memory.
            return tuple(x.clone() for x in entry.recording.outputs)
        outputs = program.run(self.decoder, entry.buffers.batch)
        self._warmed(entry, rows)
        return outputs

    def _warmed(self, entry: _Entry, rows: TokenRows) -> None:
        """After a run: buffers must hold all tile lists that the kernels asked for, to be overwritten with the rest."""
        buffers = entry.buffers
        asked = tuple(buffers.batch.schedule.tile_lists)
        self._classes.update(dict.fromkeys(asked))
        if asked == buffers.classes:
            entry.is_warm = True
        else:
            num_rows, num_sequences = buffers.num_rows, buffers.num_sequences
            entry.buffers = StaticBatch(rows, num_rows, num_sequences, asked, self.accelerator)

    def _record(self, program: Program, entry: _Entry) -> None:
        batch = entry.buffers.batch
        try:
            entry.recording = self.accelerator.record(lambda: program.run(self.decoder, batch))
        except torch.OutOfMemoryError:  # a RuntimeError, too, but no refusal: smaller packs may still be recorded
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # ending what had run out of memory failed, too
                raise error.__context__ from None
            self.largest = -1
            self.clear()
            reason = str(error).partition("\n")[0]
            logger.warning("CUDA graphs are off, small packs run launch by launch: recording failed (%s)", reason)
            return
        entry.tables = [tensor for table in self.decoder._tables for tensor in table]
