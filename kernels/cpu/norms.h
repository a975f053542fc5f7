// Layer normalisation over rows, and its adjoint with the variance constant; sums over all pixels of each channel, for
// batch norms in training: arguments of the kernels of norms.cpp.
#pragma once

#include "images.h"

namespace bcos {

// y = (x - mean) rstd weight + bias of each row, rstd = 1 / sqrt(var + eps).
struct LayerNorm {
    int64_t rows = 0, channels = 0;
    Storage storage = Storage::float32;
    const void* x = nullptr;                         // contiguous [rows, channels], as y
    const float *weight = nullptr, *bias = nullptr;  // [channels] or null
    float eps = 0;
    void* y = nullptr;
    float* rstd = nullptr;     // [rows]
    float* squares = nullptr;  // [rows] or null: sums of squares of y as it is stored
    int threads = 1;
};

// out = rstd (g weight - mean(g weight)) + identity of each row.
struct LayerNormAdjoint {
    // Rows of gradients: `length` to an image, `per_image` images in a row to one image of the forward pass.
    int64_t rows = 0, channels = 0, length = 1, per_image = 1;
    Storage storage = Storage::float32;
    const void *grad = nullptr, *identity = nullptr;  // contiguous; identity may be null
    const float *rstd = nullptr, *weight = nullptr;   // rstd [images * length]; weight [channels] or null
    void* out = nullptr;
    int threads = 1;
};

// out[c] = sum of x - mean[c], of its square, or of x y over the rows.
struct ChannelSums {
    int64_t rows = 0, channels = 0;
    const float *x = nullptr, *y = nullptr;  // contiguous [rows, channels]; y or mean is null
    const float* mean = nullptr;             // [channels]
    bool squared = false;
    double* out = nullptr;  // [channels]
    int threads = 1;
};

// out = (x - mean[c]) x_scale[c] + y y_scale[c].
struct ChannelCombine {
    int64_t rows = 0, channels = 0;
    const float *x = nullptr, *y = nullptr;  // contiguous [rows, channels], as out
    const float *mean = nullptr, *x_scale = nullptr, *y_scale = nullptr;
    float* out = nullptr;
    int threads = 1;
};

}  // namespace bcos
