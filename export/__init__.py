"""Prediction and explanation as one ONNX file.

>>> report = to_onnx(net, "network.onnx", image_size=224)
"""

from bcos_rt.export.errors import ExportError
from bcos_rt.export.onnx_export import to_onnx
from bcos_rt.export.ops import ONNX_OPS, onnx_op
from bcos_rt.export.parity import Parity, Tolerances
from bcos_rt.export.report import ExportReport

__all__ = ["ONNX_OPS", "ExportError", "ExportReport", "Parity", "Tolerances", "onnx_op", "to_onnx"]
