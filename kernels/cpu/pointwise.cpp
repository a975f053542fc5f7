// 1 x 1 convolutions as matrix products, with the epilogue over each block of pixels while it is in the second cache.
// Compiled once for each instruction set.
#include "pointwise.h"

#include "gemm.h"
#include "pixels.h"

namespace bcos {
namespace BCOS_ISA {

// Values of a block's inputs and results: half of a second-level cache of 1 MiB, the packed panel has the rest.
static constexpr int64_t BLOCK_VALUES = 1 << 17;
// Pixels of a block: at least as many as pay for reading a panel, at most as many as leave work for every thread.
static constexpr int64_t LEAST_PIXELS = 48, MOST_PIXELS = 192;

void pointwise_pack(const PointwisePack& a) {
    pack_panels(a.depth, a.outputs, a.packed, [&a](int64_t c, int64_t o) { return a.weight[o * a.depth + c]; });
}

// z [pixels, outputs], rows z_row apart, of a map of the given height and width; finish(begin, end) follows on pixels
// whose products are there.
template <typename Finish>
static void product_and(
    const Product& a, int64_t batch, int64_t height, int64_t width, int64_t outputs, float* z, int64_t z_row,
    int threads, const Finish& finish) {
    const int64_t pixels = batch * height * width, panels = panels_of(outputs);
    const float* const input = static_cast<const float*>(a.input.data);
    auto row_of = [&](int64_t pixel) {
        const int64_t w = pixel % width, row = pixel / width;
        return input + row / height * a.input.batch + row % height * a.stride_h * a.input.row +
            w * a.stride_w * a.input.pixel;
    };
    Left left;
    left.taps = 1;
    left.tap = 0;
    left.depth = a.depth;
    auto multiply = [&](int64_t begin, int64_t end, int64_t panel) {
        panel_product(begin, end - begin, left, row_of, a.weight, z, z_row, outputs, panel);
    };
    const int64_t fitting = BLOCK_VALUES / (a.depth + outputs);
    const int64_t block = fitting < LEAST_PIXELS ? LEAST_PIXELS : fitting > MOST_PIXELS ? MOST_PIXELS : fitting;
    const int64_t work = pixels * a.depth * outputs;
    if (threads <= 1 || pixels >= threads * LEAST_PIXELS || work <= PARALLEL_VALUES) {
        in_parts(pixels, work, threads, [&](int64_t first, int64_t last) {
            const int64_t blocks = (last - first + block - 1) / block;
            for (int64_t i = 0; i < blocks; ++i) {
                const int64_t begin = first + (last - first) * i / blocks, end = first + (last - first) * (i + 1) / blocks;
                for (int64_t panel = 0; panel < panels; ++panel) multiply(begin, end, panel);
                finish(begin, end);
            }
        });
        return;
    }
    // Too few pixels to share out by themselves: the panels are, whose reading is most of the time.
    const int64_t blocks = (pixels + MOST_PIXELS / 2 - 1) / (MOST_PIXELS / 2);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < blocks * panels; ++item) {
            const int64_t i = item % blocks;
            multiply(pixels * i / blocks, pixels * (i + 1) / blocks, item / blocks);
        }
        const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
        const int64_t begin = pixels * member / team, end = pixels * (member + 1) / team;
        if (begin < end) finish(begin, end);
    }
}

void pointwise_forward(const PointwiseForward& a) {
    const Epilogue& end = a.end;
    const Sizes& s = end.sizes;
    // The epilogue's z is written here.
    float* const z = static_cast<float*>(const_cast<void*>(end.z));
    product_and(
        a.product, s.batch, s.out_height, s.out_width, s.channels, z, end.z_pixel, end.threads,
        [&](int64_t first, int64_t last) { forward_pixels<float>(end, first, last); });
}

void pointwise_adjoint(const PointwiseAdjoint& a) {
    const AdjointEpilogue& end = a.end;
    const Sizes& s = end.sizes;
    const Adjoint& to = end.adjoint;
    const bool plain = !to.multiplier.data && !to.identity.data && !to.raw && to.out == end.total.data;
    float* const total = static_cast<float*>(const_cast<void*>(end.total.data));
    product_and(
        a.product, s.batch, s.height, s.width, s.channels, total, end.total.pixel, end.threads,
        [&](int64_t first, int64_t last) {
            if (!plain) adjoint_pixels<float>(end, first, last);
        });
}

}  // namespace BCOS_ISA
}  // namespace bcos
