// 3 x 3 convolutions by Winograd's F(4 x 4, 3 x 3): 36 products for 16 results instead of 144. Compiled once for each
// instruction set.
//
// A block of tiles goes through three steps: input tiles 6 x 6 to V = B' d B, 36 matrix products M = V U, output tiles
// 4 x 4 = A' M A. Interpolation at 0, +-P, +-Q and infinity (Lavin and Gray, "Fast algorithms for convolutional neural
// networks", 2016). With the usual 1 and 2 as P and Q rounding errors are three to five times those of these points.
#include "winograd.h"

#include "gemm.h"

namespace bcos {
namespace BCOS_ISA {

static constexpr double P = 0.625, Q = 1.5;
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// [O, C, 3, 3] to the 36 matrices [C, O], packed one after the other.
void winograd_pack(const WinogradPack& a) {
    const double p = P, q = Q;
    const double g[6][3] = {
        {1 / (p * p * q * q), 0, 0},
        {1 / (2 * p * p * (p * p - q * q)), p / (2 * p * p * (p * p - q * q)), 1 / (2 * (p * p - q * q))},
        {1 / (2 * p * p * (p * p - q * q)), -p / (2 * p * p * (p * p - q * q)), 1 / (2 * (p * p - q * q))},
        {1 / (2 * q * q * (q * q - p * p)), q / (2 * q * q * (q * q - p * p)), 1 / (2 * (q * q - p * p))},
        {1 / (2 * q * q * (q * q - p * p)), -q / (2 * q * q * (q * q - p * p)), 1 / (2 * (q * q - p * p))},
        {0, 0, 1},
    };
    for (int place = 0; place < WINOGRAD_PLACES; ++place) {
        const double *down = g[place / 6], *across = g[place % 6];
        pack_panels(a.channels, a.outputs, a.packed + place * a.channels * a.outputs, [&](int64_t c, int64_t o) {
            const float* w = a.weight + (o * a.channels + c) * 9;
            double sum = 0;
            for (int r = 0; r < 3; ++r) {
                for (int s = 0; s < 3; ++s) sum += down[r] * w[r * 3 + s] * across[s];
            }
            return (float)sum;
        });
    }
}

// Six values to B' x, in place.
static inline void to_places(vfloat* x, int step) {
    constexpr float p = (float)P, q = (float)Q, pp = (float)(P * P), qq = (float)(Q * Q);
    constexpr float sum = (float)(P * P + Q * Q), product = (float)(P * P * Q * Q);
    const vfloat x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step], x5 = x[5 * step];
    const vfloat even_p = x4 - qq * x2, odd_p = p * (x3 - qq * x1);
    const vfloat even_q = x4 - pp * x2, odd_q = q * (x3 - pp * x1);
    x[0] = product * x0 - sum * x2 + x4;
    x[step] = even_p + odd_p;
    x[2 * step] = even_p - odd_p;
    x[3 * step] = even_q + odd_q;
    x[4 * step] = even_q - odd_q;
    x[5 * step] = product * x1 - sum * x3 + x5;
}

// Six values to the four of A' m.
static inline void from_places(const vfloat* m, int step, vfloat* y) {
    constexpr float p = (float)P, q = (float)Q, pp = (float)(P * P), qq = (float)(Q * Q);
    constexpr float ppp = (float)(P * P * P), qqq = (float)(Q * Q * Q);
    const vfloat sum_p = m[step] + m[2 * step], difference_p = m[step] - m[2 * step];
    const vfloat sum_q = m[3 * step] + m[4 * step], difference_q = m[3 * step] - m[4 * step];
    y[0] = m[0] + sum_p + sum_q;
    y[1] = p * difference_p + q * difference_q;
    y[2] = pp * sum_p + qq * sum_q;
    y[3] = ppp * difference_p + qqq * difference_q + m[5 * step];
}

void winograd(const Winograd& a) {
    const Sizes& s = a.sizes;
    const int64_t across = (s.out_width + 3) / 4, down = (s.out_height + 3) / 4;
    const int64_t tiles = s.batch * across * down;
    const int64_t block = winograd_block(tiles, s.channels, a.outputs);
    const int64_t v_place = block * s.channels + WINOGRAD_APART, m_place = block * a.outputs + WINOGRAD_APART;
    float* const v_all = a.scratch;
    float* const m_all = a.scratch + WINOGRAD_PLACES * v_place;
    const int64_t panels = panels_of(a.outputs);
    const float* input = static_cast<const float*>(a.input.data);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    for (int64_t first = 0; first < tiles; first += block) {
        const int64_t count = smaller(block, tiles - first);
        const int64_t in_groups = s.channels / LANES, out_groups = a.outputs / LANES;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; ++t) {
            const int64_t tile = first + t, n = tile / (across * down), rest = tile % (across * down);
            const int64_t top = rest / across * 4 - a.padding_h, left = rest % across * 4 - a.padding_w;
            const float* image = input + n * a.input.batch;
            const bool inside = top >= 0 && left >= 0 && top + 6 <= s.height && left + 6 <= s.width;
            for (int64_t group = 0; group < in_groups; ++group) {
                vfloat d[WINOGRAD_PLACES];
                const float* source = image + top * a.input.row + left * a.input.pixel + group * LANES;
                if (inside) {
#pragma GCC unroll 6
                    for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
                        for (int i = 0; i < 6; ++i) d[i * 6 + j] = load(source + i * a.input.row + j * a.input.pixel);
                        to_places(d + j, 6);
                    }
                } else {
                    for (int j = 0; j < 6; ++j) {
                        for (int i = 0; i < 6; ++i) {
                            const bool there = top + i >= 0 && top + i < s.height && left + j >= 0 && left + j < s.width;
                            d[i * 6 + j] = there ? load(source + i * a.input.row + j * a.input.pixel) : vfloat{};
                        }
                        to_places(d + j, 6);
                    }
                }
                float* target = v_all + t * s.channels + group * LANES;
#pragma GCC unroll 6
                for (int i = 0; i < 6; ++i) {
                    to_places(d + 6 * i, 1);
#pragma GCC unroll 6
                    for (int j = 0; j < 6; ++j) store(target + (i * 6 + j) * v_place, d[i * 6 + j]);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < WINOGRAD_PLACES * panels; ++item) {
            const int64_t place = item / panels;
            const float* const v = v_all + place * v_place;
            panel_product(
                0, count, {{}, 1, 0, s.channels}, [&](int64_t t) { return v + t * s.channels; },
                a.weight + place * s.channels * a.outputs, m_all + place * m_place, a.outputs, a.outputs, item % panels);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; ++t) {
            const int64_t tile = first + t, n = tile / (across * down), rest = tile % (across * down);
            const int64_t top = rest / across * 4, left = rest % across * 4;
            const int64_t rows = smaller(4, s.out_height - top), columns = smaller(4, s.out_width - left);
            float* image = a.output + n * s.out_height * s.out_width * a.outputs;
            for (int64_t group = 0; group < out_groups; ++group) {
                const float* source = m_all + t * a.outputs + group * LANES;
                vfloat half[24];
#pragma GCC unroll 6
                for (int i = 0; i < 6; ++i) {
                    vfloat m[6];
#pragma GCC unroll 6
                    for (int j = 0; j < 6; ++j) m[j] = load(source + (i * 6 + j) * m_place);
                    from_places(m, 1, half + i * 4);
                }
                float* target = image + (top * s.out_width + left) * a.outputs + group * LANES;
                for (int j = 0; j < columns; ++j) {
                    vfloat y[4];
                    from_places(half + j, 4, y);
                    for (int i = 0; i < rows; ++i) store(target + (i * s.out_width + j) * a.outputs, y[i]);
                }
            }
        }
    }
}

}  // namespace BCOS_ISA
}  // namespace bcos
