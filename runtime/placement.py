"""Where an encoder runs and in which precision: what a caller's arguments mean here."""

from collections.abc import Sequence

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_devices(device: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    """The devices that an argument names: one, every GPU for "all", or those of a list.

    Raises:
        TypeError: no name and no list of names.
        ValueError: "all" without a GPU, an empty list, kinds of devices mixed, or a device that is not here.
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
    given = [device] if isinstance(device, str | torch.device) else device
    if not isinstance(given, Sequence) or not all(isinstance(each, str | torch.device) for each in given):
        raise TypeError(f"device is {repr(device)[:80]}; give cpu, cuda, cuda:1 and so on, all, or a list of them")
    devices = [_named(each) for each in given]
    if len({d.type for d in devices}) != 1:
        names = ", ".join(map(str, devices)) or "nothing"
        raise ValueError(f"device lists {names}: give devices of one kind, since others differ in a vector's last bits")
    for chosen in devices:
        _check_here(chosen)
    return devices


def _named(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError:  # torch's text lists every backend it was ever built for
        raise ValueError(f"device is {device!r}; give cpu, cuda, cuda:1 and so on, or all") from None


def _check_here(device: torch.device) -> None:
    """A GPU that is not here is refused by name: torch would speak of it only once weights are sent there."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is '{device}'; give cpu, cuda, cuda:1 and so on, or all")
    if device.type == "cpu":
        return
    count = torch.cuda.device_count()
    if not count:
        built = torch.backends.cuda.is_built()
        why = "there is no GPU here" if built else "this torch is built without CUDA (install one with it)"
        raise ValueError(f"device is '{device}' and {why}: leave it out for the CPU")
    if (device.index or 0) >= count:
        here = ", ".join(f"cuda:{i}" for i in range(count))
        raise ValueError(f"device is '{device}'; the GPUs here are {here}")


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype that a name stands for.

    Raises:
        ValueError: an unknown one.
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {dtype!r}, known are {', '.join(DTYPES)}")
    return found
