"""Numbers that are not finite: noted on the device without waiting for it, and traced to a layer afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bcos_rt.training.sharded import local

__all__ = ["FirstBad", "all_finite", "first_not_finite", "is_finite"]


class FirstBad:
    """Notes the first step whose loss or gradient is not finite. Only :meth:`read` waits for the device.

    From that step on :meth:`factor` makes every gradient NaN, so that no later step changes a weight before the note is
    read; between processes the gradients' sum carries that to all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._in_loss = torch.zeros((), dtype=torch.bool, device=device)

    def see(self, finite: Tensor, step: int, loss: bool) -> None:
        """Note ``step`` where ``finite``, a boolean scalar on the device, is False and nothing was noted before."""
        new = ~finite & (self._step < 0)
        self._step = torch.where(new, step, self._step)
        self._in_loss = self._in_loss | (new & loss)

    def factor(self) -> Tensor:
        """1, or NaN after a bad step: what a loss is multiplied with before its gradient is taken."""
        return torch.where(self.fine(), 1.0, torch.nan)

    def fine(self) -> Tensor:
        """Whether there was no bad step, a boolean scalar on the device."""
        return self._step < 0

    def read(self) -> tuple[int, bool]:
        """The step, -1 for none, and whether it was its loss (not only its gradient)."""
        return int(self._step), bool(self._in_loss)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all elements are finite, of shared-out tensors this process's; a boolean scalar on their device."""
    # A largest absolute value is NaN where an element is, and cannot overflow; of no elements there is none.
    seen = [part for part in map(local, tensors) if part.numel()]
    return torch.nn.utils.get_total_norm(seen, norm_type=torch.inf).isfinite()


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements that this process holds are finite, as integers are; waits for the device."""
    return not tensor.is_floating_point() or bool(torch.isfinite(local(tensor.detach())).all())


def first_not_finite(net: nn.Module, compute: Callable[[], Tensor]) -> str | None:
    """What is not finite first in a forward and backward pass, in words; None where all is finite.

    Args:
        net: its parameters, then its modules' outputs, then the gradients are looked at, in the order they arise.
        compute: runs ``net`` and returns the loss.
    """
    found = [f"parameter {name}" for name, p in net.named_parameters() if not is_finite(p)]
    names = {module: name for name, module in net.named_modules() if not any(True for _ in module.children())}

    def note(tensor: Tensor, text: str) -> None:
        if not found and not is_finite(tensor):
            found.append(text)

    def watch(tensor: Tensor, text: str) -> RemovableHandle:
        handle: RemovableHandle = tensor.register_hook(lambda gradient: note(gradient, text))  # type: ignore[no-untyped-call]
        return handle

    def look(module: nn.Module, _inputs: object, out: object) -> None:
        if isinstance(out, Tensor):
            text = f"the output of {names[module]} ({type(module).__name__})"
            note(out.detach(), text)
            if out.requires_grad:
                watch(out, f"the gradient at {text}")

    handles = [module.register_forward_hook(look) for module in names]
    handles += [watch(p, f"the gradient of {name}") for name, p in net.named_parameters() if p.requires_grad]
    try:
        loss = compute()
        note(loss.detach(), "no layer's output, the loss itself")
        # To the end in any case: with several processes, passes may hold messages that all of them must send.
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
