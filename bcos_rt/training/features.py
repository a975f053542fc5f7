"""Features of named modules of a source model, read during forward passes of it and of networks converted from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from bcos_rt.errors import InvalidArgumentError
from bcos_rt.nn.conventional import inner_network

__all__ = ["Place", "place_of"]


@dataclass(frozen=True)
class Place:
    """Where a network's forward pass shows what a module of its source model returns.

    Attributes:
        module: of the network.
        before: whether it is what ``module`` is given, not what it returns.
    """

    module: nn.Module
    before: bool = False

    def watch(self, keep: Callable[[Tensor], None]) -> RemovableHandle:
        """Have ``keep`` called at every forward pass, until the handle is removed.

        It is given a copy, which operations in place (``ReLU(inplace=True)``) do not change afterwards.
        """

        def after(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            keep(output.clone())

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            keep(inputs[0].clone())

        handle: RemovableHandle
        if self.before:
            handle = self.module.register_forward_pre_hook(before)
        else:
            handle = self.module.register_forward_hook(after)
        return handle


def place_of(net: nn.Module, name: str, side: str) -> Place:
    """Where the output of a module can be read.

    A converted network is one traced graph that calls the innermost modules by themselves; what the source model's
    blocks and stages returned are then values between them, read on the way from one such module to the next.

    Args:
        net: a B-cos network, a conventional one, or any other module.
        name: the module's name in the source model, such as ``"layer1"`` or ``"blocks.2"``.
        side: what to call the network in a message.

    Raises:
        InvalidArgumentError: no such module, or its output goes only into operations that are no modules.
    """
    inner = inner_network(net)
    modules = dict(inner.named_modules())
    if name not in modules:
        shown = ", ".join(list(modules)[1:6])
        raise InvalidArgumentError("Distillation.modules", repr(name), f"a module of the {side}: {shown}, ...")
    node = _output_of(inner, name) if isinstance(inner, fx.GraphModule) else None
    if node is None:
        return Place(modules[name])
    calls = [n for n in node.graph.nodes if n.op == "call_module"]
    # A module may be called at several places; what is kept then is its last call's.
    if node.op == "call_module" and [n for n in calls if n.target == node.target][-1] is node:
        return Place(modules[str(node.target)])
    for user in node.users:
        once = sum(n.target == user.target for n in calls) == 1
        if user.op == "call_module" and user.args[:1] == (node,) and once:
            return Place(modules[str(user.target)], before=True)
    raise InvalidArgumentError(
        "Distillation.modules",
        f"{name!r}, whose output goes into {', '.join(user.name for user in node.users)} in the {side}",
        "a module whose output is another module's input",
    )


def _output_of(net: fx.GraphModule, name: str) -> fx.Node | None:
    """The value a container of the source model returned; None for modules that the graph calls themselves."""
    # Tracing notes the modules around every operation; the source model was called "net" there.
    inside = {node for node in net.graph.nodes if f"net.{name}" in node.meta.get("nn_module_stack", {})}
    leaving = [node for node in net.graph.nodes if node in inside and not inside.issuperset(node.users)]
    if not leaving or any(node.op == "call_module" and node.target == name for node in inside):
        return None
    last: fx.Node = leaving[-1]
    return last
