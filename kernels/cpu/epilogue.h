// What stands around the convolutions and matrix products of a library: arguments of the kernels of epilogue.cpp.
#pragma once

#include "images.h"

namespace bcos {

// y = act(z (|z| / n)^(b-1) scale + shift + residual), in place of z or not.
struct Epilogue {
    Sizes sizes;    // height and width of the map; out_height, out_width and channels of z
    Window window;  // of the convolution
    Storage storage = Storage::float32;
    const void* z = nullptr;  // [N, out_height, out_width, z_pixel], of which the first C channels are read
    int64_t z_pixel = 0;
    // [N, out_height, out_width, y_pixel], of which the first C channels are written; y may be z.
    void* y = nullptr;
    int64_t y_pixel = 0;
    // Sums of squares of the input, contiguous [N, height, width, entries], entries a multiple of groups; null for b = 1.
    const float* squares = nullptr;
    int64_t entries = 1, groups = 1;
    bool of_rows = false;  // n = sqrt(sum) + eps, a linear layer's, instead of sqrt(sum + eps)
    const float *scale = nullptr, *shift = nullptr;
    Image residual;
    float b = 2, eps = 0;
    int activation = 0;
    // Results as Depthwise's; out_squares [N, out_height, out_width, groups].
    void *multiplier = nullptr, *gate = nullptr;
    float* out_squares = nullptr;
    int threads = 1;
};

// Gradients of y = z |z| / n in training: to z, 2 sqrt(|y| / n) grad, and to n, of which -sum(grad y) / n^2 is stored.
struct ResponseGrad {
    Epilogue layer;  // sizes, window, squares, entries, groups, eps, threads, and y as z
    Image grad;
    void* grad_z = nullptr;  // contiguous, as y
    float* norm = nullptr;   // [N, out_height, out_width, groups]
};

// The end of an adjoint by itself, of a total that may be where adjoint.out is.
struct AdjointEpilogue {
    Sizes sizes;  // batch: rows of gradients; height, width
    Storage storage = Storage::float32;
    Image total;
    Adjoint adjoint;
    int threads = 1;
};

// y = act(scale x + shift) and its map; or the adjoint grad * scale * gate + identity where grad is given.
struct ScaleAct {
    Sizes sizes;  // batch: of x, or the rows of gradients
    Storage storage = Storage::float32;
    Image x, grad, identity;
    const float *scale = nullptr, *shift = nullptr;
    int activation = 0;
    int64_t groups = 1, per_image = 1;
    // [N, height, width, out_pixel], of which the first C channels are written; out may be identity.
    void* out = nullptr;
    int64_t out_pixel = 0;
    float* squares = nullptr;
    int threads = 1;
};

// Channel sums of squares by group, [N, H, W, groups].
struct SquareSum {
    Sizes sizes;
    Storage storage = Storage::float32;
    Image x;
    int64_t groups = 1;
    float* squares = nullptr;
    int threads = 1;
};

// An image, planes of float or bytes, strides in elements.
struct Planes {
    const void* data = nullptr;
    bool bytes = false;
    int64_t batch = 0, channel = 0, row = 0, pixel = 0;
};

// (v_c - mean_c) * inverse_std_c for v = [x, 1 - x] or x, zeros in the channels beyond.
struct Encode {
    Sizes sizes;  // channels: of the result
    Storage storage = Storage::float32;
    Planes image;
    const float *mean = nullptr, *inverse_std = nullptr;
    bool six = true;
    void* out = nullptr;
    float* squares = nullptr;
    int threads = 1;
};

// Weights [M, 6 (or 3), H, W], contributions [M, H, W] and colours [M, 4, H, W] from the adjoint of the encoded image.
struct Contributions {
    Sizes sizes;  // batch: rows; channels: 6 or 3; height, width: the image's
    Storage storage = Storage::float32;
    // With block > 1 its pixel (h / block, w / block) holds block * block times `inner` channels, (dy, dx, c).
    Image grad;
    int64_t block = 1, inner = 6, per_image = 1;
    Planes image;
    const float* inverse_std = nullptr;
    float scale = 1;
    float *weights = nullptr, *contributions = nullptr, *colour = nullptr;
    int threads = 1;
};

}  // namespace bcos
