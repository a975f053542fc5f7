"""The training loop, on Lightning Fabric."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from bcos_rt.data import Augmented, EpochSampler, check_numbers, derived_seed, loader, open_data, shard
from bcos_rt.data.loading import read_batch
from bcos_rt.errors import (
    CheckpointError,
    InvalidArgumentError,
    InvalidTypeError,
    TrainingError,
    TrainingInterruptedError,
)
from bcos_rt.files import replacing
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import bcos_layers, exponents, fix_exponents, fixed_exponents, learn_exponents, set_exponents
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.nn.norms import BatchNormUncentered2d
from bcos_rt.training.biases import bias_names
from bcos_rt.training.checks import (
    check_bcos,
    check_dtypes,
    check_labelled,
    check_labels,
    check_metrics,
    checked_output,
    checked_pictures,
    embeds,
    learns_outputs,
    naming_refusals,
)
from bcos_rt.training.finite import FirstBad, all_finite, first_not_finite, is_finite
from bcos_rt.training.launch import begin_logs_at, make_fabric
from bcos_rt.training.losses import Teaching, agreement, check_label, label_loss
from bcos_rt.training.optim import clip_adaptively, make_optimizers, set_fused, step_all
from bcos_rt.training.recipe import TrainingRecipe
from bcos_rt.training.run import Progress, RunFolder, save_network
from bcos_rt.training.schedules import Schedule
from bcos_rt.training.sharded import broadcast, clip_norm, copy_whole, load_whole, local, share_out, whole_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["TrainingResult", "finetune"]

# What may be printed of a picture of explanations: more is slow to draw every epoch.
MAX_PICTURES = 8
# Where a step that is not finite is left out by torch's fused optimisers, and numbers are read every log_every steps.
FUSED_DEVICES = ("cuda",)
# Loss scaling that has come down to this finds no scale at which the gradients are finite.
SMALLEST_SCALE = 2.0**-10


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave.

    Attributes:
        net: the network after the last epoch, in evaluation mode: the one that was given.
        averaged: its exponential moving average, in evaluation mode; None without ``recipe.ema``.
        history: a row an epoch: ``epoch``, ``lr``, ``train_loss``, ``train_top1`` (shares), ``val_loss``, ``val_top1``,
            ``val_top5``, ``ema_top1``, ``b`` (mean), ``images_per_s`` (absent where all of an epoch's steps were done
            before the run was resumed), ``seconds``. Of images without labels, those are right whose top class is the
            teacher's. Of networks whose output is an embedding ``train_cosine``, ``val_cosine`` and ``ema_cosine`` in
            place of ``top1``: the mean cosine of their embeddings with the teacher's.
        best: the best epoch's row, by ``recipe.select``; None without validation data.
        output: the run's folder, or None.
    """

    net: nn.Module
    averaged: nn.Module | None
    history: tuple[dict[str, Any], ...]
    best: dict[str, Any] | None
    output: Path | None


def finetune(
    net: nn.Module,
    data: Any,
    recipe: TrainingRecipe | None = None,
    *,
    validation: Any = None,
    output: str | os.PathLike[str] | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    explain_images: Tensor | None = None,
    accelerator: str = "auto",
    devices: int | str = "auto",
    strategy: str = "auto",
    num_nodes: int = 1,
    workers: int = 0,
    console: Console | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train a network: fine-tune a B-cosified one, or train any classifier from scratch.

    Devices, processes and precision are Lightning Fabric's: on several devices, or under ``torchrun`` or SLURM, every
    process calls this function with the same arguments. Batches, their order and augmentation depend on
    ``recipe.seed``, epoch and step alone, mixing and dropout on the process too; a run that is stopped and resumed is
    the run that was not.

    Args:
        net: a :class:`BcosNetwork`, a :class:`ConventionalNetwork`, or any module that takes images [N, 3, H, W] in
            [0, 1] and returns logits [N, classes], or embeddings [N, D] to be trained towards a teacher's
            (:meth:`TrainingRecipe.clip`). It is trained in place.
        data: what :func:`bcos_rt.data.open_data` takes: a folder of class folders, a tar file, ``hf:NAME``, a pair of
            tensors, a data set of (image, label).
        recipe: default :meth:`TrainingRecipe.bcosify`.
        validation: like ``data``; evaluated every epoch. An image without a label counts as right where the network's
            top class is the teacher's; of embeddings the mean cosine with the teacher's is measured.
        output: the run's folder: state, networks, logs, pictures (see :mod:`bcos_rt.training.run`). Without it nothing
            is written and nothing can be resumed.
        teacher: for ``recipe.distillation``: takes the same images; left in evaluation mode.
        resume: go on where the run in ``output`` stopped; begin where there is none. Without it a folder that holds a
            run is an error.
        explain_images: [M, 3, H, W] in [0, 1], explained before the first epoch and after every one (the first 8),
            for B-cos networks with logits.
        accelerator, devices, num_nodes: as in ``lightning_fabric.Fabric``; ``"auto"`` takes a GPU where there is one,
            and the processes and nodes of ``torchrun`` or SLURM's ``srun``.
        strategy: ``"auto"`` or ``"ddp"`` (also Fabric's other names of it): every process holds the whole network;
            ``"fsdp"``: weights, gradients, optimiser states and averages are shared out among the processes (FSDP2).
            Then a copy of ``net`` is trained, and ``net`` filled from it after every epoch.
        workers: processes that read images.
        console: for progress; default stderr, shown where that is a terminal.
        on_epoch: called with every new row of the history.

    Raises:
        TrainingError: a loss or gradient is not finite; the message names the step, the layer and the state that is
            kept. The weights are those before that step.
        TrainingInterruptedError: after SIGTERM, with the state saved in ``output``; Ctrl-C saves it too.
        InvalidArgumentError, InvalidTypeError: unusable arguments, named.
        MissingDependencyError: Lightning Fabric (extra ``train``) is not installed.
    """
    recipe = TrainingRecipe() if recipe is None else recipe
    if not isinstance(net, nn.Module):
        raise InvalidTypeError("net", type(net).__name__, "a torch.nn.Module")
    if not isinstance(recipe, TrainingRecipe):
        raise InvalidTypeError("recipe", type(recipe).__name__, "a TrainingRecipe")
    if hasattr(net, "_orig_mod"):
        raise InvalidTypeError("net", "what torch.compile made of a network", "the network", " (net._orig_mod)")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise InvalidTypeError("teacher", type(teacher).__name__, "a torch.nn.Module or None")
    if recipe.distillation is not None and teacher is None:
        raise InvalidArgumentError("teacher", "None", "a network, for recipe.distillation")
    if recipe.distillation is None and teacher is not None:
        raise InvalidArgumentError("teacher", f"a {type(teacher).__name__}", "None without recipe.distillation")
    if teacher is net and teacher is not None:
        raise InvalidArgumentError("teacher", "the network that is trained", "another network, such as a copy of it")
    if explain_images is not None and output is None:
        raise InvalidArgumentError("explain_images", "images without output", "None, or a folder for their pictures")
    if output is not None and not isinstance(output, str | os.PathLike):
        raise InvalidTypeError("output", type(output).__name__, "a path or None")
    if on_epoch is not None and not callable(on_epoch):
        raise InvalidTypeError("on_epoch", type(on_epoch).__name__, "a function or None")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise InvalidArgumentError("workers", repr(workers), "an integer of at least 0")
    folder = None if output is None else RunFolder(output)
    if resume and folder is None:
        raise InvalidArgumentError("output", "None", "the folder of the run to resume")
    if folder is not None:
        folder.check(resume)
    fabric = make_fabric(accelerator, devices, strategy, num_nodes, recipe, folder)
    try:
        fabric.launch()
    except ValueError as error:  # SLURM started other numbers
        raise InvalidArgumentError(
            "devices, num_nodes", f"{devices!r}, {num_nodes!r} ({error})", "what the processes were started with"
        ) from error
    with ExitStack() as stack:
        if folder is not None:
            # All processes end together.
            wrong: str | None = fabric.broadcast(folder.lock(stack) if fabric.is_global_zero else None)
            if wrong is not None:
                raise InvalidArgumentError("output", f"{str(output)!r}, {wrong}", "a folder of its own")
            # Another run may have ended since the first look.
            folder.check(resume)
        training = _Training(fabric, net, data, validation, recipe, folder, teacher, explain_images, workers, on_epoch)
        return training.run(console or Console(stderr=True))


class _Training:
    """One run. Every process has one."""

    def __init__(
        self,
        fabric: Fabric,
        net: nn.Module,
        data: Any,
        validation: Any,
        recipe: TrainingRecipe,
        folder: RunFolder | None,
        teacher: nn.Module | None,
        explain_images: Tensor | None,
        workers: int,
        on_epoch: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

        self.fabric, self.net, self.recipe, self.folder, self.on_epoch = fabric, net, recipe, folder, on_epoch
        world, rank = fabric.world_size, fabric.global_rank
        augmentation = recipe.augmentation
        raw = open_data(data, transform=augmentation.train_transform(), split="train")
        self.data, self.class_names = Augmented(raw, recipe.seed), raw.class_names
        if len(raw) < recipe.batch_size:
            raise InvalidArgumentError(
                "data", f"{len(raw)} images", f"at least one batch (recipe.batch_size, {recipe.batch_size})"
            )
        if recipe.batch_size % world:
            raise InvalidArgumentError("recipe.batch_size", recipe.batch_size, f"a multiple of {world} processes")
        if recipe.accumulate > recipe.batch_size // world:
            got = f"{recipe.accumulate} parts of a process's {recipe.batch_size // world} images"
            raise InvalidArgumentError("recipe.accumulate", got, "at most as many parts as images")
        self.sampler = EpochSampler(
            len(raw), recipe.batch_size, world_size=world, rank=rank, seed=recipe.seed, shuffle=True, drop_last=True
        )
        self.loader = loader(self.data, self.sampler, workers=workers)
        self.steps = len(raw) // recipe.batch_size
        self.schedule = Schedule(recipe, self.steps)
        if fabric.is_global_zero:
            for unfinished in self.schedule.unfinished():
                warnings.warn(unfinished, stacklevel=3)  # the caller of `finetune`
        self.validation, seen = None, None
        if validation is not None:
            seen = open_data(validation, transform=augmentation.eval_transform(), split="val")
            if len(seen) == 0:
                raise InvalidArgumentError("validation", "no image", "at least one")
            check_numbers(seen.class_names, raw.class_names, "validation", "the training data has it")
            self.validation = loader(seen, shard(len(seen), recipe.batch_size, world, rank), workers=workers)
        if isinstance(net, BcosNetwork | ConventionalNetwork) and augmentation.size is not None:
            net.image_size = augmentation.size
        self.embeds = embeds(net, recipe)
        check_metrics(self.embeds, recipe, validation is not None, explain_images is not None)
        check_bcos(net, recipe, begun=folder is not None and folder.state.exists())
        check_labelled("data", raw.labels, recipe.loss == "none")
        if seen is not None:
            check_labelled("validation", seen.labels, teacher is not None)
        # For the first step of this process; then nothing is left to be found out.
        self.answered = False
        self.validation_labels = None if seen is None or self.embeds else seen.labels
        self.progress = Progress()
        self.fused = fabric.device.type in FUSED_DEVICES
        self.eager_numbers = not self.fused
        self.targets = exponents(net)
        if recipe.learn_b:
            learn_exponents(net)
        self.bias_names = bias_names(net) if recipe.bias_decay_epochs is not None else []
        for module in net.modules():
            if isinstance(module, BatchNormUncentered2d):
                module.synchronised = recipe.sync_norms
        # As setup_module does; copies are made before it.
        fabric.strategy.precision.convert_module(net)
        check_dtypes(net, recipe)
        # With shards a copy is trained, and those who look at the network look at the whole one, which `_gather` fills.
        self.sharded = isinstance(fabric.strategy, ModelParallelStrategy)
        self.trained = _copied(net) if self.sharded else net
        self.teaching = None
        if recipe.distillation is not None and teacher is not None:
            self.teaching = Teaching(self.trained, teacher, recipe.distillation).to(fabric.device)
            self.teaching.teacher.to(fabric.device)
        self.average = None if recipe.ema is None else _average(self.trained, recipe.ema, self.sharded)
        self.model = fabric.setup_module(self.trained)
        if self.average is not None:
            self.average.to(fabric.device)
            if self.sharded:
                share_out(self.average.module, fabric.device)
        self.averaged = None if self.average is None else copy.deepcopy(net) if self.sharded else self.average.module
        loss_parameters = [] if self.teaching is None else list(self.teaching.parameters())
        # Stepped by ourselves (Fabric would move fp16's loss scale between one optimiser and the next).
        self.optimizers = make_optimizers(self.trained, recipe, loss_parameters, self.fused)
        # No part of what Fabric's module exchanges gradients of.
        self.unexchanged = [*loss_parameters, *(p for p in self.trained.parameters() if self.sharded and p.ndim == 0)]
        self.first_bad = FirstBad(fabric.device)
        self.saved: tuple[int, int] | None = None
        self.pictures = None if explain_images is None else checked_pictures(net, explain_images)[:MAX_PICTURES]
        self.label_loss = label_loss(recipe)
        self.features_alone = self.label_loss is None and not learns_outputs(recipe)
        self.stop: dict[str, int | None] = {"signal": None}
        self.finite_names: list[str] = []
        self.constants: list[tuple[Tensor, Tensor]] = []
        self.good: list[Tensor] = []

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, console: Console) -> TrainingResult:
        """Train to the end, or to the first signal."""
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.tidy()
        if self.folder is not None and self.folder.state.exists():
            self._load()
            if self.fabric.is_global_zero:
                self.folder.write_logs(self.progress)
        elif self.folder is not None and self.fabric.is_global_zero:
            self.folder.describe(self.recipe, self._about())
        if self.fabric.is_global_zero:
            begin_logs_at(self.fabric, self._done + 1)
        self._look_at_first()
        self._set_b(self._done)
        # The network as it came; what cannot be explained is found out before an epoch is spent on it.
        if self._done == 0 and self.fabric.is_global_zero:
            self._draw()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
        )  # fmt: skip
        shown = console.is_terminal and self.fabric.is_global_zero
        with ExitStack() as stack:
            bar = stack.enter_context(Bar(*columns, console=console, disable=not shown, transient=True))
            task = bar.add_task(
                "training", total=self.recipe.epochs * self.steps, numbers="",
                completed=self.progress.epoch * self.steps + self.progress.step,
            )  # fmt: skip

            def tell(text: str) -> None:
                bar.advance(task)
                if text:
                    bar.update(task, numbers=text)

            self.stop = stack.enter_context(_signals())
            stack.push(self._leave_exponents)
            while self.progress.epoch < self.recipe.epochs:
                bar.update(task, description=f"epoch {self.progress.epoch + 1}/{self.recipe.epochs}")
                self._epoch(tell)
        return self._result()

    def _look_at_first(self) -> None:
        """Note what need not be finite (a network may hold infinities of its own, as a mask) and what is not averaged.

        Raises:
            InvalidArgumentError: weights that are not finite, running statistics that are no numbers.
        """
        self._gather()
        for name, value in chain(self.net.named_parameters(), self.net.named_buffers()):
            if not is_finite(value) and (isinstance(value, nn.Parameter) or bool(value.isnan().any())):
                raise InvalidArgumentError("net", f"{name}, which is not finite", "finite weights and statistics")
        self.finite_names = [k for k, v in self.net.state_dict().items() if is_finite(v)]
        self.good = [value.clone() for value in self._statistics()]
        if self.average is not None:
            pairs = zip(self.average.module.buffers(), self.trained.buffers(), strict=True)
            self.constants = [(a, b) for a, b in pairs if not (b.is_floating_point() and is_finite(b))]

    def _statistics(self) -> list[Tensor]:
        return [value for value in self.trained.buffers() if value.is_floating_point()]

    def _leave_exponents(self, error: type[BaseException] | None, *_: object) -> None:
        """Where a run ends early, the network has its own B again (or what was learned), and another may begin."""
        if error is None:
            return
        if self.recipe.b_start is not None:
            for net in {*self._trained(), *self._whole()}:
                set_exponents(net, self.targets)
        for net in self._whole():
            fix_exponents(net)

    @property
    def _done(self) -> int:
        """Steps done, which is the number of the next."""
        return self.progress.epoch * self.steps + self.progress.step

    def _epoch(self, tell: Callable[[str], None]) -> None:
        progress = self.progress
        self.data.set_epoch(progress.epoch)
        self.sampler.set_epoch(progress.epoch)
        self.sampler.skip(progress.step)
        self._train_mode()
        began, images_before = time.perf_counter(), progress.sums.get("images", 0.0)
        sums: dict[str, Tensor] = {}
        for images, labels in self._batches():
            self._check_labels(labels)
            numbers = self._step(images, labels)
            progress.step += 1
            for name, value in (*numbers.items(), ("images", torch.ones(()))):
                sums[name] = sums.get(name, 0.0) + self._exact(value) * len(images)
            done = self._done
            stopping = self._must_stop(done)
            # Reading a number waits for the GPU, and asking other processes for theirs: not after every step.
            due = stopping or done % self.recipe.log_every == 0 or progress.step == self.steps
            if due or (self.eager_numbers and self.fabric.world_size == 1):
                self._check_finite(images, labels)
            if due or self.eager_numbers:
                self._read(sums)
                if done % self.recipe.log_every == 0:
                    self._log_step(done, {name: float(value) for name, value in numbers.items()})
                tell(f"loss {float(numbers['loss']):.4f}")
            else:
                tell("")
            if stopping:
                progress.seconds += time.perf_counter() - began
                self._interrupted()
        took = time.perf_counter() - began
        progress.seconds += took
        if progress.step < self.steps:
            if sums:
                self._check_finite(images, labels)
                self._read(sums)
            self._interrupted()
        self._check_weights()
        if self._validates:
            # Before a validation, which may fail, be long, or be stopped.
            self._save()
        row = self._row(took, progress.sums["images"] - images_before)
        progress.history.append(row)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        self._finish_epoch(row)

    def _train_mode(self) -> None:
        self.model.train()
        if self.recipe.freeze_norms:
            for module in self.trained.modules():
                if getattr(module, "running_var", None) is not None:
                    module.eval()

    def _exact(self, value: Tensor) -> Tensor:
        """So that it does not matter where in an epoch sums are read; Apple's GPUs have no float64."""
        return value if value.device.type == "mps" else value.double()

    def _read(self, sums: dict[str, Tensor]) -> None:
        """Move sums on the device to those of the epoch."""
        for name, value in sums.items():
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + float(value)
        sums.clear()

    def _batches(self) -> Iterator[Any]:
        """The loader's batches; they end early where the signal that stops this process ended one that reads."""
        try:
            yield from self.loader
        except RuntimeError:
            if self.stop["signal"] is None or self.fabric.world_size > 1:
                raise

    def _check_labels(self, labels: Tensor) -> None:
        """On the host, where nothing has to be waited for."""
        lowest = int(labels.min())
        self.labelled = lowest >= 0
        if self.label_loss is None:
            return
        if lowest < 0:
            raise InvalidArgumentError(
                "data", "images without labels", "labels", " (or recipe.loss='none' with a distillation)"
            )
        self.largest_label = int(labels.max())

    def _step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One optimiser step; the parts of the loss and the metric, means over the batch."""
        step = self._done
        self._set_lr(step)
        images, labels = self._prepared(images, labels, step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        parts = self._parts(images, labels)
        for i, (some, theirs) in enumerate(parts):
            share = len(some) / len(images)
            with self.fabric.no_backward_sync(self.model, enabled=i + 1 < len(parts)):
                try:
                    losses, right = self._losses(self.model, some, theirs)
                except InvalidArgumentError as error:
                    # A B-cos network on a CPU refuses such images itself, and cannot say where it was.
                    if error.argument != "images" or is_finite(some):
                        raise
                    where = f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1} of {self.steps}"
                    raise TrainingError(f"the images are not finite in {where}; {self._kept()}") from error
                loss = torch.stack(list(losses.values())).sum()
                self.first_bad.see(torch.isfinite(loss.detach()), step, loss=True)
                self.fabric.backward(loss * share * self.first_bad.factor())
            for name, value in {"loss": loss, **losses, self._metric: right}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * share
        self._update(step)
        return sums

    def _parts(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = self.recipe.accumulate
        return list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))

    def _prepared(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """A batch as the network sees it in a step, and the random numbers of that step."""
        images, labels = self.fabric.to_device(images), self.fabric.to_device(labels)
        # Everything random in a step depends on its number: nothing has to be stored to resume.
        epoch, within = divmod(step, self.steps)
        seed = derived_seed(self.recipe.seed, epoch, within, self.fabric.global_rank)
        torch.manual_seed(seed)
        if self.recipe.mixing is not None:
            classes = self._classes(images)
            if self.label_loss is not None:
                check_label(self.largest_label, classes)
            if self.labelled:
                images, labels = self.recipe.mixing(images, labels, classes, seed)
            else:  # the teacher's answer to the mixed image is what is learned
                images, _ = self.recipe.mixing(images, torch.zeros_like(labels), classes, seed)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def _losses(
        self, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss, and the share of right answers (of embeddings, the mean cosine)."""
        losses: dict[str, Tensor] = {}
        taught: Tensor | None = None
        if self.teaching is None:
            logits = self._answer(model, images)
        else:
            with self.teaching.watching() as seen:
                logits = self._answer(model, images)
                with self.fabric.autocast(), self._first_answer("teacher", self.teaching.teacher, images):
                    taught = self.teaching.teach(images)
            # Outside autocast: products of embeddings are too coarse in half precision.
            losses |= self.teaching(logits, taught, seen)
        self.answered = True
        if self.label_loss is not None:
            check_label(self.largest_label, logits.shape[1])
            losses["labels"] = self.label_loss(logits.float() if logits.dtype.itemsize < 4 else logits, labels)
        if self.features_alone:
            # FSDP's backward pass begins at the network's output, which such a loss does not reach; DDP waits for
            # gradients of all weights. One process does it too, so that weight decay is the same.
            nothing = torch.where(torch.zeros_like(logits, dtype=torch.bool), logits, 0).sum()
            losses = {name: value + nothing for name, value in losses.items()}
        if self.embeds and taught is not None:
            return losses, agreement(logits.detach(), taught).mean()
        hard = labels if labels.ndim == 1 else labels.argmax(1)
        if taught is not None and not self.labelled and taught.shape == logits.shape:
            hard = torch.where(hard < 0, taught.argmax(1), hard)
        return losses, (logits.detach().argmax(1) == hard).float().mean()

    def _answer(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with self._first_answer("net", self.net, images):
            output = model(images)
        output = checked_output(output)
        if not self.answered:
            check_labels("validation", self.validation_labels, output.shape[1])
        return output

    def _first_answer(self, argument: str, net: nn.Module, images: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self.answered else naming_refusals(argument, net, images)

    def _update(self, step: int) -> None:
        self._exchange_others()
        scaler = self._scaler
        if scaler is not None:
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
        parameters = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]
        finite = all_finite(p.grad for p in chain(*parameters) if p.grad is not None)
        if self.sharded:  # each process has seen its own rows
            processes: Any = self.fabric.all_reduce(finite.float(), reduce_op="sum")
            finite = processes == self.fabric.world_size
        if scaler is None:
            self.first_bad.see(finite, step, loss=False)
        if self.recipe.agc is not None:
            clip_adaptively(_agc_parameters(self.trained), self.recipe.agc)
        if self.recipe.clip_norm is not None:
            clip_norm(parameters[0], self.recipe.clip_norm)
        # A step that is not finite changes no weight: with loss scaling it is the scale's to fall, else the run ends.
        step_all(self.optimizers, finite)
        if scaler is not None:
            scaler.update()
        with torch.no_grad():
            for layer in bcos_layers(self.trained).values():
                if isinstance(layer.b, nn.Parameter):
                    layer.b.clamp_(min=1.0)
            if self.bias_names:
                now, after = self.schedule.bias_scale(step), self.schedule.bias_scale(step + 1)
                factor = torch.tensor(after / now if now > 0 else 0.0, device=finite.device)
                if scaler is None:  # a bad step changes nothing, nor does one behind it
                    factor = torch.where(self.first_bad.fine(), factor, 1.0)
                # The average is one of weights under today's scale.
                for net in self._trained():
                    for name in self.bias_names:
                        local(net.get_parameter(name)).mul_(factor)
        if self.recipe.b_start is not None:
            self._set_b(step + 1)
        if self.average is not None:
            self.average.update_parameters(self.trained)
            # Integers (positions, a count of batches) and infinities have no average.
            for copied, value in self.constants:
                copied.copy_(value)

    @property
    def _scaler(self) -> Any:
        """torch's GradScaler with fp16 on a GPU, else None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    @torch.no_grad()
    def _exchange_others(self) -> None:
        """Average over processes the gradients that Fabric's module does not."""
        if self.fabric.world_size > 1:
            for parameter in self.unexchanged:
                if parameter.grad is not None:
                    mean: Any = self.fabric.all_reduce(parameter.grad, reduce_op="mean")
                    parameter.grad.copy_(mean)

    def _trained(self) -> list[nn.Module]:
        """What is trained, and its average where there is one."""
        return [self.trained] if self.average is None else [self.trained, self.average.module]

    def _whole(self) -> list[nn.Module]:
        """The same to look at: to validate, explain and save."""
        return [self.net] if self.averaged is None else [self.net, self.averaged]

    def _gather(self) -> None:
        """Make what is looked at what was trained, all processes together; running statistics are the first one's."""
        if self.sharded:
            for trained, whole in zip(self._trained(), self._whole(), strict=True):
                broadcast(trained.buffers())
                copy_whole(trained, whole)

    def _set_lr(self, step: int) -> None:
        for group in self.optimizers[0].param_groups:
            group["lr"] = self.schedule.lr(step)

    def _set_b(self, step: int) -> None:
        """B of the networks for the step that comes next, and so of those that are validated and saved before it."""
        if not self.recipe.learn_b:
            values = {name: self.schedule.b(step, b) for name, b in self.targets.items()}
            # A scheduled B is no tensor, the average knows nothing of it.
            for net in {*self._trained(), *self._whole()}:
                set_exponents(net, values)

    def _run(self, net: nn.Module, images: Tensor) -> Tensor:
        """What a network returns, at the run's precision, as Fabric's wrapper of the network gives it."""
        precision = self.fabric.strategy.precision
        with precision.forward_context():
            outputs: Tensor = precision.convert_output(net(precision.convert_input(images)))
        return outputs

    def _classes(self, images: Tensor) -> int:
        if not hasattr(self, "_class_count"):
            with torch.no_grad(), self._first_answer("net", self.net, images):
                output = self._run(self.trained.eval(), images[:1])
            self._class_count = checked_output(output).shape[1]
            self._train_mode()
        return self._class_count

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _row(self, seconds: float, images: float) -> dict[str, Any]:
        progress = self.progress
        names = [name for name in progress.sums if name != "images"]
        totals = torch.tensor([*(progress.sums[n] for n in names), progress.sums["images"]], dtype=torch.float64)
        totals = self._summed(totals)
        means = dict(zip(names, (totals[:-1] / totals[-1]).tolist(), strict=True))
        row: dict[str, Any] = {"epoch": progress.epoch + 1}
        row["lr"] = self.optimizers[0].param_groups[0]["lr"]
        row |= {f"train_{name}": value for name, value in means.items()}
        if self.targets:
            found = exponents(self.net)
            row["b"] = sum(found.values()) / len(found)
        if self._validates:
            row |= {f"val_{name}": value for name, value in self._validate(self.net).items()}
            if self.averaged is not None:
                averaged = self._validate(self.averaged)
                row |= {f"ema_{name}": averaged[name] for name in ("loss", self._metric) if name in averaged}
        if images:
            row["images_per_s"] = images * self.fabric.world_size / seconds
        row["seconds"] = progress.seconds
        return row

    @property
    def _validates(self) -> bool:
        """Whether the epoch that is trained is to be validated."""
        epoch = self.progress.epoch + 1
        due = epoch == self.recipe.epochs or epoch % self.recipe.validate_every == 0
        return self.validation is not None and due

    @property
    def _metric(self) -> str:
        return "cosine" if self.embeds else "top1"

    def _seen(self, net: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and outputs of a network, in evaluation mode, batch by batch of this process's share.

        The network itself runs, not what exchanges gradients: processes may have different numbers of batches.
        """
        home = next(net.parameters()).device
        net.to(self.fabric.device)
        if self.fabric.world_size > 1:
            # As saved: a process's running statistics are its own.
            broadcast(net.buffers())
        net.eval()
        for images, labels in self.validation or ():
            if self.stop["signal"] is not None and self.fabric.world_size == 1:
                self._interrupted()
            images = self.fabric.to_device(images)
            if self.recipe.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            yield images, labels, checked_output(self._run(net, images))
        net.train().to(home)

    @torch.no_grad()
    def _agreement(self, net: nn.Module) -> dict[str, float]:
        """How near a network's embeddings are to the teacher's: mean loss between outputs, mean cosine."""
        if self.teaching is None:
            raise InvalidArgumentError("teacher", "None", "a network, whose embeddings are learned")
        totals = torch.zeros(3, dtype=torch.float64)
        for images, _, outputs in self._seen(net):
            with self.fabric.autocast():
                taught = self.teaching.teach(images)
            loss = sum(float(value) for value in self.teaching(outputs, taught).values())
            sums = (loss * len(images), agreement(outputs, taught).double().sum(), len(images))
            totals += torch.tensor([float(v) for v in sums], dtype=torch.float64)
        totals = self._summed(totals)
        found = dict(zip(("loss", "cosine"), (totals[:2] / totals[2]).tolist(), strict=True))
        if not learns_outputs(self.recipe):  # the loss is one of features, which validation does not look at
            del found["loss"]
        return found

    @torch.no_grad()
    def _validate(self, net: nn.Module) -> dict[str, float]:
        if self.embeds:
            return self._agreement(net)
        totals = torch.zeros(5, dtype=torch.float64)
        for images, labels, logits in self._seen(net):
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            classes = logits.shape[1]
            check_label(int(labels.max()), classes, "validation")
            unlabelled = bool((labels < 0).any())
            labels = self.fabric.to_device(labels)
            if unlabelled:
                if self.teaching is None:
                    raise InvalidArgumentError("validation", "images without labels", "labels, or a teacher")
                with self.fabric.autocast():
                    labels = torch.where(labels < 0, self.teaching.teach(images).argmax(1), labels)
            measure = self.label_loss if self.label_loss is not None else F.cross_entropy
            top = logits.topk(min(5, classes), 1).indices == labels[:, None]
            sums = (
                measure(logits, labels) * len(images), top[:, 0].sum(), top.any(1).sum(), len(images), classes > 5,
            )  # fmt: skip
            totals += torch.tensor([float(v) for v in sums], dtype=torch.float64)
        # A process without a batch does not know the classes.
        totals = self._summed(totals)
        loss, top1, top5 = (totals[:3] / totals[3]).tolist()
        return {"loss": loss, "top1": top1, **({"top5": top5} if totals[4] > 0 else {})}

    def _summed(self, values: Tensor) -> Tensor:
        if self.fabric.world_size == 1:
            return values
        total: Any = self.fabric.all_reduce(values.to(self.fabric.device), reduce_op="sum")
        summed: Tensor = total.cpu()
        return summed

    def _log_step(self, done: int, numbers: Mapping[str, float]) -> None:
        row = {"step": done, "epoch": self.progress.epoch + 1, "lr": self.optimizers[0].param_groups[0]["lr"]}
        row |= {f"train_{name}": value for name, value in numbers.items()}
        self.progress.steps.append(row)
        if self.fabric.is_global_zero:
            self._log("step", row, done)

    def _log(self, group: str, row: Mapping[str, Any], step: int) -> None:
        """Numbers for TensorBoard; those of steps and of epochs have tags of their own."""
        numbers = {f"{group}/{k}": v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        self.fabric.log_dict(numbers, step=step)

    # --- files -------------------------------------------------------------------------------------------------------

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        metric = row.get(f"val_{self.recipe.select}")
        sign = -1.0 if self.recipe.select == "loss" else 1.0
        progress = self.progress
        better = (
            metric is not None
            and math.isfinite(metric)
            and (progress.best is None or sign * metric > sign * progress.best)
        )
        if better:
            progress.best = metric
        if self.folder is not None:
            # All else before the state: a kill between the two repeats the epoch, and overwrites it.
            if self.fabric.is_global_zero:
                with self._writing():
                    if better:
                        save_network(self.net, self.folder.path / "best.safetensors")
                    save_network(self.net, self.folder.path / "last.safetensors")
                    if self.averaged is not None:
                        save_network(self.averaged, self.folder.path / "ema.safetensors")
                    self._draw()
                    self.folder.write_logs(progress)
            self._save()
            if self.fabric.is_global_zero:
                self._log("epoch", row, progress.epoch * self.steps)
        if self.on_epoch is not None and self.fabric.is_global_zero:
            self.on_epoch(row)

    def _draw(self) -> None:
        if self.pictures is None or self.folder is None or not isinstance(self.net, BcosNetwork):
            return
        from bcos_rt.explanation.explain import explain

        home = next(self.net.parameters()).device
        net = self.net.to(self.fabric.device)
        with fixed_exponents(net), torch.random.fork_rng(devices=[]):
            explanation = explain(net, self.pictures.to(self.fabric.device))
        net.to(home)
        target = self.folder.path / "explanations" / f"epoch_{self.progress.epoch:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        explanation.save(target, dpi=70)
        for logger in self.fabric.loggers:
            with Image.open(target) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer: Any = logger
            writer.experiment.add_image("explanations", pixels, self.progress.epoch * self.steps, dataformats="HWC")

    def _state(self) -> dict[str, nn.Module | Optimizer]:
        state: dict[str, nn.Module | Optimizer] = {"model": self.trained}
        state |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(self.optimizers)}
        if self.average is not None:
            state["average"] = self.average
        if self.teaching is not None:
            state["teaching"] = self.teaching
        return state

    def _save(self) -> None:
        """Save the state, whole, whatever the processes hold of it: all of them together, the first writes."""
        if self.folder is None or self.saved == (self.progress.epoch, self.progress.step):
            return
        # Sums of the unfinished epoch are each process's own.
        sums: Any = torch.tensor(list(self.progress.sums.values()), dtype=torch.float64)
        if self.fabric.world_size > 1:
            sums = self.fabric.all_gather(sums)
        values = self.folder.state_values(self.recipe, self.progress)
        values["sums"] = sums.reshape(self.fabric.world_size, len(self.progress.sums)).tolist()
        values["precision"] = dict(self.fabric.strategy.precision.state_dict())
        values["targets"] = self.targets
        values["trained_on"] = self._trained_on()
        values |= {name: whole_state(thing) for name, thing in self._state().items()}
        if self.fabric.is_global_zero:
            with self._writing(), replacing(self.folder.state) as temporary:
                torch.save(values, temporary)
        self.fabric.barrier()
        self.saved = self.progress.epoch, self.progress.step

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What writing raises where it fails; a full disk is an error of torch's writer."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            if isinstance(error, RuntimeError) and "inline_container" not in reason:
                raise
            raise TrainingError(
                f"the run's folder could not be written ({reason}): a full disk? {self._kept()}"
            ) from error

    def _load(self) -> None:
        if self.folder is None:
            return
        kept = self.folder.read_state(self.recipe)
        self._check_same(kept)
        if len(kept["sums"]) != self.fabric.world_size and kept["progress"]["step"]:
            raise InvalidArgumentError(
                "devices", f"{self.fabric.world_size} processes", f"{len(kept['sums'])}, as when it stopped in an epoch"
            )
        for name, thing in self._state().items():
            try:
                load_whole(thing, kept[name])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise CheckpointError(
                    f"{self.folder.state}: {name!r} is not what such a run saves ({type(error).__name__}: {reason})"
                ) from error
        self.progress = Progress(**kept["progress"])
        self.saved = self.progress.epoch, self.progress.step
        if self.progress.step:
            mine = kept["sums"][self.fabric.global_rank]
            self.progress.sums = dict(zip(self.progress.sums, mine, strict=True))
        for optimizer in self.optimizers:
            set_fused(optimizer, self.fused)
        if self.progress.best is not None and not math.isfinite(self.progress.best):
            self.progress.best = None
        self.targets = kept["targets"]
        if kept["precision"]:
            self.fabric.strategy.precision.load_state_dict(kept["precision"])

    def _trained_on(self) -> dict[str, Any]:
        """What a run that goes on must have again: an epoch's steps, and so every schedule, depend on the data."""
        names = self.class_names
        return {
            "images": len(self.data),
            "classes": None if names is None else list(names),
            "tensors": _shapes(self.net),
        }

    def _check_same(self, kept: Mapping[str, Any]) -> None:
        """Refuse another network or other data than the run began with; states of older versions do not say."""
        then, now = kept.get("trained_on"), self._trained_on()
        if then is None:
            return
        hint = " (or another output folder)"
        for name, what in (("images", "images"), ("classes", "class names")):
            if then[name] != now[name]:
                raise InvalidArgumentError(
                    "data", f"{what} {now[name]!r}", f"{then[name]!r}, which the run began with", hint
                )
        other = sorted(
            k for k in {**then["tensors"], **now["tensors"]} if then["tensors"].get(k) != now["tensors"].get(k)
        )
        if other:
            got, expected = (shapes["tensors"].get(other[0], "missing") for shapes in (now, then))
            raise InvalidArgumentError(
                "net", f"{other[0]}: {got}", f"{expected}, as in the network the run began with", hint
            )

    def _about(self) -> dict[str, Any]:
        from bcos_rt import __version__

        source = getattr(self.net, "source", None)
        return {
            "network": source or type(self.net).__name__,
            "conversion": self.net.recipe.to_dict() if isinstance(self.net, BcosNetwork) else None,
            "images": len(self.data),
            "steps_per_epoch": self.steps,
            "processes": self.fabric.world_size,
            "device": str(self.fabric.device),
            "versions": {
                "bcos-rt": __version__, "torch": torch.__version__, "lightning-fabric": version("lightning-fabric")
            },
        }  # fmt: skip

    # --- endings -----------------------------------------------------------------------------------------------------

    def _must_stop(self, done: int) -> bool:
        asked = self.stop["signal"] is not None
        if self.fabric.world_size == 1:
            return asked
        # All processes stop after the same step, so they must agree; that costs a message, hence not every step.
        if done % self.recipe.log_every:
            return False
        return bool(self._summed(torch.tensor([float(asked)])) > 0)

    def _interrupted(self) -> None:
        where = f"epoch {self.progress.epoch + 1}, step {self.progress.step} of {self.steps}"
        if self.folder is None:
            if self.stop["signal"] == signal.SIGINT:
                raise KeyboardInterrupt
            raise TrainingInterruptedError(f"training was stopped in {where}; without output nothing was saved")
        self._check_weights()
        self._save()
        if self.fabric.is_global_zero:
            self.folder.write_logs(self.progress)
        said = f"training was stopped in {where}; the state is in {self.folder.state}, resume=True (--resume) goes on"
        raise KeyboardInterrupt(said) if self.stop["signal"] == signal.SIGINT else TrainingInterruptedError(said)

    def _check_finite(self, images: Tensor, labels: Tensor) -> None:
        """Raise where a step since the last look was not finite, all processes together; the batch is the last one."""
        step, in_loss = self.first_bad.read()
        if self.fabric.world_size > 1:
            gathered: Any = self.fabric.all_gather(torch.tensor([step, in_loss], device=self.fabric.device))
            bad = [(int(s), bool(loss)) for s, loss in gathered.tolist() if s >= 0]
            step = min((s for s, _ in bad), default=-1)
            in_loss = any(loss for s, loss in bad if s == step)
        if step >= 0:
            self._not_finite(step, in_loss, images, labels)
        _copy(self._statistics(), self.good)
        scaler = self._scaler
        if scaler is not None and float(scaler.get_scale()) < SMALLEST_SCALE:
            self._not_finite(self._done - 1, False, images, labels)

    def _not_finite(self, step: int, in_loss: bool, images: Tensor, labels: Tensor) -> None:
        """Do a step that was not finite again, and raise with the name of what was so first.

        No weight has changed since, and the order of images is known. Running statistics are left as they were when a
        step was last seen to be finite.
        """
        epoch, within = divmod(step, self.steps)
        if step != self._done - 1:
            self.sampler.set_epoch(epoch)
            self.sampler.skip(within)
            images, labels = read_batch(self.data, next(iter(self.sampler)))
            self._check_labels(labels)
        self._train_mode()
        self._set_b(step)
        images, labels = self._prepared(images, labels, step)
        found = None
        bad: dict[str, None] = {}

        def compute(some: Tensor, theirs: Tensor) -> Tensor:
            losses, _ = self._losses(lambda x: self._run(self.trained, x), some, theirs)
            bad.update(dict.fromkeys(k for k, v in losses.items() if not is_finite(v)))
            return torch.stack(list(losses.values())).sum()

        if not is_finite(images):
            found = "the images"
        with self.fabric.no_backward_sync(self.model):
            for part in self._parts(images, labels):
                if found is None and self.teaching is not None:
                    with self.fabric.autocast():
                        found = None if is_finite(self.teaching.teach(part[0])) else "the teacher's output"
                again = first_not_finite(self.trained, partial(compute, *part))
                found = found or again
        found, names = self._first_of_all(found, list(bad))
        _copy(self.good, self._statistics())
        self._gather()
        what = "gradient"
        if in_loss:
            what = f"loss ({', '.join(names)})" if names else "loss"
        raise TrainingError(
            f"the {what} is not finite in epoch {epoch + 1}, step {within + 1} of {self.steps}; "
            f"first not finite: {found}; {self._kept()}. A smaller learning rate, gradient clipping or fp32 may help."
        )

    def _kept(self) -> str:
        """What is on disk, in words."""
        if self.folder is None or self.saved is None:
            return "nothing was saved"
        epoch, step = self.saved
        where = f"epoch {epoch + 1}, step {step}" if step else f"the end of epoch {epoch}"
        return f"{self.folder.state} is that of {where}"

    def _first_of_all(self, found: str | None, names: list[str]) -> tuple[str, list[str]]:
        """What the first process found that found something, and its parts of the loss."""
        nothing = "nothing, when the step was done again"
        if self.fabric.world_size == 1:
            return found or nothing, names
        all_found: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(all_found, (found, names))
        some = ((f"{text}, in process {i}", parts) for i, (text, parts) in enumerate(all_found) if text is not None)
        return next(some, (nothing, []))

    def _check_weights(self) -> None:
        """Raise before anything is saved that is not finite: an update of finite gradients may overflow."""
        self._gather()
        states = [net.state_dict() for net in self._whole()]
        bad = [name for state in states for name in self.finite_names if not is_finite(state[name])]
        bad += self._bad_moments()
        if float(self._summed(torch.tensor([float(len(bad))]))) == 0:
            return
        raise TrainingError(
            f"{bad[0] if bad else 'a tensor of another process'} is not finite after epoch {self.progress.epoch + 1}, "
            f"step {self.progress.step} of {self.steps}; {self._kept()}. A smaller learning rate, gradient clipping or "
            "fp32 may help."
        )

    def _bad_moments(self) -> list[str]:
        """What optimisers (a square may overflow where its gradient did not) and a loss's own parameters hold."""
        bad = []
        names = {id(parameter): name for name, parameter in self.trained.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                what = names.get(id(parameter), "a parameter of the loss")
                found = [k for k, v in state.items() if isinstance(v, Tensor) and not is_finite(v)]
                bad += [f"the optimiser's {key} of {what}" for key in found]
        if self.teaching is not None:
            bad += [f"the loss's {name}" for name, p in self.teaching.named_parameters() if not is_finite(p)]
        return bad

    def _result(self) -> TrainingResult:
        self._gather()
        for one in self._whole():
            one.to(self.fabric.device)
            fix_exponents(one)
            if isinstance(one, BcosNetwork) and len(found := set(exponents(one).values())) == 1:
                one.recipe = one.recipe.replace(b=found.pop())
            one.eval()
        history = tuple(self.progress.history)
        metric = f"val_{self.recipe.select}"
        best = next((row for row in history if metric in row and row[metric] == self.progress.best), None)
        return TrainingResult(self.net, self.averaged, history, best, None if self.folder is None else self.folder.path)


@torch.no_grad()
def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _copied(net: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(net)
    except RuntimeError as error:
        got = f"a {type(net).__name__} that cannot be copied ({error})"
        raise InvalidArgumentError("net", got, "one that can, for strategy='fsdp'") from error


def _average(net: nn.Module, decay: float, sharded: bool) -> AveragedModel:
    """The exponential moving average of a network; with shards it is shared out as the network will be."""
    if not sharded:
        return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
    # One tensor at a time: the other kernel takes no mixture of tensors with shards and without.
    return AveragedModel(net, avg_fn=get_ema_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


def _shapes(net: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in net.state_dict().items()}


def _agc_parameters(net: nn.Module) -> list[nn.Parameter]:
    exempt = {id(layer.b) for layer in bcos_layers(net).values()}
    return [p for p in net.parameters() if p.grad is not None and id(p) not in exempt]


@contextmanager
def _signals() -> Iterator[dict[str, int | None]]:
    """Inside, SIGTERM and the first Ctrl-C are noted under ``"signal"``; the second Ctrl-C interrupts at once."""
    seen: dict[str, int | None] = {"signal": None}
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and seen["signal"] is not None:
            raise KeyboardInterrupt
        seen["signal"] = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
