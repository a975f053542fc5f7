// What the depthwise and pooling kernels are called with: plain data, the same for every instruction set.
#pragma once

#include <cstdint>

namespace bcos {

// A channels-last operand that is only read: [N, H, W, C], strides in elements; a channel's stride is 1. It may be a
// slice of the channels of a wider tensor. Absent where data is null.
struct Image {
    const void* data = nullptr;
    int64_t batch = 0, row = 0, pixel = 0;
};

// A window sliding over an image: kernel, stride, padding and dilation along rows and columns.
struct Window {
    int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
    int64_t padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1;
};

// Sizes of the image that a kernel reads (height, width) and of what the window makes of it.
struct Sizes {
    int64_t batch = 0, channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
};

// The end of every adjoint: G = total + identity; out = G * multiplier, raw = G * gate. Factors belong to images, of
// which each has per_image rows of gradients. Absent operands have null data; raw is null where it is not wanted.
struct Adjoint {
    Image multiplier, identity, gate;
    bool gate_is_bits = false;  // one bit a channel instead of a value
    int64_t per_image = 1;
    void* out = nullptr;
    void* raw = nullptr;
};

enum class Storage : int { float32 = 0, bfloat16 = 1 };

}  // namespace bcos
