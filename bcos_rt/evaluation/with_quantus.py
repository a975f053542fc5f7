"""A B-cos network's explanation as a function that Quantus' metrics call (``explain_func``).

Quantus (https://github.com/understandable-machine-intelligence-lab/Quantus) need not be installed to import this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bcos_rt.errors import InvalidTypeError
from bcos_rt.evaluation.checks import example_tensor
from bcos_rt.explanation.explain import explain
from bcos_rt.nn.network import BcosNetwork

__all__ = ["quantus_explain"]


def quantus_explain(model: BcosNetwork, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
    """Contribution maps, exact: ``metric(model=net, ..., explain_func=quantus_explain)``.

    Args:
        model: a :class:`BcosNetwork` in evaluation mode. Its softmax, which metrics add by default, is not explained.
        inputs: [N, 3, H, W] in [0, 1], as any array.
        targets: N class indices.
        _: what Quantus passes beside these (``device``); inputs go to the network's device.

    Returns:
        [N, 1, H, W], float32: what each pixel adds to the target's logit. One channel is what Quantus spreads over the
        three of the image.

    Raises:
        InvalidTypeError: another network, or no numbers.
        InvalidArgumentError: unusable inputs or targets (named).
    """
    if not isinstance(model, BcosNetwork):
        raise InvalidTypeError("model", type(model).__name__, "a BcosNetwork", " (bcosify makes one)")
    like = example_tensor(model)
    images = torch.tensor(_plain(inputs, "inputs"), device=like.device, dtype=like.dtype)
    explanation = explain(model, images, torch.tensor(_plain(targets, "targets")).reshape(-1))
    found: np.ndarray = explanation.contributions[:, None].float().cpu().numpy()
    return found


def _plain(values: Any, argument: str) -> np.ndarray:
    """A copy in plain order: what Quantus cuts and flips may lie backwards in memory, which torch does not take."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    found = np.ascontiguousarray(values)
    if found.dtype.kind not in "uif":
        raise InvalidTypeError(argument, f"{type(values).__name__} of {found.dtype}", "an array of numbers")
    return found
