"""A B-cos network's explanation as an attribution method of captum: for its tools, and beside its methods.

Importing this module needs captum (extra ``evaluate``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.explanation.explain import explain, is_multi
from bcos_rt.explanation.explanation import Explanation
from bcos_rt.nn.network import BcosNetwork

try:
    from captum.attr import Attribution
except ImportError as error:
    raise MissingDependencyError("BcosAttribution needs captum: pip install 'bcos-rt[evaluate]'") from error

__all__ = ["BcosAttribution"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _unwrappable(function: _Function) -> _Function:
    """captum's wrappers (NoiseTunnel) call a method's ``attribute.__wrapped__``, which its own logging sets."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    return cast(_Function, call)


class BcosAttribution(Attribution):  # type: ignore[misc]
    """``BcosAttribution(net).attribute(images, target=207)``, as :class:`captum.attr.InputXGradient` is used.

    The attribution of an image's channel is ``W_c x_c + W_{c+3} (1 - x_c)`` (``W_c x_c`` for a network without the
    six-channel encoding), in logits. Its sum over channels is the contribution map, and what is missing from the logit
    is the explanation's residual. It is exact: there is no baseline and nothing is approximated.

    Args:
        net: a :class:`BcosNetwork`; explained in evaluation mode.

    Raises:
        InvalidTypeError: another network; :func:`bcos_rt.bcosify` makes a B-cos network of it.
    """

    def __init__(self, net: BcosNetwork) -> None:
        if not isinstance(net, BcosNetwork):
            raise InvalidTypeError("net", type(net).__name__, "a BcosNetwork", " (bcosify makes one)")
        super().__init__(net)

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether an attribution holds the input as a factor, as captum asks: it does."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether there is :meth:`compute_convergence_delta`: there is."""
        return True

    @_unwrappable
    def attribute(self, inputs: Any, target: Any = None, return_convergence_delta: bool = False) -> Any:
        """Attributions of the same shape as the images.

        Args:
            inputs: [N, 3, H, W] in [0, 1], or [N, 6, H, W] already encoded as ``[x, 1 - x]``; or a tuple of this one
                tensor, then the result is one too.
            target: as captum takes it: an int or a tensor of one for all images, N ints, a tuple of one int, a list of
                those. None is each image's top class.
            return_convergence_delta: also return the deltas, see :meth:`compute_convergence_delta`.

        Raises:
            InvalidArgumentError, InvalidTypeError: unusable inputs or target (named).
        """
        images = _only_tensor(inputs, "inputs")
        explanation = explain(self.forward_func, images, _class_ids(target))
        found = _by_channel(explanation, images.shape[1])
        attributions: Any = (found,) if isinstance(inputs, tuple) else found
        return (attributions, _delta(found, explanation)) if return_convergence_delta else attributions

    def compute_convergence_delta(self, attributions: Any, inputs: Any, target: Any = None) -> Tensor:
        """``sum(attributions) + residual - logit`` of each image, float64 [N]: 0 but for rounding.

        Methods of captum that begin at a baseline compare the sum with how much the logit differs from the baseline's;
        here the residual has its place, what the network adds whatever the pixels are.

        Args:
            attributions: of :meth:`attribute`.
            inputs, target: which they were made for.

        Raises:
            InvalidArgumentError: attributions of another shape than the inputs.
        """
        images, given = _only_tensor(inputs, "inputs"), _only_tensor(attributions, "attributions")
        if given.shape != images.shape:
            raise InvalidArgumentError(
                "attributions", f"shape {tuple(given.shape)}", f"{tuple(images.shape)}, as the inputs"
            )
        return _delta(given, explain(self.forward_func, images, _class_ids(target)))


def _by_channel(explanation: Explanation, channels: int) -> Tensor:
    terms = explanation.weights * explanation.images
    return terms if terms.shape[1] == channels else terms[:, :3] + terms[:, 3:]


def _delta(attributions: Tensor, explanation: Explanation) -> Tensor:
    total = attributions.detach().double().sum((1, 2, 3)) + explanation.residual.double()
    return total - explanation.target_logit().double()


def _only_tensor(value: Any, argument: str) -> Tensor:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Tensor):
        got = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
        raise InvalidTypeError(argument, got, "a tensor, or a tuple of one")
    return value


def _class_ids(target: Any) -> Any:
    """captum's target as :func:`explain` takes it."""
    if isinstance(target, list):
        target = [_of_tuple(entry) if isinstance(entry, tuple) else entry for entry in target]
    elif isinstance(target, tuple):
        target = _of_tuple(target)
    elif isinstance(target, torch.Tensor) and target.numel() == 1:
        target = target.reshape(())
    if is_multi(target):
        raise InvalidArgumentError("target", "several classes an image", "one class an image")
    return target


def _of_tuple(entry: tuple[Any, ...]) -> Any:
    if len(entry) != 1:
        raise InvalidArgumentError("target", f"a tuple of {len(entry)}", "a tuple of one, as logits are [N, classes]")
    return entry[0]
