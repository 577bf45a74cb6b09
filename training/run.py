"""Training from Python: one function for each objective, a configuration in, a trained folder out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashvec.runtime.texts import check_path
from flashvec.training.checkpoint import checkpoints
from flashvec.training.config import ContrastiveConfig, DistillConfig, MntpConfig, TrainConfig, read_config
from flashvec.training.contrastive import Contrastive
from flashvec.training.distill import Distill
from flashvec.training.distributed import World, own_device
from flashvec.training.loop import LOG_FILE, Objective, finished, train
from flashvec.training.mntp import Mntp
from flashvec.training.model import ENCODER_FOLDER, Model, load_model
from flashvec.training.origin import CONFIG_FILE, SEEN_FILE, fingerprint
from flashvec.training.settings import ConfigError, to_yaml

MODEL_MARKS = ("config.json", "adapter_config.json", "modules.json")  # of which a model's folder has one

OBJECTIVES: dict[type[TrainConfig], Callable[[Model, Any, World], Objective]] = {
    MntpConfig: Mntp,
    ContrastiveConfig: Contrastive,
    DistillConfig: Distill,
}


def run_training(config: TrainConfig, *, show: bool | None = None, until: int | None = None) -> dict[str, Any]:
    """Train as a configuration says, from its output's last checkpoint where there is one; nothing where it has ended.

    Args:
        config: `MntpConfig`, `ContrastiveConfig` or `DistillConfig`; its type is the objective.
        show: a progress line on stderr; default on a terminal.
        until: stop after this many steps, with a checkpoint.

    Returns:
        The last line of the log. `config.output` holds what `Encoder.load` opens; with `train: body` its folder
        `encoder` does.

    Raises:
        ConfigError, DataError, CheckpointError, ResumeError: settings and files; name the key, or the file and line.
        TrainingStopped: training that cannot go on.
        RuntimeError: processes that differ in what they were given, or in their parameters.
    """
    world = World(own_device(config.device))
    try:
        last = finished(config)
        world.check_same(str(last is None), "differ in whether the run has ended: their output must be one folder")
        if last is not None:
            return last
        _check_data(config)
        _check_output(config)
        model = load_model(config, wants_head=isinstance(config, MntpConfig), world=world)
        if world.size > 1:  # each may have a device of its own
            given = to_yaml(replace(config, device=None)) + fingerprint(config)
            world.check_same(given, "were given different settings, or files of different contents: start all alike")
        return train(config, OBJECTIVES[type(config)](model, config, world), world, show=show, until=until)
    finally:
        world.close()


def _check_output(config: TrainConfig) -> None:
    """What is trained must not be written over what it is trained from, over any other model or another's files."""
    output = Path(config.output).resolve()
    check_path(output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output is {config.output!r}, a file: name a folder to write")
    written = (output, output / ENCODER_FOLDER) if config.train == "body" else (output,)
    named = [("model", config.model), ("lora.start", config.lora.start)]
    named += [("adapters", adapter) for adapter in config.adapters]
    named += [("teachers", teacher) for teacher in getattr(config, "teachers", ())]
    for name, given in named:
        if given is not None and Path(given).expanduser().resolve() in written:
            raise ConfigError(f"output is {config.output!r}, which {name} names too: name another folder to write")
    if not checkpoints(output) and not _is_runs_own(output / CONFIG_FILE, type(config)):
        if found := [name for name in MODEL_MARKS if (output / name).is_file()]:
            raise ConfigError(f"output is {config.output!r}, a folder that holds a model ({found[0]}): name a new one")
        names = (CONFIG_FILE, LOG_FILE, SEEN_FILE, *(path.name for path in written[1:]))
        if found := [name for name in names if (output / name).exists()]:
            raise ConfigError(
                f"output is {config.output!r}, a folder that holds {found[0]}, which a run would write over: name "
                "a new one"
            )


def _is_runs_own(settings: Path, kind: type[TrainConfig]) -> bool:
    """Did a run that saved no checkpoint yet leave this file: is it all settings, written as a run writes them."""
    try:
        return to_yaml(read_config(kind, settings)) == settings.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _check_data(config: TrainConfig) -> None:
    """Data must be named: told before a model of gigabytes is read."""
    if not (getattr(config, "texts", ()) or getattr(config, "pairs", ())):
        kinds = "texts=wiki.txt or pairs=pairs.jsonl" if isinstance(config, ContrastiveConfig) else "texts=wiki.txt"
        raise ConfigError(f"no data: name files, such as {kinds}; a data set's name alone fetches nothing")
