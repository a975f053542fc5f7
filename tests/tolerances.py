"""The one table of tolerances. Each is relative to the expected array's largest magnitude unless it says otherwise.

Kernels are compared with the plain float64 definition, so their entries are rounding errors of the dtype times the
length of the sums involved; the others are what the published results are reproduced to.
"""

import torch

__all__ = ["KERNEL", "TOLERANCES", "kernel_tolerance"]

TOLERANCES: dict[str, float] = {
    # converted networks
    "equivalence": 1e-4,  # logits of a B=1 conversion against the source model's
    "logits_b2": 1e-4,
    "weights_b2": 1e-3,  # W and contributions at B=2
    # At B=1 a ReLU or max-pool switch may flip between two precisions, which changes W at single places.
    "weights_b1_l2": 1e-2,  # relative L2 error
    "weights_b1_flipped_l2": 0.1,  # the same of an image on which a switch flipped
    "weights_b1_cosine": 0.9999,  # a lower bound
    # explanations
    "completeness": 1e-4,  # |sum(contributions) + residual - logit|, float32
    "oracle64": 1e-9,  # W against autograd through detached factors, float64
    "rgba": 2e-2,  # absolute, colours in [0, 1]
    "rgba_outliers": 1e-3,  # the share of values that may miss it
    # ONNX against PyTorch; W by the weights_* entries
    "onnx_logits": 1e-4,
    "onnx_weights_fp16": 2e-2,
    # recalibrated statistics against the stored ones
    "running_var": 1e-4,
}

# dtype -> (rtol, atol) for a kernel's result against the float64 definition, inputs of order 1.
KERNEL: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 2e-3),
    torch.bfloat16: (4e-2, 2e-2),
}


def kernel_tolerance(dtype: torch.dtype) -> dict[str, float]:
    """``rtol`` and ``atol`` for :func:`torch.testing.assert_close`."""
    rtol, atol = KERNEL[dtype]
    return {"rtol": rtol, "atol": atol}
