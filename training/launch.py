"""Several processes of one command on this machine, started and watched by torch's own launcher."""

import logging
import os
import signal
from collections.abc import Sequence

import torch

from flashvec.training.distributed import LAUNCHER

logger = logging.getLogger("flashvec")


def launch(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` in so many processes that find each other, as torchrun would, and wait.

    Each has its share of the cores, unless OMP_NUM_THREADS says otherwise. When one fails the others are stopped.

    Returns:
        The exit status of the one that failed first; 0 where none did.

    Raises:
        KeyboardInterrupt: Ctrl-C, which stops them all.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process says itself what is wrong
    try:
        torchrun(["--standalone", "--nproc-per-node", str(processes), "--module", module, *arguments])
    except ChildFailedError as error:
        for failure in error.failures.values():
            # A signal's number: it could say nothing itself, others only that it is gone. SIGTERM is the launcher's.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                place = f"process {failure.local_rank + 1} of {processes}"
                logger.warning("%s was ended by %s (is memory short?): the same command goes on", place, name)
        _, first = error.get_first_failure()
        return max(1, first.exitcode)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval
    return 0
