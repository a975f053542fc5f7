// What the Winograd convolution is called with: plain data, the same for every instruction set.
#pragma once

#include "images.h"

namespace bcos {

static constexpr int WINOGRAD_PLACES = 36;
// Floats between places beyond what they hold, so that the 36 streams do not fall into the same set of the cache.
static constexpr int64_t WINOGRAD_APART = 16;

// Tiles that go through the three steps together: what they need then stays in the second caches of a few cores.
static inline int64_t winograd_block(int64_t tiles, int64_t channels, int64_t outputs) {
    int64_t most = (1 << 19) / (WINOGRAD_PLACES * (channels + outputs));
    most = most < 12 ? 12 : most;
    const int64_t blocks = (tiles + most - 1) / most;
    return blocks ? (tiles + blocks - 1) / blocks : 1;
}

// Floats of scratch memory for N * ceil(OH / 4) * ceil(OW / 4) tiles.
static inline int64_t winograd_scratch(int64_t tiles, int64_t channels, int64_t outputs) {
    const int64_t block = winograd_block(tiles, channels, outputs);
    return WINOGRAD_PLACES * (block * (channels + outputs) + 2 * WINOGRAD_APART);
}

// A 3 x 3 convolution of stride 1 without groups, float32. Channels and outputs are multiples of 16.
struct Winograd {
    Image input;
    const float* weight = nullptr;  // packed by winograd_pack of the same instruction set
    float* output = nullptr;        // [N, OH, OW, O]
    float* scratch = nullptr;       // as many floats as winograd_scratch says
    Sizes sizes;
    int64_t outputs = 0, padding_h = 0, padding_w = 0;
    int threads = 1;
};

// weight [O, C, 3, 3] to the packed one, 36 * C * O floats.
struct WinogradPack {
    const float* weight = nullptr;
    float* packed = nullptr;
    int64_t outputs = 0, channels = 0;
};

}  // namespace bcos
