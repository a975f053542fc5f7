// Kernels around a library's convolutions, one pass over each image. Compiled once for each instruction set.
//
// Each thread has a range of pixels; a loop runs over pieces of rows, over their pixels, and over vectors of channels.
#include "epilogue.h"

#include <cstdlib>

#include "activation.h"
#include "adjoint.h"
#include "parallel.h"

namespace bcos {
namespace BCOS_ISA {

// Columns of a map whose sums fit the stack.
static constexpr int64_t STACK_COLUMNS = 4096;

static inline int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }

// 1 / n of every pixel of an output row and one group of channels, from the map of sums of squares.
static void inverse_norms(const Epilogue& a, int64_t image, int64_t oh, int64_t group, float* inverse) {
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
    const Epilogue& a, const T* residual, T* y_out, int64_t place, int64_t mask_place, int64_t c, int n,
    vfloat inverse) {
    const vfloat response = get<PART>((const T*)a.z + place + c, n);
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
static void forward_row(
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
                ? finish_forward<false, ACTIVATION>(a, residual, y_out, place, mask_place, c, n, inverse)
                : finish_forward<true, ACTIVATION>(a, residual, y_out, place, mask_place, c, n, inverse);
            sums.add(y * y, c, n);
        }
        sums.end();
    }
}

template <int ACTIVATION, typename T>
static void forward_rows(const Epilogue& a) {
    const Sizes& size = a.sizes;
    const int64_t pixels = size.batch * size.out_height * size.out_width, count = size.out_width * a.groups;
    in_parts(pixels, pixels * size.channels, a.threads, [&](int64_t begin, int64_t end) {
        float stack[STACK_COLUMNS];
        float* inverses = count <= STACK_COLUMNS ? stack : (float*)malloc(sizeof(float) * count);
        by_row(begin, end, size.out_width, [&](int64_t row, int64_t first, int64_t last) {
            forward_row<ACTIVATION, T>(a, row / size.out_height, row % size.out_height, first, last, inverses);
        });
        if (inverses != stack) free(inverses);
    });
}

template <typename T>
static void forward_epilogue(const Epilogue& a) {
    if (a.activation == 0) {
        forward_rows<0, T>(a);
    } else if (a.activation == 1) {
        forward_rows<1, T>(a);
    } else {
        forward_rows<-1, T>(a);
    }
}

template <typename T>
static void adjoint_epilogue(const AdjointEpilogue& a) {
    const Sizes& size = a.sizes;
    const Adjoint& to = a.adjoint;
    const int64_t channels = size.channels, pixels = size.batch * size.height * size.width;
    // Where in every operand one pixel's channels follow the other's, a piece of a row is one long pixel.
    auto dense = [](const Image& image, int64_t pixel) { return !image.data || image.pixel == pixel; };
    const bool dense_gate = !to.raw || (to.gate_is_bits ? channels % 8 == 0 && dense(to.gate, channels / 8)
                                                        : dense(to.gate, channels));
    const bool joined =
        dense(a.total, channels) && dense(to.multiplier, channels) && dense(to.identity, channels) && dense_gate;
    in_parts(pixels, pixels * channels, a.threads, [&](int64_t begin, int64_t end) {
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
    });
}

template <bool PART, int ACTIVATION, typename T>
static inline __attribute__((always_inline)) vfloat scaled(
    const ScaleAct& a, const T* x, const T* grad, const T* identity, T* out, int64_t c, int n) {
    const vfloat scale = get<PART>(a.scale + c, n);
    const vfloat u = get<PART>(x + c, n) * scale + get<PART>(a.shift + c, n);
    const int activation = ACTIVATION >= 0 ? ACTIVATION : a.activation;
    const vfloat gate = activation_gate(u, activation);
    vfloat y;
    if (grad) {
        y = get<PART>(grad + c, n) * (scale * gate);
        if (identity) y += get<PART>(identity + c, n);
    } else {
        y = activated(u, gate, activation);
    }
    put<PART>(out + c, y, n);
    return rounded(y, (const T*)nullptr);
}

template <int ACTIVATION, typename T>
static void scale_act_rows(const ScaleAct& given) {
    const int64_t pixels = given.sizes.batch * given.sizes.height * given.sizes.width;
    in_parts(pixels, pixels * given.sizes.channels, given.threads, [&](int64_t begin, int64_t end) {
        // A copy that no store can be to: its members stay in registers.
        const ScaleAct a = given;
        const Sizes& size = a.sizes;
        const int64_t channels = size.channels;
        by_row(begin, end, size.width, [&](int64_t row, int64_t first, int64_t last) {
            const int64_t m = row / size.height, h = row % size.height;
            for (int64_t w = first; w < last; ++w) {
                const int64_t pixel = row * size.width + w;
                const T* x = at<T>(a.x, m / a.per_image, h, w);
                const T* grad = a.grad.data ? at<T>(a.grad, m, h, w) : nullptr;
                const T* identity = a.identity.data ? at<T>(a.identity, m, h, w) : nullptr;
                T* out = (T*)a.out + pixel * a.out_pixel;
                GroupSums sums = {
                    a.squares ? a.squares + pixel * a.groups : nullptr, a.groups, channels / a.groups, {}};
                int64_t c = 0;
                for (; c + LANES <= channels; c += LANES) {
                    const vfloat y = scaled<false, ACTIVATION>(a, x, grad, identity, out, c, LANES);
                    sums.add(y * y, c, LANES);
                }
                if (c < channels) {
                    const int n = (int)(channels - c);
                    const vfloat y = scaled<true, ACTIVATION>(a, x, grad, identity, out, c, n);
                    sums.add(y * y, c, n);
                }
                sums.end();
            }
        });
    });
}

template <typename T>
static void scale_act_by_activation(const ScaleAct& a) {
    if (a.activation == 1) {
        scale_act_rows<1, T>(a);
    } else {
        scale_act_rows<-1, T>(a);
    }
}

template <typename T>
static void square_sum_rows(const SquareSum& a) {
    const Sizes& size = a.sizes;
    const int64_t channels = size.channels, pixels = size.batch * size.height * size.width;
    in_parts(pixels, pixels * channels, a.threads, [&](int64_t begin, int64_t end) {
        by_row(begin, end, size.width, [&](int64_t row, int64_t first, int64_t last) {
            for (int64_t w = first; w < last; ++w) {
                const T* x = at<T>(a.x, row / size.height, row % size.height, w);
                GroupSums sums = {a.squares + (row * size.width + w) * a.groups, a.groups, channels / a.groups, {}};
                int64_t c = 0;
                for (; c + LANES <= channels; c += LANES) {
                    const vfloat v = load(x + c);
                    sums.add(v * v, c, LANES);
                }
                if (c < channels) {
                    const int n = (int)(channels - c);
                    const vfloat v = load_part(x + c, n);
                    sums.add(v * v, c, n);
                }
                sums.end();
            }
        });
    });
}

static inline float pixel_of(const Planes& image, int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t offset = n * image.batch + c * image.channel + h * image.row + w * image.pixel;
    return image.bytes ? ((const uint8_t*)image.data)[offset] / 255.f : ((const float*)image.data)[offset];
}

static inline void put_one(float* p, float v) { *p = v; }
static inline void put_one(uint16_t* p, float v) { store_part(p, broadcast(v), 1); }
static inline float rounded_one(float v, const float*) { return v; }
static inline float rounded_one(float v, const uint16_t* like) { return rounded(broadcast(v), like)[0]; }

template <typename T>
static void encode_rows(const Encode& a) {
    const Sizes& size = a.sizes;
    const int64_t rows = size.batch * size.height;
#pragma omp parallel for schedule(static) num_threads(a.threads) \
    if (a.threads > 1 && rows * size.width * size.channels > PARALLEL_VALUES)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t image = row / size.height, h = row % size.height;
        for (int64_t w = 0; w < size.width; ++w) {
            const int64_t pixel = row * size.width + w;
            T* out = (T*)a.out + pixel * size.channels;
            float sum = 0;
            for (int64_t c = 0; c < 3; ++c) {
                const float x = pixel_of(a.image, image, c, h, w);
                const float v = (x - a.mean[c]) * a.inverse_std[c];
                put_one(out + c, v);
                const float stored = rounded_one(v, out);
                sum += stored * stored;
                if (a.six) {
                    const float inverted = (1.f - x - a.mean[c + 3]) * a.inverse_std[c + 3];
                    put_one(out + c + 3, inverted);
                    const float second = rounded_one(inverted, out);
                    sum += second * second;
                }
            }
            for (int64_t c = a.six ? 6 : 3; c < size.channels; ++c) put_one(out + c, 0.f);
            a.squares[pixel] = sum;
        }
    }
}

// LANES pixels at a time, their channels gathered into vectors over pixels.
template <typename T>
static void contribution_rows(const Contributions& a) {
    const Sizes& size = a.sizes;
    const int64_t rows = size.batch * size.height, plane = size.height * size.width;
    const int channels = (int)size.channels;
    const bool six = channels == 6;
#pragma omp parallel for schedule(static) num_threads(a.threads) if (a.threads > 1 && rows * size.width > 4096)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t m = row / size.height, h = row % size.height, image = m / a.per_image;
        const int64_t gh = h / a.block, dy = h % a.block;
        for (int64_t w0 = 0; w0 < size.width; w0 += LANES) {
            const int n = (int)lower(LANES, size.width - w0);
            float gathered[6][LANES] = {}, pixels[3][LANES] = {};
            for (int i = 0; i < n; ++i) {
                const int64_t w = w0 + i, gw = w / a.block, dx = w % a.block;
                const T* grad = at<T>(a.grad, m, gh, gw) + (dy * a.block + dx) * a.inner;
                for (int c = 0; c < channels; ++c) gathered[c][i] = get<true>(grad + c, 1)[0];
                for (int c = 0; c < 3; ++c) pixels[c][i] = pixel_of(a.image, image, c, h, w);
            }
            vfloat weight[6] = {}, total = {}, largest = {}, norm = {};
            const int64_t place = h * size.width + w0;
            for (int c = 0; c < channels; ++c) {
                weight[c] = load(gathered[c]) * (a.inverse_std[c] * a.scale);
                const vfloat x = load(pixels[c % 3]);
                total += weight[c] * (c < 3 ? x : 1.f - x);
                const vfloat size_of = magnitude(weight[c]);
                largest = size_of > largest ? size_of : largest;
                norm += weight[c] * weight[c];
                float* out = a.weights + (m * channels + c) * plane + place;
                if (n == LANES) {
                    store(out, weight[c]);
                } else {
                    store_part(out, weight[c], n);
                }
            }
            store_part(a.contributions + m * plane + place, total, n);
            if (!a.colour || !six) continue;
            for (int c = 0; c < 3; ++c) {
                const vfloat zero = {};
                vfloat first = weight[c] / (largest + 1e-12f), second = weight[c + 3] / (largest + 1e-12f);
                first = first < 0.f ? zero : first;
                second = second < 0.f ? zero : second;
                store_part(a.colour + (m * 4 + c) * plane + place, first / (first + second + 1e-12f), n);
            }
            const vfloat alpha = total < 0.f ? broadcast(1e-12f) : square_root(norm);
            store_part(a.colour + (m * 4 + 3) * plane + place, alpha, n);
        }
    }
}

#define BCOS_BY_STORAGE(kernel, a)                  \
    if ((a).storage == Storage::bfloat16) {         \
        kernel<uint16_t>(a);                        \
    } else {                                        \
        kernel<float>(a);                           \
    }

void epilogue(const Epilogue& a) { BCOS_BY_STORAGE(forward_epilogue, a) }
void adjoint_end(const AdjointEpilogue& a) { BCOS_BY_STORAGE(adjoint_epilogue, a) }
void scale_act(const ScaleAct& a) { BCOS_BY_STORAGE(scale_act_by_activation, a) }
void square_sum(const SquareSum& a) { BCOS_BY_STORAGE(square_sum_rows, a) }
void encode(const Encode& a) { BCOS_BY_STORAGE(encode_rows, a) }
void contributions(const Contributions& a) { BCOS_BY_STORAGE(contribution_rows, a) }

}  // namespace BCOS_ISA
}  // namespace bcos
