"""Training with weights, gradients, optimiser states and averages shared out among processes (FSDP).

torch's ``fully_shard`` (FSDP2) keeps of every parameter the rows of one process, as a DTensor, and makes it whole for
the forward and backward pass. Rows of a convolution's or linear layer's weight are whole filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

__all__ = ["clip_norm", "copy_whole", "load_whole", "local", "share_out", "shared_like", "whole", "whole_state"]


def share_out(net: nn.Module, device: torch.device) -> nn.Module:
    """Leave of every parameter of ``net`` this process's rows, on ``device``; every process holds those of the first.

    The network is one unit: which of its modules are called, and which are only read by others, a traced network does
    not say. Scalars (a learned B) stay whole: their gradients are each process's own.
    """
    net.to(device)
    for tensor in (*net.parameters(), *net.buffers()):
        dist.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    scalars = {p for p in net.parameters() if p.ndim == 0}
    fully_shard(net, mesh=mesh, ignored_params=scalars)
    return net


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows, from all processes, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Copy the state of a network that is shared out into one that is not, in every process."""
    targets = target.state_dict()
    for name, value in source.state_dict().items():
        targets[name].copy_(whole(value))


def whole_state(thing: nn.Module | Optimizer) -> dict[str, Any]:
    """The state dictionary that ``thing`` would have if nothing of it were shared out."""
    state: dict[str, Any] = _mapped(thing.state_dict())
    return state


def _mapped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _mapped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v) for v in value)
    # What is whole may be more than a GPU holds.
    return whole(value).cpu() if isinstance(value, DTensor) else value


def load_whole(thing: nn.Module | Optimizer, state: Mapping[str, Any]) -> None:
    """Load what :func:`whole_state` gave, whether or not ``thing`` is shared out, then or now."""
    if isinstance(thing, Optimizer):
        parameters = [p for group in thing.param_groups for p in group["params"]]
        moments = {i: {k: shared_like(v, parameters[i]) for k, v in one.items()} for i, one in state["state"].items()}
        thing.load_state_dict({**state, "state": moments})
    else:
        now = thing.state_dict()
        thing.load_state_dict({k: shared_like(v, now[k]) if k in now else v for k, v in state.items()})


def shared_like(value: Any, other: Tensor) -> Any:
    """``value`` shared out as ``other`` is, where it has that shape (an optimiser's step count has not)."""
    if not isinstance(other, DTensor) or not isinstance(value, Tensor) or value.shape != other.shape:
        return value
    # Every process has read the file: nothing need be sent.
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def clip_norm(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale all gradients so that their common norm, over all processes' rows, is at most ``largest``.

    As ``torch.nn.utils.clip_grad_norm_``, which takes no mixture of parameters that are shared out and others.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [local(g) for g in gradients if isinstance(g, DTensor)]
    if not rows:
        nn.utils.clip_grad_norm_(parameters, largest)
        return
    square = nn.utils.get_total_norm(rows).square()
    dist.all_reduce(square)
    others = nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    total = (square + others.to(square.device).square()).sqrt()
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
