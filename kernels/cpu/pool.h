// Pooling and its adjoints: arguments of the kernels of pool.cpp.
#pragma once

#include "images.h"

namespace bcos {

// Max and average pooling. `index` (the place r * kernel_w + s inside the window of what a maximum picked) is one byte
// where the window has at most 256 places, and otherwise an int32.
struct Pool {
    Sizes sizes;  // height and width of x; out_* of the result
    Window window;
    Storage storage = Storage::float32;
    Image x;
    bool count_include_pad = true;  // average
    int64_t groups = 1;             // of the map
    // Results, contiguous [N, out_height, out_width, C]; index and squares null where not wanted.
    // squares: [N, out_height, out_width, groups], of the rounded y.
    void *y = nullptr, *index = nullptr;
    float* squares = nullptr;
    int threads = 1;
};

struct PoolAdjoint {
    Sizes sizes;  // batch: the rows of gradients; height and width of the adjoint's result; out_*: of grad
    Window window;
    Storage storage = Storage::float32;
    Image grad;
    Image index;  // maximum: of images, each with adjoint.per_image rows
    bool count_include_pad = true;
    Adjoint adjoint;
    int threads = 1;
};

}  // namespace bcos
