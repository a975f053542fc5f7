"""The biases of a network: what ``Recipe(biases="drop")`` takes away, by name."""

from __future__ import annotations

from torch import fx, nn

from bcos_rt.conversion.nodes import loose_biases
from bcos_rt.conversion.trace import trace_model
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.nn.conventional import inner_network

__all__ = ["bias_names"]


def bias_names(net: nn.Module) -> list[str]:
    """Names of the parameters that are biases: of layers and norms, of packed projections, and loose ones.

    Loose biases are added to a projection's result without being a layer's own (``q_bias`` of BEiT).

    Raises:
        InvalidArgumentError: there is none.
    """
    inner = inner_network(net)
    graph = inner.graph if isinstance(inner, fx.GraphModule) else trace_model(inner).graph
    loose = set()
    if graph is not None:
        modules = dict(inner.named_modules(remove_duplicate=False))
        parameters = dict(inner.named_parameters(remove_duplicate=False))
        names = loose_biases(graph, modules)
        loose = {id(parameters[name]) for name in names if name in parameters and parameters[name].ndim == 1}

    def is_bias(name: str, parameter: nn.Parameter) -> bool:
        last = name.rpartition(".")[2]
        # A forward that cannot be traced shows no loose biases, but what they are called does.
        return last == "bias" or (last.endswith("_bias") and parameter.ndim == 1) or id(parameter) in loose

    found = [name for name, parameter in net.named_parameters() if is_bias(name, parameter)]
    if not found:
        raise InvalidArgumentError(
            "recipe.bias_decay_epochs", "a network without biases", "one converted with Recipe(biases='keep')"
        )
    return found
