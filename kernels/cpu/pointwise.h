// What 1 x 1 convolutions are called with: plain data, the same for every instruction set.
#pragma once

#include "epilogue.h"

namespace bcos {

// Each pixel of a result times a matrix: float32, no groups, no padding. The size and the threads are the end's.
struct Product {
    Image input;  // [N, H, W, depth]
    int64_t depth = 0;
    int64_t stride_h = 1, stride_w = 1;
    const float* weight = nullptr;  // packed by pointwise_pack of the same instruction set
};

// end.z, [N, out_height, out_width, O], and the epilogue after it; y may be z.
struct PointwiseForward {
    Product product;
    Epilogue end;
};

// end.total, which is written here, and the end of the adjoint after it; the first result may be the total.
struct PointwiseAdjoint {
    Product product;
    AdjointEpilogue end;
};

// weight [O, depth] to the packed one, depth * (O rounded up to LANES) floats. PAD suffices for every instruction set.
struct PointwisePack {
    static constexpr int64_t PAD = 16;
    const float* weight = nullptr;
    float* packed = nullptr;
    int64_t outputs = 0, depth = 0;
};

}  // namespace bcos
