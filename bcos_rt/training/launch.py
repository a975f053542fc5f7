"""Devices and processes, as Lightning Fabric has them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.training.recipe import TrainingRecipe
from bcos_rt.training.run import RunFolder
from bcos_rt.training.sharded import share_out

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["begin_logs_at", "launched", "make_fabric"]

_STRATEGIES = "'auto', 'ddp' or 'fsdp'"


def make_fabric(
    accelerator: str,
    devices: int | str,
    strategy: str,
    num_nodes: int,
    recipe: TrainingRecipe,
    folder: RunFolder | None,
) -> Fabric:
    """The Fabric of a run, not launched yet; the arguments are those of :func:`bcos_rt.training.finetune`.

    Raises:
        InvalidArgumentError, InvalidTypeError: strategies and devices that a run cannot have, named.
        MissingDependencyError: Lightning Fabric is not installed.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.loggers.logger import Logger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger
        from lightning_fabric.strategies.ddp import DDPStrategy
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
        from lightning_fabric.strategies.single_device import SingleDeviceStrategy
    except ImportError as error:
        raise MissingDependencyError("training needs Lightning Fabric: pip install 'bcos-rt[train]'") from error
    if not isinstance(strategy, str):
        raise InvalidTypeError("strategy", type(strategy).__name__, f"a strategy's name, {_STRATEGIES}")
    if "spawn" in strategy or "fork" in strategy:
        raise InvalidArgumentError(
            "strategy", repr(strategy), "a strategy whose processes call finetune themselves, such as 'ddp'"
        )
    if strategy == "dp" or (strategy != "fsdp" and any(name in strategy for name in ("fsdp", "deepspeed"))):
        raise InvalidArgumentError("strategy", repr(strategy), _STRATEGIES)
    if strategy == "fsdp" and recipe.precision == "16-mixed":
        raise InvalidArgumentError("strategy", "'fsdp' with recipe.precision='16-mixed'", "'bf16-mixed' with it")
    if devices == "auto":
        devices, num_nodes = launched() or (devices, num_nodes)
    # Fabric's own "fsdp" is FSDP1, for GPUs alone.
    sharded = ModelParallelStrategy(lambda net, _: share_out(net, sharded.root_device))
    loggers: list[Logger] = []
    if folder is not None:
        try:
            loggers.append(TensorBoardLogger(str(folder.path), name="tensorboard", version=""))
        except ModuleNotFoundError:  # TensorBoard is an option
            loggers = []
    try:
        fabric = Fabric(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes,
            strategy=sharded if strategy == "fsdp" else strategy,
            precision=recipe.precision, loggers=loggers,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidArgumentError(
            "accelerator, devices, strategy", f"{accelerator!r}, {devices!r}, {strategy!r} ({error})",
            "what Lightning Fabric takes on this machine",
        ) from error  # fmt: skip
    # An environment variable of Fabric's may have chosen, too.
    if not isinstance(fabric.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise InvalidArgumentError("strategy", type(fabric.strategy).__name__, _STRATEGIES)
    if isinstance(fabric.strategy, DDPStrategy) and fabric.strategy._start_method != "popen":
        # What "auto" is in a notebook: processes that would have to begin inside this one.
        raise InvalidArgumentError(
            "devices", f"{devices!r} in an interactive interpreter", "1 there, or a script that torchrun starts"
        )
    return fabric


def begin_logs_at(fabric: Fabric, step: int) -> None:
    """Have TensorBoard drop what it was told of this step and later ones, by a run that was killed.

    As torch's ``SummaryWriter(purge_step=...)`` does, which has to know the step before the state is read.
    """
    try:
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    except ModuleNotFoundError:
        return
    for logger in fabric.loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        writer: Any = logger.experiment
        # The session's start is heeded in files of this version alone.
        writer.file_writer.add_event(Event(step=step, file_version="brain.Event:2"))
        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def launched() -> tuple[int, int] | None:
    """Processes on a node, and nodes, as torchrun or else SLURM's srun started them; None where neither did."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here:
        return here, int(os.environ["WORLD_SIZE"]) // here
    if "SLURM_NTASKS" not in os.environ or not SLURMEnvironment.detect():
        return None
    tasks = int(os.environ["SLURM_NTASKS"])
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return int(os.environ.get("SLURM_NTASKS_PER_NODE", str(max(1, tasks // nodes)))), nodes
