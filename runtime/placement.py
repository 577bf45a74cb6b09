"""Where an encoder runs and in which precision: what a caller's arguments mean here."""

from collections.abc import Sequence

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_devices(device: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    """The devices that an argument names: one, every GPU for "all", or those of a list.

    Raises:
        ValueError: "all" without a GPU, an empty list, or kinds of devices mixed.
    """
    if device is None:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    if device == "all":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(
                "device='all' spreads texts over all GPUs and there is none here: leave it out for the CPU"
            )
        return [torch.device("cuda", i) for i in range(count)]
    if isinstance(device, str | torch.device):
        return [torch.device(device)]
    devices = [torch.device(d) for d in device]
    if len({d.type for d in devices}) != 1:
        names = ", ".join(map(str, devices)) or "nothing"
        raise ValueError(f"device lists {names}: give devices of one kind, since others differ in a vector's last bits")
    return devices


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that a name stands for.

    Raises:
        ValueError: an unknown one.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype!r}, known are {', '.join(DTYPES)}")
    return found
