"""How a network is trained: every choice a field of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bcos_rt.data.augment import Augmentation, Mixing, check_used, make_plain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, did_you_mean

__all__ = ["Distillation", "TrainingRecipe"]

Loss = Literal["bce", "uniform_off_bce", "cross_entropy", "none"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]


def _check_kinds(settings: Any) -> None:
    """Fields of a few values have one of them, fields that are true or false are."""
    hints = get_type_hints(type(settings))
    for entry in fields(settings):
        hint, got = hints[entry.name], getattr(settings, entry.name)
        if hint is bool and not isinstance(got, bool):
            raise InvalidTypeError(f"{type(settings).__name__}.{entry.name}", repr(got), "True or False")
        if get_origin(hint) is Literal and got not in get_args(hint):
            raise InvalidArgumentError(
                f"{type(settings).__name__}.{entry.name}",
                repr(got),
                "one of " + ", ".join(map(repr, get_args(hint))),
                did_you_mean(str(got), map(str, get_args(hint))),
            )


def _check_numbers(settings: Any, **ranges: tuple[float, float]) -> None:
    """Each named field a finite number in the closed range, or None where its type allows that."""
    hints = get_type_hints(type(settings))
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is None and type(None) in get_args(hints[name]):
            continue
        argument = f"{type(settings).__name__}.{name}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidTypeError(argument, repr(value), "a number")
        if not (math.isfinite(value) and low <= value <= high):
            expected = f"at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
            raise InvalidArgumentError(argument, value, expected)


@dataclass(frozen=True)
class Distillation:
    """What a student learns from a teacher, added to the loss on labels.

    Attributes:
        logits: weight of the loss between logits, see ``logit_loss``.
        logit_loss: ``"kl"``, Kullback-Leibler divergence of the softmax at ``temperature``, times its square
            (Hinton et al. 2015); ``"bce"``, binary cross-entropy with the teacher's softmax probabilities as targets,
            what suits a B-cos network's logits; ``"mse"`` of the logits.
        temperature: softens the teacher's probabilities.
        features: weight of the loss between features of ``modules``.
        modules: names of submodules that both networks have, as in the source model: ``("layer1", "layer2")``.
        feature_loss: ``"cosine"``, one minus the cosine of the two feature vectors at each place; ``"mse"``, the mean
            square error over the teacher's mean square, so that it needs no scale of its own.
        siglip: weight of the pairwise sigmoid loss (SigLIP, Zhai et al. 2023, eq. 1) between the two networks' outputs,
            for networks whose output is an embedding.
        siglip_learned: whether its scale and bias are learned; otherwise they stay at 10 and -10.
        embedding: weight of one minus the cosine of the two networks' outputs, for embeddings likewise.
    """

    logits: float = 1.0
    logit_loss: Literal["kl", "bce", "mse"] = "kl"
    temperature: float = 1.0
    features: float = 0.0
    modules: tuple[str, ...] = ()
    feature_loss: Literal["cosine", "mse"] = "cosine"
    siglip: float = 0.0
    siglip_learned: bool = True
    embedding: float = 0.0

    def __post_init__(self) -> None:
        _check_kinds(self)
        unbounded = (0.0, math.inf)
        _check_numbers(
            self, logits=unbounded, features=unbounded, siglip=unbounded, embedding=unbounded,
            temperature=(1e-6, math.inf),
        )  # fmt: skip
        if not isinstance(self.modules, list | tuple) or not all(isinstance(m, str) for m in self.modules):
            raise InvalidTypeError("Distillation.modules", repr(self.modules), "a sequence of module names")
        object.__setattr__(self, "modules", tuple(self.modules))
        if self.features > 0 and not self.modules:
            raise InvalidArgumentError("Distillation.modules", "()", "module names, for features > 0")
        if self.logits == self.features == self.siglip == self.embedding == 0:
            raise InvalidArgumentError("Distillation", "all weights 0", "a weight > 0, or no distillation")
        if self.temperature != 1 and (self.logits == 0 or self.logit_loss != "kl"):
            got = f"{self.temperature} with logits={self.logits:g}, logit_loss={self.logit_loss!r}"
            raise InvalidArgumentError("Distillation.temperature", got, "1, as it is of logit_loss='kl' alone")
        for name, weight in (("logit_loss", "logits"), ("modules", "features"), ("feature_loss", "features")):
            default = next(entry.default for entry in fields(self) if entry.name == name)
            if getattr(self, weight) == 0 and getattr(self, name) != default:
                got = f"{getattr(self, name)!r} with {weight}=0, which does not use it"
                raise InvalidArgumentError(f"Distillation.{name}", got, f"{default!r}, or {weight} > 0")
        make_plain(self)


@dataclass(frozen=True)
class TrainingRecipe:
    """Everything :func:`bcos_rt.training.finetune` can be told about training.

    The defaults fine-tune a B-cosified network as published (Arya et al., NeurIPS 2024, arXiv 2411.00715, and its
    code): Adam, learning rate 1e-4, cosine to 0 without warm-up, uniform-off-labels BCE, adaptive gradient clipping.
    One thing differs: the published CNNs' rate changes with every epoch, here with every step (``step_schedule``).

    Attributes:
        epochs: passes over the data.
        batch_size: images a step, over all processes and accumulated parts together. Images that fill no batch are left
            out, other ones in every epoch.
        accumulate: parts a process's batch is computed in, one after the other; norms then see one part at a time.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (Nesterov off).
        lr: peak learning rate.
        momentum, betas: of SGD; of Adam and AdamW.
        weight_decay: in Adam and SGD an L2 term, decoupled in AdamW. Not on biases and norms unless ``decay_all``, and
            never on a learned B.
        schedule: ``"cosine"`` to ``min_lr``; ``"cosine_restarts"`` the same again and again, a period of
            ``restart_epochs``, each ``restart_factor`` as long as the one before (SGDR, Loshchilov & Hutter 2017);
            ``"constant"``.
        warmup_epochs, warmup_steps: before the schedule, one of the two (steps need ``step_schedule``); ``warmup``
            ``"linear"`` rises from ``warmup_factor`` times lr, ``"constant"`` stays there.
        step_schedule: whether the rate changes with every step or (False, as the published CNNs') with every epoch.
        loss: on labels. ``"bce"``: binary cross-entropy with one-hot targets; ``"uniform_off_bce"``: its targets are
            ``off_value`` (default 1 / classes) instead of 0 for the wrong classes; ``"cross_entropy"``; ``"none"``
            for distillation alone, on images without labels.
        smoothing: label smoothing of ``"bce"`` and ``"cross_entropy"``.
        distillation: what is learned from a teacher.
        agc: adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171): a filter's gradient norm stays under this
            share of the filter's norm, the classifier's filters too; None for none.
        clip_norm: largest norm of the whole gradient; None for no limit.
        ema: decay a step of the exponential moving average of the weights, e.g. 0.9999; None for no average.
        augmentation, mixing: of the training images; no normalisation, networks do that themselves.
        b_start, b_epochs: B rises linearly, with every step, from ``b_start`` to the network's own B over the first
            ``b_epochs``; None leaves it as it is. Between steps it is the next step's: what is validated and saved has
            reached its own B after ``b_epochs``.
        learn_b: learn each layer's B, from where it is, with SGD at ``b_lr``; kept at 1 or above.
        bias_decay_epochs: scale the biases of a network converted with ``biases="keep"`` linearly to 0 over so many
            epochs, where they stay; those that ``biases="drop"`` would have removed, also in the average. None keeps
            them.
        precision: Lightning Fabric's: ``"32-true"``, ``"bf16-mixed"``, ``"16-mixed"`` (with loss scaling),
            ``"64-true"``. Norms compute in fp32 in any case.
        channels_last: the images' memory format; what convolutions here are fastest in.
        sync_norms: uncentred BatchNorms take their statistics over all processes.
        freeze_norms: norms with running statistics use them, and leave them as they are: for few images or small
            batches.
        seed: of the order of images, augmentation, dropout.
        select: metric that decides which epoch is best: ``"top1"``, ``"loss"``, or for networks whose output is an
            embedding ``"cosine"``, the mean agreement with the teacher; of the validation data, by the network itself
            also where there is an average.
        validate_every: epochs between validations; the last epoch is always validated.
        log_every: steps between rows of the step log.
    """

    epochs: int = 90
    batch_size: int = 256
    accumulate: int = 1
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-4
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay_all: bool = False
    schedule: Literal["cosine", "cosine_restarts", "constant"] = "cosine"
    min_lr: float = 0.0
    restart_epochs: float = 10.0
    restart_factor: float = 1.0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup: Literal["linear", "constant"] = "linear"
    warmup_factor: float = 0.01
    step_schedule: bool = True
    loss: Loss = "uniform_off_bce"
    off_value: float | None = None
    smoothing: float = 0.0
    distillation: Distillation | None = None
    agc: float | None = 0.01
    clip_norm: float | None = None
    ema: float | None = None
    augmentation: Augmentation = field(default_factory=Augmentation.imagenet)
    mixing: Mixing | None = None
    b_start: float | None = None
    b_epochs: float = 0.0
    learn_b: bool = False
    b_lr: float = 1e-4
    bias_decay_epochs: float | None = None
    precision: Precision = "32-true"
    channels_last: bool = True
    sync_norms: bool = False
    freeze_norms: bool = False
    seed: int = 0
    select: Literal["top1", "loss", "cosine"] = "top1"
    validate_every: int = 1
    log_every: int = 50

    def __post_init__(self) -> None:
        _check_kinds(self)
        for name, low in (
            ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("warmup_steps", 0), ("validate_every", 1),
            ("log_every", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"TrainingRecipe.{name}", repr(value), "an integer")
            if value < low:
                raise InvalidArgumentError(f"TrainingRecipe.{name}", value, f"at least {low}")
        unbounded = (0.0, math.inf)
        _check_numbers(
            self, lr=unbounded, weight_decay=unbounded, min_lr=unbounded, warmup_epochs=unbounded, b_epochs=unbounded,
            b_lr=unbounded, momentum=(0, 1), smoothing=(0, 1), off_value=(0, 1), agc=unbounded, clip_norm=unbounded,
            ema=(0, 1), warmup_factor=(0, 1), b_start=(1, math.inf), bias_decay_epochs=unbounded,
            restart_epochs=(1e-3, math.inf), restart_factor=(1, math.inf),
        )  # fmt: skip
        for name in ("agc", "clip_norm"):
            if getattr(self, name) == 0:
                raise InvalidArgumentError(f"TrainingRecipe.{name}", 0, "a number > 0, or None for no clipping")
        for name, kind in _NESTED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name != "augmentation"):
                expected = kind.__name__ + ("" if name == "augmentation" else " or None")
                raise InvalidTypeError(f"TrainingRecipe.{name}", repr(value), expected)
        if not isinstance(self.betas, list | tuple) or not all(isinstance(b, int | float) for b in self.betas):
            raise InvalidTypeError("TrainingRecipe.betas", repr(self.betas), "two numbers in [0, 1)")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise InvalidArgumentError("TrainingRecipe.betas", tuple(self.betas), "two numbers in [0, 1)")
        if self.ema == 1:
            raise InvalidArgumentError(
                "TrainingRecipe.ema", 1, "a number < 1, or None: the average would stay as it is"
            )
        make_plain(self)
        check_used(self, _USED_BY)
        if not (self.warmup_epochs or self.warmup_steps):
            for name in ("warmup", "warmup_factor"):
                if getattr(self, name) != _DEFAULTS[name]:
                    got = f"{getattr(self, name)!r} without a warm-up"
                    expected = f"{_DEFAULTS[name]!r}, or warmup_epochs or warmup_steps above 0"
                    raise InvalidArgumentError(f"TrainingRecipe.{name}", got, expected)
        if self.warmup_epochs and self.warmup_steps:
            raise InvalidArgumentError(
                "TrainingRecipe.warmup_steps", self.warmup_steps, "0 beside warmup_epochs", " (give one of the two)"
            )
        if self.warmup_steps and not self.step_schedule:
            got = f"{self.warmup_steps} with step_schedule=False"
            raise InvalidArgumentError("TrainingRecipe.warmup_steps", got, "0 (warmup_epochs), or step_schedule=True")
        if self.batch_size < self.accumulate:
            raise InvalidArgumentError("TrainingRecipe.accumulate", self.accumulate, f"at most {self.batch_size}")
        if self.loss == "none" and self.distillation is None:
            raise InvalidArgumentError("TrainingRecipe.loss", "'none'", "a loss, or a distillation")
        if self.learn_b and self.b_start is not None:
            raise InvalidArgumentError("TrainingRecipe.b_start", self.b_start, "None beside learn_b")
        if (self.b_start is None) != (self.b_epochs == 0):
            got = f"{self.b_epochs} beside b_start={self.b_start}"
            raise InvalidArgumentError(
                "TrainingRecipe.b_epochs", got, "both, from which B and for how long, or neither"
            )

    @classmethod
    def bcosify(cls, **changes: Any) -> TrainingRecipe:
        """Fine-tuning a B-cosified network: the defaults."""
        return cls(**changes)

    @classmethod
    def clip(cls, **changes: Any) -> TrainingRecipe:
        """Fine-tuning the B-cosified image tower of a CLIP model, on images without labels.

        As published for CLIP (arXiv 2411.00715, section 3.3, and its code): the teacher is the tower before its
        conversion, the loss SigLIP's between the two towers' embeddings at a fixed scale of 10 and bias of -10; the
        rest is as for classifiers, and the images are ImageNet's.
        """
        defaults: dict[str, Any] = {
            "loss": "none", "distillation": Distillation(logits=0.0, siglip=1.0, siglip_learned=False),
            "select": "cosine",
        }  # fmt: skip
        return cls(**{**defaults, **changes})

    @classmethod
    def bcos(cls, **changes: Any) -> TrainingRecipe:
        """A B-cos network from scratch, as B-cos v2's code trains its CNNs on ImageNet (arXiv 2306.10898).

        Adam at 1e-3, uniform-off-labels BCE, adaptive gradient clipping at 0.01, 90 epochs of batches of 256; the rate
        rises over 5 epochs from a hundredth and then falls as a cosine, changing with every epoch. A run of few epochs
        needs a shorter warm-up (``warmup_epochs``). Its CIFAR-10 networks were trained with plain ``"bce"``.
        """
        defaults: dict[str, Any] = {"lr": 1e-3, "warmup_epochs": 5.0, "step_schedule": False}
        return cls(**{**defaults, **changes})

    @classmethod
    def standard(cls, **changes: Any) -> TrainingRecipe:
        """A conventional network from scratch: SGD with momentum, cross-entropy, weight decay."""
        defaults: dict[str, Any] = {
            "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "loss": "cross_entropy", "agc": None,
            "warmup_epochs": 1.0,
        }  # fmt: skip
        return cls(**{**defaults, **changes})

    def replace(self, **changes: Any) -> TrainingRecipe:
        """A copy with some fields changed; ``"distillation.logits"`` and the like change a field of a field."""
        own: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            first, _, rest = name.partition(".")
            if first not in _FIELDS:
                raise InvalidArgumentError("TrainingRecipe", f"field {first!r}", "a known field", _suggest(first))
            if rest:
                inner.setdefault(first, {})[rest] = value
            else:
                own[first] = _built(first, value) if first in _NESTED and isinstance(value, Mapping) else value
        # Fields of one field all at once: one by one they may not go together.
        for name, values in inner.items():
            own[name] = self._inside(name, own.get(name, getattr(self, name)), values)
        return dataclasses.replace(self, **own)

    @staticmethod
    def _inside(name: str, current: Any, values: Mapping[str, Any]) -> Any:
        if name not in _NESTED:
            rest = next(iter(values))
            raise InvalidArgumentError("TrainingRecipe", f"field {name}.{rest}", f"a field with parts, {name} has none")
        _check_parts(name, values)
        if current is None:
            return _NESTED[name](**values)
        if not isinstance(current, _NESTED[name]):
            raise InvalidTypeError(f"TrainingRecipe.{name}", repr(current), _NESTED[name].__name__)
        return dataclasses.replace(current, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        values = {name: getattr(self, name) for name in _FIELDS}
        for name in _NESTED:
            inner = values[name]
            values[name] = None if inner is None else dataclasses.asdict(inner)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecipe:
        """The inverse of :meth:`to_dict`; an unknown field is an error naming it."""
        if not isinstance(values, Mapping):
            raise InvalidTypeError("TrainingRecipe", type(values).__name__, "a mapping of its fields")
        given: dict[str, Any] = {}
        for name, value in values.items():
            if name not in _FIELDS:
                raise InvalidArgumentError("TrainingRecipe", f"field {name!r}", "a known field", _suggest(name))
            if name in _NESTED and isinstance(value, Mapping):
                given[name] = _built(name, value)
            else:
                given[name] = tuple(value) if isinstance(value, list) else value
        return cls(**given)


_FIELDS = tuple(entry.name for entry in fields(TrainingRecipe))
_DEFAULTS = {entry.name: entry.default for entry in fields(TrainingRecipe)}
# Fields that only some choices of another field use.
_USED_BY = {
    "momentum": ("optimizer", ("sgd",)),
    "betas": ("optimizer", ("adam", "adamw")),
    "min_lr": ("schedule", ("cosine", "cosine_restarts")),
    "restart_epochs": ("schedule", ("cosine_restarts",)),
    "restart_factor": ("schedule", ("cosine_restarts",)),
    "smoothing": ("loss", ("bce", "cross_entropy")),
    "off_value": ("loss", ("uniform_off_bce",)),
    "b_lr": ("learn_b", (True,)),
}
_NESTED: dict[str, Any] = {"distillation": Distillation, "augmentation": Augmentation, "mixing": Mixing}


def _check_parts(name: str, values: Mapping[str, Any]) -> None:
    """That these are fields of the field ``name``, one with parts."""
    known = [entry.name for entry in fields(_NESTED[name])]
    for part in values:
        if part not in known:
            raise InvalidArgumentError(
                f"TrainingRecipe.{name}", f"field {part!r}", "a known field", did_you_mean(part, known)
            )


def _built(name: str, values: Mapping[str, Any]) -> Any:
    """A field with parts from plain values, as a file has them."""
    _check_parts(name, values)
    return _NESTED[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _suggest(name: str) -> str:
    return did_you_mean(name, _FIELDS)
