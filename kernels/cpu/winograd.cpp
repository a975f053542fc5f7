// 3 x 3 convolutions by Winograd's F(4 x 4, 3 x 3): 36 products for 16 results instead of 144. Compiled once for each
// instruction set.
//
// A block of tiles goes through three steps: input tiles 6 x 6 to V = B' d B, 36 matrix products M = V U, output tiles
// 4 x 4 = A' M A. Interpolation at 0, +-P, +-Q and infinity (Lavin and Gray, "Fast algorithms for convolutional neural
// networks", 2016). With the usual 1 and 2 as P and Q rounding errors are three to five times those of these points.
#include "winograd.h"

#include "vector.h"

namespace bcos {
namespace BCOS_ISA {

static constexpr double P = 0.625, Q = 1.5;
// Rows and vectors of the accumulator tile: as many as the registers hold.
#if BCOS_LANES == 16
static constexpr int WIDE = 4;
#else
static constexpr int WIDE = 2;
#endif
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int vectors_of(int64_t outputs) {
    int n = WIDE;
    while (outputs % (n * LANES)) n /= 2;
    return n;
}

// [O, C, 3, 3] to [place][panel of NV vectors of outputs][C][NV * LANES].
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
    const int64_t panel = vectors_of(a.outputs) * LANES;
    for (int64_t o = 0; o < a.outputs; ++o) {
        for (int64_t c = 0; c < a.channels; ++c) {
            const float* w = a.weight + (o * a.channels + c) * 9;
            for (int i = 0; i < 6; ++i) {
                for (int j = 0; j < 6; ++j) {
                    double sum = 0;
                    for (int r = 0; r < 3; ++r) {
                        for (int s = 0; s < 3; ++s) sum += g[i][r] * w[r * 3 + s] * g[j][s];
                    }
                    const int64_t place = i * 6 + j;
                    a.packed[(place * a.outputs + o / panel * panel) * a.channels + c * panel + o % panel] = (float)sum;
                }
            }
        }
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

// ROWS rows of A [., depth] times a panel B [depth, NV vectors] to C.
template <int ROWS, int NV>
static inline void product(const float* a, int64_t depth, const float* b, float* c, int64_t c_row) {
    vfloat sum[ROWS][NV] = {};
    for (int64_t k = 0; k < depth; ++k) {
        vfloat right[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) right[v] = load(b + (k * NV + v) * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const vfloat left = broadcast(a[r * depth + k]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(c + r * c_row + v * LANES, sum[r][v]);
    }
}

template <int ROWS, int NV>
static inline void tail(int64_t rows, const float* a, int64_t depth, const float* b, float* c, int64_t c_row) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) {
            product<ROWS, NV>(a, depth, b, c, c_row);
        } else {
            tail<ROWS - 1, NV>(rows, a, depth, b, c, c_row);
        }
    }
}

template <int NV>
static void panel(int64_t rows, const float* a, int64_t depth, const float* b, float* c, int64_t c_row) {
#if BCOS_LANES == 16
    constexpr int ROWS = NV == 4 ? 6 : NV == 2 ? 12 : 14;
#else
    constexpr int ROWS = NV == 2 ? 5 : 8;
#endif
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    // Of nearly equal height: 16 rows are 6, 5, 5.
    for (int64_t i = 0, row = 0; i < parts; ++i) {
        const int64_t height = (rows - row + parts - i - 1) / (parts - i);
        tail<ROWS, NV>(height, a + row * depth, depth, b, c + row * c_row, c_row);
        row += height;
    }
}

void winograd(const Winograd& a) {
    const Sizes& s = a.sizes;
    const int64_t across = (s.out_width + 3) / 4, down = (s.out_height + 3) / 4;
    const int64_t tiles = s.batch * across * down;
    const int64_t block = winograd_block(tiles, s.channels, a.outputs);
    const int64_t v_place = block * s.channels + WINOGRAD_APART, m_place = block * a.outputs + WINOGRAD_APART;
    float* const v_all = a.scratch;
    float* const m_all = a.scratch + WINOGRAD_PLACES * v_place;
    const int nv = vectors_of(a.outputs);
    const int64_t width = nv * LANES, panels = a.outputs / width;
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
            const int64_t place = item / panels, part = item % panels;
            const float* left = v_all + place * v_place;
            const float* right = a.weight + (place * a.outputs + part * width) * s.channels;
            float* result = m_all + place * m_place + part * width;
            if (nv == 4) {
                panel<WIDE>(count, left, s.channels, right, result, a.outputs);
            } else if (nv == 2) {
                panel<2>(count, left, s.channels, right, result, a.outputs);
            } else {
                panel<1>(count, left, s.channels, right, result, a.outputs);
            }
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
