// The ends of a convolution and of an adjoint on ranges of pixels: what epilogue.cpp does by itself, and pointwise.cpp
// after each block of a product.
#pragma once

#include <cstdlib>

#include "activation.h"
#include "adjoint.h"
#include "epilogue.h"
#include "parallel.h"

namespace bcos {
namespace BCOS_ISA {

// Columns of a map whose sums fit the stack.
static constexpr int64_t STACK_COLUMNS = 4096;

static inline int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }

// 1 / n of every pixel of an output row and one group of channels, from the map of sums of squares.
static inline void inverse_norms(const Epilogue& a, int64_t image, int64_t oh, int64_t group, float* inverse) {
    const Sizes& size = a.sizes;
    const Window& w = a.window;
    const int64_t per_group = a.entries / a.groups;
    float stack[STACK_COLUMNS];
    float* columns = size.width <= STACK_COLUMNS ? stack : (float*)malloc(sizeof(float) * size.width);
    for (int64_t i = 0; i < size.width; ++i) columns[i] = 0;
    for (int64_t r = 0; r < w.kernel_h; ++r) {
        const int64_t h = oh * w.stride_h - w.padding_h + r * w.dilation_h;
        if (h < 0 || h >= size.height) continue;
        const float* row = a.squares + (image * size.height + h) * size.width * a.entries + group * per_group;
        if (a.entries == 1) {
            for (int64_t i = 0; i < size.width; ++i) columns[i] += row[i];
        } else {
            for (int64_t i = 0; i < size.width; ++i) {
                for (int64_t t = 0; t < per_group; ++t) columns[i] += row[i * a.entries + t];
            }
        }
    }
    for (int64_t ow = 0; ow < size.out_width; ++ow) {
        float sum = 0;
        const int64_t first = ow * w.stride_w - w.padding_w;
        for (int64_t s = 0; s < w.kernel_w; ++s) {
            const int64_t i = first + s * w.dilation_w;
            if (i >= 0 && i < size.width) sum += columns[i];
        }
        inverse[ow] = sum;
    }
    if (a.of_rows) {
        for (int64_t ow = 0; ow < size.out_width; ++ow) inverse[ow] = 1.f / (__builtin_sqrtf(inverse[ow]) + a.eps);
    } else {
        for (int64_t ow = 0; ow < size.out_width; ++ow) inverse[ow] = 1.f / __builtin_sqrtf(inverse[ow] + a.eps);
    }
    if (columns != stack) free(columns);
}

// Sums of one pixel's squares by group, as values come in order of channels.
struct GroupSums {
    float* out;
    int64_t groups, per_group;
    vfloat total;
    inline void add(vfloat square, int64_t c, int n) {
        if (!out) return;
        if (groups == 1) {
            total += n == LANES ? square : first_lanes(square, n);
            return;
        }
        for (int i = 0; i < n; ++i) {
            float& sum = out[(c + i) / per_group];
            sum = ((c + i) % per_group == 0 ? 0.f : sum) + square[i];
        }
    }
    inline void end() {
        if (out && groups == 1) *out = sum_lanes(total);
    }
};

// One vector of channels of one pixel; returns y as it is stored.
template <bool PART, int ACTIVATION, typename T>
static inline __attribute__((always_inline)) vfloat finish_forward(
    const Epilogue& a, const T* z, const T* residual, T* y_out, int64_t place, int64_t mask_place, int64_t c, int n,
    vfloat inverse) {
    const vfloat response = get<PART>(z + c, n);
    vfloat s = a.scale ? get<PART>(a.scale + c, n) : broadcast(1.f);
    if (a.b == 2.f) {
        s = magnitude(response) * inverse * s;
    } else if (a.b != 1.f) {
        s = general_power(magnitude(response) * inverse, a.b - 1.f) * s;
    }
    vfloat u = response * s;
    if (a.shift) u += get<PART>(a.shift + c, n);
    if (residual) u += get<PART>(residual + c, n);
    const int activation = ACTIVATION >= 0 ? ACTIVATION : a.activation;
    const vfloat gate = activation_gate(u, activation);
    const vfloat y = activated(u, gate, activation);
    put<PART>(y_out + c, y, n);
    if (a.multiplier) put<PART>((T*)a.multiplier + place + c, activation ? s * gate : s, n);
    if (a.gate) {
        if (activation == 1) {
            put_mask_bits((uint8_t*)a.gate + mask_place, c, n, to_bits(u > 0.f));
        } else {
            put<PART>((T*)a.gate + place + c, gate, n);
        }
    }
    return rounded(y, (const T*)nullptr);
}

template <int ACTIVATION, typename T>
static inline void forward_row(
    const Epilogue& given, int64_t image, int64_t oh, int64_t first, int64_t last, float* inverses) {
    // A copy that no store can be to: its members stay in registers.
    const Epilogue a = given;
    const Sizes& size = a.sizes;
    const int64_t channels = size.channels, per_group = channels / a.groups, mask_bytes = (channels + 7) / 8;
    if (a.squares) {
        for (int64_t g = 0; g < a.groups; ++g) inverse_norms(a, image, oh, g, inverses + g * size.out_width);
    }
    // Groups of whole vectors share one factor a vector; others are looked up lane by lane.
    const bool whole = a.groups == 1 || per_group % LANES == 0;
    for (int64_t ow = first; ow < last; ++ow) {
        const int64_t pixel = (image * size.out_height + oh) * size.out_width + ow;
        const int64_t place = pixel * channels, mask_place = pixel * mask_bytes;
        const T* z = (const T*)a.z + pixel * a.z_pixel;
        T* y_out = (T*)a.y + pixel * a.y_pixel;
        const T* residual = a.residual.data ? at<T>(a.residual, image, oh, ow) : nullptr;
        GroupSums sums = {a.out_squares ? a.out_squares + pixel * a.groups : nullptr, a.groups, per_group, {}};
        vfloat inverse = a.squares ? broadcast(inverses[ow]) : vfloat{};
        for (int64_t c = 0; c < channels; c += LANES) {
            const int n = (int)lower(LANES, channels - c);
            if (a.groups > 1 && a.squares) {
                if (whole) {
                    inverse = broadcast(inverses[c / per_group * size.out_width + ow]);
                } else {
                    for (int i = 0; i < n; ++i) inverse[i] = inverses[(c + i) / per_group * size.out_width + ow];
                }
            }
            const vfloat y = n == LANES
                ? finish_forward<false, ACTIVATION>(a, z, residual, y_out, place, mask_place, c, n, inverse)
                : finish_forward<true, ACTIVATION>(a, z, residual, y_out, place, mask_place, c, n, inverse);
            sums.add(y * y, c, n);
        }
        sums.end();
    }
}

// Pixels begin to end, counted over all images.
template <int ACTIVATION, typename T>
static inline void forward_rows(const Epilogue& a, int64_t begin, int64_t end) {
    const Sizes& size = a.sizes;
    const int64_t count = size.out_width * a.groups;
    float stack[STACK_COLUMNS];
    float* inverses = count <= STACK_COLUMNS ? stack : (float*)malloc(sizeof(float) * count);
    by_row(begin, end, size.out_width, [&](int64_t row, int64_t first, int64_t last) {
        forward_row<ACTIVATION, T>(a, row / size.out_height, row % size.out_height, first, last, inverses);
    });
    if (inverses != stack) free(inverses);
}

template <typename T>
static inline void forward_pixels(const Epilogue& a, int64_t begin, int64_t end) {
    if (a.activation == 0) {
        forward_rows<0, T>(a, begin, end);
    } else if (a.activation == 1) {
        forward_rows<1, T>(a, begin, end);
    } else {
        forward_rows<-1, T>(a, begin, end);
    }
}

template <typename T>
static inline void adjoint_pixels(const AdjointEpilogue& a, int64_t begin, int64_t end) {
    const Sizes& size = a.sizes;
    const Adjoint& to = a.adjoint;
    const int64_t channels = size.channels;
    // Where in every operand one pixel's channels follow the other's, a piece of a row is one long pixel.
    auto dense = [](const Image& image, int64_t pixel) { return !image.data || image.pixel == pixel; };
    const bool dense_gate = !to.raw || (to.gate_is_bits ? channels % 8 == 0 && dense(to.gate, channels / 8)
                                                        : dense(to.gate, channels));
    const bool joined =
        dense(a.total, channels) && dense(to.multiplier, channels) && dense(to.identity, channels) && dense_gate;
    by_row(begin, end, size.width, [&](int64_t row, int64_t first, int64_t last) {
        const int64_t m = row / size.height, h = row % size.height;
        const int64_t step = joined ? last - first : 1;
        for (int64_t w = first; w < last; w += step) {
            const AdjointPixel<T> pixel = adjoint_pixel<T>(to, m, h, w, size.height, size.width, channels);
            const T* total = at<T>(a.total, m, h, w);
            const int64_t count = step * channels;
            int64_t c = 0;
            for (; c + LANES <= count; c += LANES) finish<false>(pixel, c, LANES, load(total + c));
            if (c < count) {
                const int n = (int)(count - c);
                finish<true>(pixel, c, n, load_part(total + c, n));
            }
        }
    });
}

}  // namespace BCOS_ISA
}  // namespace bcos
