// Depthwise B-cos convolution in one pass over the image, and its adjoint. Compiled once for each instruction set.
//
//   z_c = w_c . x_c (+ bias)    n_c = sqrt(box_sum(x_c^2) + eps)    y = act(z |z| / n * scale + shift + residual)
//
// A work item is a strip of STRIP pixels of one output row. For each vector of channels its z and squared norms are
// summed in registers, several neighbouring pixels at a time (they share the loads of x, of w, and the squares: a
// window's sum is that of its columns), and the epilogue follows while they are in the first cache. Pixels whose window
// leaves the image to the left or right, and dilated windows, take a loop over the taps that are inside.
#include "depthwise.h"

#include "activation.h"
#include "adjoint.h"

namespace bcos {
namespace BCOS_ISA {

static constexpr int STRIP = 16;
// Neighbouring pixels summed together: as many as the registers hold (32 on AVX-512 and NEON, 16 otherwise).
#if defined(__AVX512F__) || defined(__ARM_NEON)
static constexpr int TOGETHER = 4;
#else
static constexpr int TOGETHER = 2;
#endif
// Below this many multiply-adds a team of threads costs more than it saves.
static constexpr int64_t PARALLEL_WORK = 1 << 18;

static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
// Rounded up, also below zero.
static inline int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

// A range of taps.
struct Range {
    int64_t begin, end;
};
// Taps whose place start + tap * step is within [0, size).
static inline Range taps_inside(int64_t start, int64_t step, int64_t taps, int64_t size) {
    Range range;
    range.begin = start < 0 ? at_most(ceil_div(-start, step), taps) : 0;
    range.end = at_least(range.begin, at_most(taps, ceil_div(size - start, step)));
    return range;
}

// What one strip's convolution sums: a correlation of `source` with the packed taps, whose index goes from `first_tap`
// in steps of `tap_step` along a row (-1: flipped, the adjoint's) and kernel_w as many from row to row.
template <typename T>
struct Correlation {
    const T* source;  // of this image
    int64_t row, pixel, height, width;
    const float* weight;
    int64_t channels, first_tap, tap_step;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

    const float* tap(int64_t r, int64_t s, int64_t c) const {
        return weight + (first_tap + tap_step * (r * kernel_w + s)) * channels + c;
    }
};

// PIXELS neighbouring pixels from column `ow` on, all taps inside the image's width, no dilation along it.
template <bool PART, bool NORM, int KERNEL_W, int STRIDE_W, int PIXELS, typename T>
static inline void neighbours(
    const Correlation<T>& f, int64_t oh, int64_t ow, Range rows, int64_t c, int n, vfloat* z_out, vfloat* q_out) {
    constexpr int COLUMNS = (PIXELS - 1) * STRIDE_W + KERNEL_W;
    vfloat z[PIXELS] = {};
    vfloat squares[COLUMNS] = {};
    const T* start = f.source + (oh * f.stride_h - f.padding_h) * f.row + (ow * STRIDE_W - f.padding_w) * f.pixel + c;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        const T* source = start + r * f.dilation_h * f.row;
        vfloat x[COLUMNS];
#pragma GCC unroll 16
        for (int j = 0; j < COLUMNS; ++j) {
            x[j] = get<PART>(source + j * f.pixel, n);
            if (NORM) squares[j] += x[j] * x[j];
        }
#pragma GCC unroll 16
        for (int s = 0; s < KERNEL_W; ++s) {
            const vfloat w = get<PART>(f.tap(r, s, c), n);
#pragma GCC unroll 16
            for (int p = 0; p < PIXELS; ++p) z[p] += w * x[p * STRIDE_W + s];
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; ++p) {
        z_out[p] = z[p];
        if (NORM) {
            vfloat q = squares[p * STRIDE_W];
#pragma GCC unroll 16
            for (int s = 1; s < KERNEL_W; ++s) q += squares[p * STRIDE_W + s];
            q_out[p] = q;
        }
    }
}

// One pixel, any window.
template <bool PART, bool NORM, typename T>
static inline void single(
    const Correlation<T>& f, int64_t oh, int64_t ow, Range rows, int64_t c, int n, vfloat* z_out, vfloat* q_out) {
    const int64_t h0 = oh * f.stride_h - f.padding_h, w0 = ow * f.stride_w - f.padding_w;
    const Range columns = taps_inside(w0, f.dilation_w, f.kernel_w, f.width);
    vfloat z = {}, q = {};
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        const T* source = f.source + (h0 + r * f.dilation_h) * f.row + w0 * f.pixel + c;
        for (int64_t s = columns.begin; s < columns.end; ++s) {
            const vfloat x = get<PART>(source + s * f.dilation_w * f.pixel, n);
            z += x * get<PART>(f.tap(r, s, c), n);
            if (NORM) q += x * x;
        }
    }
    *z_out = z;
    if (NORM) *q_out = q;
}

// The sums of pixels [begin, end) of an output row for one vector of channels. KERNEL_W 0: any.
template <bool PART, bool NORM, int KERNEL_W, int STRIDE_W, typename T>
static inline void strip_sums(
    const Correlation<T>& f, int64_t oh, int64_t begin, int64_t end, Range inner, int64_t c, int n, vfloat* z,
    vfloat* q) {
    const Range rows = taps_inside(oh * f.stride_h - f.padding_h, f.dilation_h, f.kernel_h, f.height);
    int64_t ow = begin;
    if constexpr (KERNEL_W > 0) {
        // As many as fit the registers: fewer where a wide, strided window holds more columns.
        constexpr int PIXELS = KERNEL_W * STRIDE_W > 10 ? TOGETHER / 2 : TOGETHER;
        while (ow < end) {
            if (ow >= inner.begin && ow + PIXELS <= at_most(inner.end, end)) {
                neighbours<PART, NORM, KERNEL_W, STRIDE_W, PIXELS>(f, oh, ow, rows, c, n, z + (ow - begin), q + (ow - begin));
                ow += PIXELS;
            } else {
                single<PART, NORM>(f, oh, ow, rows, c, n, z + (ow - begin), q + (ow - begin));
                ++ow;
            }
        }
    } else {
        for (; ow < end; ++ow) single<PART, NORM>(f, oh, ow, rows, c, n, z + (ow - begin), q + (ow - begin));
    }
}

template <bool NORM, int KERNEL_W, int STRIDE_W, typename T>
static void sums(
    const Correlation<T>& f, int64_t oh, int64_t begin, int64_t end, Range inner, int64_t c, int n, vfloat* z,
    vfloat* q) {
    if (n == LANES) {
        strip_sums<false, NORM, KERNEL_W, STRIDE_W>(f, oh, begin, end, inner, c, n, z, q);
    } else {
        strip_sums<true, NORM, 0, 1>(f, oh, begin, end, inner, c, n, z, q);
    }
}

template <typename T>
using Sums = void (*)(const Correlation<T>&, int64_t, int64_t, int64_t, Range, int64_t, int, vfloat*, vfloat*);

template <bool NORM, typename T>
static Sums<T> sums_for(int64_t kernel_w, int64_t stride_w, int64_t dilation_w) {
    if (dilation_w == 1 && stride_w == 1) {
        if (kernel_w == 3) return sums<NORM, 3, 1, T>;
        if (kernel_w == 5) return sums<NORM, 5, 1, T>;
        if (kernel_w == 7) return sums<NORM, 7, 1, T>;
    }
    // The adjoint (no norm) comes here with a stride of 1 only.
    if constexpr (NORM) {
        if (dilation_w == 1 && stride_w == 2) {
            if (kernel_w == 3) return sums<NORM, 3, 2, T>;
            if (kernel_w == 5) return sums<NORM, 5, 2, T>;
            if (kernel_w == 7) return sums<NORM, 7, 2, T>;
        }
    }
    return sums<NORM, 0, 1, T>;
}

// Pixels of an output row whose whole window is within the width.
static inline Range inner_pixels(const Window& w, int64_t width, int64_t out_width) {
    Range range;
    range.begin = at_most(out_width, at_least(0, ceil_div(w.padding_w, w.stride_w)));
    const int64_t last = width + w.padding_w - w.dilation_w * (w.kernel_w - 1) - 1;  // the last window's start, padded
    range.end = last < 0 ? range.begin : at_least(range.begin, at_most(out_width, last / w.stride_w + 1));
    return range;
}

// Everything after z for the `count` pixels from column `begin` on and one vector of channels.
template <bool PART, typename T>
static void epilogue(
    const Depthwise& a, int64_t image, int64_t oh, int64_t begin, int count, int64_t c, int n, const vfloat* z,
    const vfloat* q, vfloat* squares) {
    const vfloat bias = a.bias ? get<PART>(a.bias + c, n) : vfloat{};
    const vfloat scale = a.scale ? get<PART>(a.scale + c, n) : broadcast(1.f);
    const vfloat shift = a.shift ? get<PART>(a.shift + c, n) : vfloat{};
    const int64_t channels = a.sizes.channels, bytes = (channels + 7) / 8;
    const int64_t first = (image * a.sizes.out_height + oh) * a.sizes.out_width + begin;
    for (int p = 0; p < count; ++p) {
        const int64_t place = (first + p) * channels + c;
        const vfloat response = z[p] + bias;
        vfloat s = scale;
        if (a.b != 1.f) {
            vfloat ratio = magnitude(response) / square_root(q[p] + a.eps);
            if (a.b != 2.f) ratio = general_power(ratio, a.b - 1.f);
            s = ratio * scale;
        }
        vfloat u = response * s + shift;
        if (a.residual.data) u += get<PART>(at<T>(a.residual, image, oh, begin + p) + c, n);
        const vfloat gate = activation_gate(u, a.activation);
        const vfloat y = activated(u, gate, a.activation);
        put<PART>((T*)a.y + place, y, n);
        if (a.multiplier) put<PART>((T*)a.multiplier + place, s * gate, n);
        if (a.gate) {
            if (a.activation == 1) {
                put_mask_bits((uint8_t*)a.gate + (first + p) * bytes, c, n, to_bits(u > 0.f));
            } else {
                put<PART>((T*)a.gate + place, gate, n);
            }
        }
        if (a.squares) {
            const vfloat stored = rounded(y, (const T*)nullptr);
            vfloat square = stored * stored;
            if constexpr (PART) {
                for (int i = n; i < LANES; ++i) square[i] = 0;  // lanes that are no channel
            }
            squares[p] += square;
        }
    }
}

template <typename T>
static void forward(const Depthwise& a) {
    const Sizes& size = a.sizes;
    const Window& window = a.window;
    const int64_t strips = (size.out_width + STRIP - 1) / STRIP, rows = size.batch * size.out_height;
    const Range inner = inner_pixels(window, size.width, size.out_width);
    const Sums<T> sum = sums_for<true, T>(window.kernel_w, window.stride_w, window.dilation_w);
    const int64_t work = rows * size.out_width * size.channels * window.kernel_h * window.kernel_w;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && work > PARALLEL_WORK)
    for (int64_t item = 0; item < rows * strips; ++item) {
        const int64_t row = item / strips, image = row / size.out_height, oh = row % size.out_height;
        const int64_t begin = item % strips * STRIP, end = at_most(begin + STRIP, size.out_width);
        const int count = (int)(end - begin);
        const Correlation<T> f = {
            at<T>(a.x, image, 0, 0), a.x.row, a.x.pixel, size.height, size.width, a.weight, size.channels, 0, 1,
            window.kernel_h, window.kernel_w, window.stride_h, window.stride_w, window.padding_h, window.padding_w,
            window.dilation_h, window.dilation_w};
        vfloat z[STRIP], q[STRIP], squares[STRIP] = {};
        for (int64_t c = 0; c < size.channels; c += LANES) {
            const int n = (int)at_most(LANES, size.channels - c);
            sum(f, oh, begin, end, inner, c, n, z, q);
            if (n == LANES) {
                epilogue<false, T>(a, image, oh, begin, count, c, n, z, q, squares);
            } else {
                epilogue<true, T>(a, image, oh, begin, count, c, n, z, q, squares);
            }
        }
        if (a.squares) {
            for (int p = 0; p < count; ++p) a.squares[row * size.out_width + begin + p] = sum_lanes(squares[p]);
        }
    }
}

// The adjoint for a stride of 1: the correlation of the gradient with the flipped kernel.
template <typename T>
static void adjoint_dense(const DepthwiseAdjoint& a) {
    const Sizes& size = a.sizes;
    const Window& window = a.window;
    const int64_t padding_h = window.dilation_h * (window.kernel_h - 1) - window.padding_h;
    const int64_t padding_w = window.dilation_w * (window.kernel_w - 1) - window.padding_w;
    Window flipped = window;
    flipped.padding_w = padding_w;
    const int64_t strips = (size.width + STRIP - 1) / STRIP, rows = size.batch * size.height;
    const Range inner = inner_pixels(flipped, size.out_width, size.width);
    const Sums<T> sum = sums_for<false, T>(window.kernel_w, 1, window.dilation_w);
    const int64_t work = rows * size.width * size.channels * window.kernel_h * window.kernel_w;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && work > PARALLEL_WORK)
    for (int64_t item = 0; item < rows * strips; ++item) {
        const int64_t row = item / strips, m = row / size.height, h = row % size.height;
        const int64_t begin = item % strips * STRIP, end = at_most(begin + STRIP, size.width);
        const Correlation<T> f = {
            at<T>(a.grad, m, 0, 0), a.grad.row, a.grad.pixel, size.out_height, size.out_width, a.weight,
            size.channels, window.kernel_h * window.kernel_w - 1, -1, window.kernel_h, window.kernel_w, 1, 1,
            padding_h, padding_w, window.dilation_h, window.dilation_w};
        AdjointPixel<T> pixels[STRIP];
        for (int64_t w = begin; w < end; ++w) {
            pixels[w - begin] = adjoint_pixel<T>(a.adjoint, m, h, w, size.height, size.width, size.channels);
        }
        vfloat z[STRIP];
        for (int64_t c = 0; c < size.channels; c += LANES) {
            const int n = (int)at_most(LANES, size.channels - c);
            sum(f, h, begin, end, inner, c, n, z, z);
            for (int64_t p = 0; p < end - begin; ++p) {
                if (n == LANES) {
                    finish<false>(pixels[p], c, n, z[p]);
                } else {
                    finish<true>(pixels[p], c, n, z[p]);
                }
            }
        }
    }
}

// The taps of one axis whose window covers a place, and the outputs they belong to: tap = first + i * step meets output
// out - i * back, for i < count.
struct Covering {
    int64_t first, step, out, back, count;
};
static inline Covering covering(
    int64_t place, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t outputs) {
    // Every tap with (place + padding - tap * dilation) = out * stride, 0 <= out < outputs. Solutions repeat every
    // `stride` taps at the latest; look for the first two rather than solve for them.
    Covering found = {0, 1, 0, 0, 0};
    for (int64_t tap = 0; tap < kernel; ++tap) {
        const int64_t offset = place + padding - tap * dilation;
        if (offset < 0) break;
        if (offset % stride || offset / stride >= outputs) continue;
        if (found.count == 0) {
            found.first = tap;
            found.out = offset / stride;
        } else if (found.count == 1) {
            found.step = tap - found.first;
            found.back = found.out - offset / stride;
        }
        ++found.count;
    }
    return found;
}

// The adjoint for any stride: each pixel sums the outputs whose window covers it; nothing is multiplied by 0.
template <bool PART, typename T>
static inline vfloat gathered(
    const DepthwiseAdjoint& a, const T* grad, const Covering& rows, const Covering& columns, int64_t c, int n) {
    vfloat total = {};
    for (int64_t i = 0; i < rows.count; ++i) {
        const T* source = grad + (rows.out - i * rows.back) * a.grad.row + columns.out * a.grad.pixel + c;
        const float* tap =
            a.weight + ((rows.first + i * rows.step) * a.window.kernel_w + columns.first) * a.sizes.channels + c;
        for (int64_t j = 0; j < columns.count; ++j) {
            total += get<PART>(source - j * columns.back * a.grad.pixel, n) *
                     get<PART>(tap + j * columns.step * a.sizes.channels, n);
        }
    }
    return total;
}

template <typename T>
static void adjoint_strided(const DepthwiseAdjoint& a) {
    const Sizes& size = a.sizes;
    const Window& w = a.window;
    const int64_t strips = (size.width + STRIP - 1) / STRIP, rows = size.batch * size.height;
    const int64_t work = rows * size.width * size.channels * ceil_div(w.kernel_h, w.stride_h) * ceil_div(w.kernel_w, w.stride_w);
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && work > PARALLEL_WORK)
    for (int64_t item = 0; item < rows * strips; ++item) {
        const int64_t row = item / strips, m = row / size.height, h = row % size.height;
        const int64_t begin = item % strips * STRIP, end = at_most(begin + STRIP, size.width);
        const Covering vertical = covering(h, w.kernel_h, w.stride_h, w.padding_h, w.dilation_h, size.out_height);
        const T* grad = at<T>(a.grad, m, 0, 0);
        for (int64_t column = begin; column < end; ++column) {
            const Covering across = covering(column, w.kernel_w, w.stride_w, w.padding_w, w.dilation_w, size.out_width);
            const AdjointPixel<T> pixel =
                adjoint_pixel<T>(a.adjoint, m, h, column, size.height, size.width, size.channels);
            int64_t c = 0;
            for (; c + LANES <= size.channels; c += LANES) {
                finish<false>(pixel, c, LANES, gathered<false>(a, grad, vertical, across, c, LANES));
            }
            if (c < size.channels) {
                const int n = (int)(size.channels - c);
                finish<true>(pixel, c, n, gathered<true>(a, grad, vertical, across, c, n));
            }
        }
    }
}

template <typename T>
static void adjoint(const DepthwiseAdjoint& a) {
    if (a.window.stride_h == 1 && a.window.stride_w == 1) {
        adjoint_dense<T>(a);
    } else {
        adjoint_strided<T>(a);
    }
}

void depthwise(const Depthwise& a) {
    if (a.storage == Storage::bfloat16) {
        forward<uint16_t>(a);
    } else {
        forward<float>(a);
    }
}

void depthwise_adjoint(const DepthwiseAdjoint& a) {
    if (a.storage == Storage::bfloat16) {
        adjoint<uint16_t>(a);
    } else {
        adjoint<float>(a);
    }
}

}  // namespace BCOS_ISA
}  // namespace bcos
