// Kernels around a library's convolutions, one pass over each image. Compiled once for each instruction set.
//
// Each thread has a range of pixels; a loop runs over pieces of rows, over their pixels, and over vectors of channels.
#include "epilogue.h"

#include <vector>

#include "pixels.h"

namespace bcos {
namespace BCOS_ISA {

template <typename T>
static void forward_epilogue(const Epilogue& a) {
    const int64_t pixels = a.sizes.batch * a.sizes.out_height * a.sizes.out_width;
    in_parts(pixels, pixels * a.sizes.channels, a.threads, [&](int64_t begin, int64_t end) {
        forward_pixels<T>(a, begin, end);
    });
}

template <typename T>
static void adjoint_epilogue(const AdjointEpilogue& a) {
    const int64_t pixels = a.sizes.batch * a.sizes.height * a.sizes.width;
    in_parts(pixels, pixels * a.sizes.channels, a.threads, [&](int64_t begin, int64_t end) {
        adjoint_pixels<T>(a, begin, end);
    });
}

template <bool PART, typename T>
static inline __attribute__((always_inline)) vfloat response_grad(
    const T* y, const T* grad, T* out, int64_t c, int n, vfloat inverse) {
    const vfloat value = get<PART>(y + c, n), g = get<PART>(grad + c, n);
    put<PART>(out + c, 2.f * g * square_root(magnitude(value) * inverse), n);
    return g * value;
}

template <typename T>
static void response_grad_rows(const ResponseGrad& given) {
    const Epilogue layer = given.layer;
    const Sizes& size = layer.sizes;
    const int64_t channels = size.channels, groups = layer.groups, per_group = channels / groups;
    const int64_t pixels = size.batch * size.out_height * size.out_width, width = size.out_width;
    in_parts(pixels, pixels * channels, layer.threads, [&](int64_t begin, int64_t end) {
        const ResponseGrad a = given;
        std::vector<float> inverses((size_t)(width * groups));
        by_row(begin, end, width, [&](int64_t row, int64_t first, int64_t last) {
            const int64_t image = row / size.out_height, oh = row % size.out_height;
            for (int64_t g = 0; g < groups; ++g) inverse_norms(layer, image, oh, g, inverses.data() + g * width);
            for (int64_t ow = first; ow < last; ++ow) {
                const int64_t pixel = row * width + ow;
                const T* y = (const T*)layer.z + pixel * layer.z_pixel;
                const T* grad = at<T>(a.grad, image, oh, ow);
                T* out = (T*)a.grad_z + pixel * channels;
                float* norm = a.norm + pixel * groups;
                GroupSums sums = {norm, groups, per_group, {}};
                for (int64_t c = 0; c < channels; c += LANES) {
                    const int n = (int)lower(LANES, channels - c);
                    vfloat inverse = broadcast(inverses[(size_t)ow]);
                    for (int i = 0; groups > 1 && i < n; ++i) {
                        inverse[i] = inverses[(size_t)((c + i) / per_group * width + ow)];
                    }
                    sums.add(
                        n == LANES ? response_grad<false>(y, grad, out, c, n, inverse)
                                   : response_grad<true>(y, grad, out, c, n, inverse),
                        c, n);
                }
                sums.end();
                for (int64_t g = 0; g < groups; ++g) {
                    const float inverse = inverses[(size_t)(g * width + ow)];
                    norm[g] *= -inverse * inverse;
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
void response_grad(const ResponseGrad& a) {
    if (a.layer.storage == Storage::bfloat16) {
        response_grad_rows<uint16_t>(a);
    } else {
        response_grad_rows<float>(a);
    }
}
void scale_act(const ScaleAct& a) { BCOS_BY_STORAGE(scale_act_by_activation, a) }
void square_sum(const SquareSum& a) { BCOS_BY_STORAGE(square_sum_rows, a) }
void encode(const Encode& a) { BCOS_BY_STORAGE(encode_rows, a) }
void contributions(const Contributions& a) { BCOS_BY_STORAGE(contribution_rows, a) }

}  // namespace BCOS_ISA
}  // namespace bcos
