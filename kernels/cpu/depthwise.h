// Depthwise B-cos convolution and its adjoint: arguments of the kernels of depthwise.cpp.
#pragma once

#include "images.h"

namespace bcos {

struct Depthwise {
    Sizes sizes;  // height and width of x; out_height and out_width of the result
    Window window;
    Storage storage = Storage::float32;
    Image x, residual;
    // [kernel_h * kernel_w, C]; the others [C] or null.
    const float* weight = nullptr;
    const float *bias = nullptr, *scale = nullptr, *shift = nullptr;
    float b = 2, eps = 0;
    int activation = 0;  // position in ACTIVATIONS of kernels/reference.py
    // Results, contiguous [N, out_height, out_width, C]; null where not wanted (y always is). gate: a bit a channel for
    // relu, values otherwise. squares: [N, out_height, out_width], of the rounded y.
    void *y = nullptr, *multiplier = nullptr, *gate = nullptr;
    float* squares = nullptr;
    int threads = 1;
};

struct DepthwiseAdjoint {
    Sizes sizes;  // batch: the rows of gradients; height and width of the adjoint's result; out_*: of grad
    Window window;
    Storage storage = Storage::float32;
    Image grad;
    const float* weight = nullptr;
    Adjoint adjoint;
    int threads = 1;
};

}  // namespace bcos
