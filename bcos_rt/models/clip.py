"""CLIP models: an image tower to be converted, and the text tower whose embeddings it is compared with.

Text embeddings of class names are made as CLIP's zero-shot classifiers are (Radford et al. 2021, arXiv 2103.00020,
section 3.1.4): the mean of the unit embeddings of several prompts, scaled to norm 1 again.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bcos_rt.models import openclip
from bcos_rt.models.sources import LoadedModel

__all__ = ["ClipModel", "TextTower", "clip_imagenet_class_names", "clip_imagenet_templates", "load_clip"]

# A prompt with {} where the class's name goes, or a function that puts it there.
Template = str | Callable[[str], str]
# Texts at a time: 77 tokens each.
BATCH = 256


class TextTower(nn.Module):
    """The text half of a CLIP model of open_clip.

    Attributes:
        model: the model without its image tower.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if "visual" in model._modules:
            del model.visual

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings [N, D], of any norm, of tokenised texts [N, context]."""
        embeddings: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return embeddings


@dataclass(frozen=True)
class ClipModel:
    """Both towers of a CLIP model.

    Attributes:
        name: architecture and tag, as :func:`load_clip` takes them.
        image_tower: what :func:`bcos_rt.bcosify` takes, with the normalisation and the image size of its weights.
        text_tower: in eval mode.
        logit_scale: what cosines are multiplied with before a softmax over texts, the exponential of CLIP's parameter.
        width: D, the embeddings' number of entries.
    """

    name: str
    image_tower: LoadedModel
    text_tower: TextTower
    logit_scale: float
    width: int

    def encode_text(self, prompts: Sequence[str], templates: Sequence[Template] = ("{}",)) -> Tensor:
        """One embedding a prompt, [P, D], of norm 1.

        Args:
            prompts: texts; with several templates, what is put into each of them.
            templates: strings with ``{}`` in them, or functions of a string (:func:`clip_imagenet_templates`). An
                embedding is the mean of those of all templates, each scaled to norm 1 before and the mean after.

        Raises:
            InvalidArgumentError, InvalidTypeError: no prompt, no template, a template without ``{}``.
            CheckpointError: a tokeniser that is neither installed nor could be downloaded.
        """
        _check_strings("prompts", prompts)
        if isinstance(templates, str) or not all(callable(t) or isinstance(t, str) for t in templates):
            raise InvalidTypeError("templates", repr(templates)[:80], "a sequence of strings, or of functions")
        if not templates:
            raise InvalidArgumentError("templates", "none", "at least one")
        for template in templates:
            if isinstance(template, str) and "{}" not in template:
                raise InvalidArgumentError("templates", repr(template), "a text with {} in it, for the prompt")
        texts = [_filled(template, prompt) for prompt in prompts for template in templates]
        tokenizer = _tokenizer(openclip.architecture_of(self.name))
        device = next(self.text_tower.parameters()).device
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), BATCH):
                tokens = tokenizer(texts[start : start + BATCH]).to(device)
                parts.append(_unit(self.text_tower(tokens).float()))
        embeddings = torch.cat(parts).reshape(len(prompts), len(templates), -1)
        return _unit(embeddings.mean(1))


def load_clip(name: str, *, weights: str | os.PathLike[str] | None = None, quick_gelu: bool | None = None) -> ClipModel:
    """Build a CLIP model of open_clip.

    Args:
        name: ``"RN50"``, ``"ViT-B-16"`` or any other of ``open_clip.list_models()``; ``"RN50:TAG"`` says which of the
            published weights (``open_clip.list_pretrained_tags_by_model``), without it ``openai`` where the model has
            that, else the first. Also ``"hf-hub:ORG/REPO"``, and ``"local-dir:FOLDER"`` with an
            ``open_clip_config.json``.
        weights: None (or ``"default"``) for the published ones, which open_clip downloads on first use; ``"random"``
            (seed it with :func:`torch.manual_seed`); or a file: a checkpoint of open_clip, a state dict, or one of
            OpenAI's archives, loaded strictly.
        quick_gelu: whether the activation is ``x * sigmoid(1.702 x)`` instead of GELU. No file says it; None takes what
            the tag says, of a file too. So weights of your own for an architecture whose default tag is OpenAI's need
            ``quick_gelu=False`` where they were trained with GELU.

    Raises:
        InvalidArgumentError: an unknown model or tag, with the closest known ones.
        CheckpointError: weights that cannot be downloaded or read, or do not fit.
        MissingDependencyError: open_clip (extra ``clip``) is not installed.
    """
    if not isinstance(name, str):
        raise InvalidTypeError("name", type(name).__name__, "a string such as 'RN50'")
    if quick_gelu is not None and not isinstance(quick_gelu, bool):
        raise InvalidTypeError("quick_gelu", repr(quick_gelu), "True, False or None")
    source = openclip.clip_source(name, quick_gelu)
    module: Any = openclip.build_clip(source, weights)
    tower = _image_tower(module.visual, source)
    scale = float(module.logit_scale.detach().double().exp())
    return ClipModel(source.name, tower, TextTower(module).eval(), scale, int(source.config["embed_dim"]))


def clip_imagenet_templates() -> list[Callable[[str], str]]:
    """The 80 templates of OpenAI's zero-shot classifier of ImageNet, as open_clip ships them.

    Raises:
        MissingDependencyError: open_clip is not installed.
    """
    return list(_metadata().OPENAI_IMAGENET_TEMPLATES)


def clip_imagenet_class_names() -> tuple[str, ...]:
    """The 1,000 ImageNet classes as CLIP is told of them, in the usual order: OpenAI's, as open_clip ships them.

    Raises:
        MissingDependencyError: open_clip is not installed.
    """
    return tuple(_metadata().IMAGENET_CLASSNAMES)


# --- details ---------------------------------------------------------------------------------------------------------


def _image_tower(visual: Any, source: openclip.ClipSource) -> LoadedModel:
    preprocessing = visual.preprocess_cfg
    size = preprocessing["size"]
    side = max(size) if isinstance(size, tuple | list) else size
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (preprocessing["mean"], preprocessing["std"]))
    return LoadedModel(visual, mean, std, None, source.describe(), int(side))


def _metadata() -> Any:
    openclip.require_open_clip()
    return importlib.import_module("open_clip.zero_shot_metadata")


@functools.cache
def _tokenizer(architecture: str) -> Callable[[list[str]], Tensor]:
    try:
        made: Callable[[list[str]], Tensor] = openclip.require_open_clip().get_tokenizer(architecture)
    except Exception as error:  # a Hugging Face tokeniser that is not at hand, or whose package is not
        raise CheckpointError(f"open_clip:{architecture}: could not get its tokeniser ({error})") from error
    return made


def _filled(template: Template, prompt: str) -> str:
    # Not str.format: a prompt or a template may hold other braces.
    return template.replace("{}", prompt) if isinstance(template, str) else template(prompt)


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings, dim=-1)


def _check_strings(argument: str, values: Any) -> None:
    if isinstance(values, str) or not all(isinstance(v, str) for v in values):
        raise InvalidTypeError(argument, repr(values)[:80], "a sequence of strings")
    if len(values) == 0:
        raise InvalidArgumentError(argument, "none", "at least one")
