"""Losses on labels, and what a student takes from a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.training.features import place_of
from bcos_rt.training.recipe import Distillation, TrainingRecipe

__all__ = [
    "SigLip",
    "Teaching",
    "agreement",
    "bce",
    "check_label",
    "distance_of_features",
    "distance_of_logits",
    "label_loss",
    "uniform_off_bce",
]


def as_targets(labels: Tensor, logits: Tensor) -> Tensor:
    """Class numbers [N] as one-hot targets [N, classes]; what is that already (mixed images) as it is."""
    if labels.ndim == 2:
        return labels.to(logits.dtype)
    return F.one_hot(_in_range(labels, logits), logits.shape[1]).to(logits.dtype)


def _in_range(labels: Tensor, logits: Tensor) -> Tensor:
    # On other devices looking would wait for them in every step: the trainer looks before labels go there.
    if labels.ndim == 1 and labels.numel() and labels.device.type == "cpu":
        check_label(int(labels.max()), logits.shape[1])
    return labels


def check_label(largest: int, classes: int, argument: str = "data") -> None:
    """Raise InvalidArgumentError for a label without a logit.

    torch's own errors name no label, and on a GPU end the process's use of it.
    """
    if largest >= classes:
        raise InvalidArgumentError(argument, f"label {largest}", f"labels 0 to {classes - 1}, as the network has")


def bce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy, the mean over images and classes, what B-cos networks are trained with.

    Args:
        logits: [N, classes].
        labels: [N] class numbers, or [N, classes] targets in [0, 1].
        smoothing: s turns targets t into ``t (1 - s) + s / classes`` (Szegedy et al., arXiv 1512.00567).
    """
    targets = as_targets(labels, logits)
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, targets)


def uniform_off_bce(logits: Tensor, labels: Tensor, off_value: float | None = None) -> Tensor:
    """Binary cross-entropy whose targets are at least ``off_value``, by default 1 / classes.

    So that a network that knows nothing has the loss's minimum at the uniform distribution (B-cos v2's code,
    ``UniformOffLabelsBCEWithLogitsLoss``).
    """
    off = 1.0 / logits.shape[1] if off_value is None else off_value
    return F.binary_cross_entropy_with_logits(logits, as_targets(labels, logits).clamp(min=off))


def label_loss(recipe: TrainingRecipe) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The recipe's loss on labels, None for ``"none"``.

    On the CPU it raises InvalidArgumentError for a label without a logit.
    """
    if recipe.loss == "bce":
        return lambda logits, labels: bce(logits, labels, recipe.smoothing)
    if recipe.loss == "uniform_off_bce":
        return lambda logits, labels: uniform_off_bce(logits, labels, recipe.off_value)
    if recipe.loss == "cross_entropy":
        return lambda logits, labels: F.cross_entropy(
            logits, _in_range(labels, logits), label_smoothing=recipe.smoothing
        )
    return None


def distance_of_logits(student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0) -> Tensor:
    """How far a student's logits [N, classes] are from a teacher's; see :class:`Distillation`."""
    if student.shape != teacher.shape:
        raise InvalidArgumentError(
            "teacher", f"logits of shape {tuple(teacher.shape)}", f"the student's, {tuple(student.shape)}"
        )
    if kind == "mse":
        return F.mse_loss(student, teacher)
    probabilities = torch.softmax(teacher / temperature, 1)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(student, probabilities)
    log_student = torch.log_softmax(student / temperature, 1)
    return F.kl_div(log_student, probabilities, reduction="batchmean") * temperature**2


def distance_of_features(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """How far features [N, C, ...] are from a teacher's; channels are dimension 1, or the last of token sequences.

    The cosine's mean is over the places where the teacher has any: after a ReLU a place may be all zeros.
    """
    if kind == "mse":
        return F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=1e-12)
    dim = 1 if student.ndim == 4 else -1
    there = (teacher != 0).any(dim)
    distance = (1 - F.cosine_similarity(student, teacher, dim=dim)) * there
    return distance.sum() / there.sum().clamp(min=1)


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """The cosines [N] of a student's embeddings [N, D] with a teacher's."""
    _check_embeddings(student, teacher)
    return F.cosine_similarity(student.float(), teacher.float(), dim=1)


def _check_embeddings(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim != 2:
        raise InvalidArgumentError(
            "teacher", f"outputs of shape {tuple(teacher.shape)}", f"the student's embeddings, {tuple(student.shape)}"
        )


class SigLip(nn.Module):
    """Pairwise sigmoid loss between embeddings (SigLIP, Zhai et al. 2023, eq. 1).

    ``-mean_i sum_j log sigmoid(z_ij (t <s_i, t_j> + b))``, z_ij = 1 where i = j and -1 elsewhere, embeddings of norm 1;
    t = exp(``scale``) and b start at 10 and -10, and stay there unless ``learned``. Pairs are those of one process's
    batch.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, learned: bool = True) -> None:
        super().__init__()
        for name, value in (("scale", torch.tensor(10.0).log()), ("bias", torch.tensor(-10.0))):
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_embeddings(student, teacher)
        cosines = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T
        logits = self.scale.exp() * cosines + self.bias
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)


class Teaching(nn.Module):
    """The loss of a student against a teacher.

    Args:
        student: the network that learns; hooks on its modules read their outputs.
        teacher: any network that takes the same images in [0, 1]. It is used in evaluation mode, without gradients.

    Raises:
        InvalidArgumentError: a module that one of the two does not have.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: Distillation) -> None:
        super().__init__()
        self.settings = settings
        self.siglip = SigLip(settings.siglip_learned) if settings.siglip > 0 else None
        # In a tuple: the teacher is no submodule, its weights are neither trained nor saved.
        self._teacher = (teacher.eval(),)
        self._watched = settings.modules if settings.features > 0 else ()
        sides = {"student": student, "teacher": teacher}
        self._places = [(s, name, place_of(net, name, s)) for name in self._watched for s, net in sides.items()]

    @property
    def teacher(self) -> nn.Module:
        """The teacher; :meth:`to` does not move it."""
        return self._teacher[0]

    @contextmanager
    def watching(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Inside, every forward pass leaves the modules' outputs in the dictionary: side -> module -> features."""
        seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        with ExitStack() as stack:
            for side, name, place in self._places:
                stack.callback(place.watch(partial(seen[side].__setitem__, name)).remove)
            yield seen

    def teach(self, images: Tensor) -> Tensor:
        """The teacher's outputs, without gradients; inside :meth:`watching` its modules are seen."""
        with torch.no_grad():
            taught: Tensor = self.teacher(images)
        return taught

    def forward(
        self, logits: Tensor, taught: Tensor, seen: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The weighted parts of the loss by name, for the student's ``logits`` (or embeddings) and the teacher's.

        Args:
            seen: what :meth:`watching` saw of both passes; None leaves features out.
        """
        settings = self.settings
        # fp16's and bf16's sums are too coarse for a loss.
        logits, taught = logits.float(), taught.float()
        parts: dict[str, Tensor] = {}
        if settings.logits:
            distance = distance_of_logits(logits, taught, settings.logit_loss, settings.temperature)
            parts["distill_logits"] = settings.logits * distance
        if self.siglip is not None:
            parts["distill_siglip"] = settings.siglip * self.siglip(logits, taught)
        if settings.embedding:
            parts["distill_embedding"] = settings.embedding * (1 - agreement(logits, taught)).mean()
        if self._watched and seen is not None:
            distances = [self._distance(name, seen) for name in self._watched]
            parts["distill_features"] = settings.features * torch.stack(distances).mean()
        return parts

    def _distance(self, name: str, seen: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        for side, features in seen.items():
            if name not in features:
                raise InvalidArgumentError(
                    "Distillation.modules", f"{name!r}, which the {side} never calls", "modules that both call"
                )
        ours, theirs = seen["student"][name], seen["teacher"][name]
        if ours.shape != theirs.shape:
            raise InvalidArgumentError(
                "Distillation.modules",
                f"{name!r}, of shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher",
                "modules whose outputs have the same shape",
            )
        return distance_of_features(ours.float(), theirs.float(), self.settings.feature_loss)
