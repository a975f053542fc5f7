// The end of every adjoint on one vector of channels (see struct Adjoint).
#pragma once

#include "images.h"
#include "vector.h"

namespace bcos {
namespace BCOS_ISA {

template <typename T>
static inline const T* at(const Image& image, int64_t n, int64_t h, int64_t w) {
    return (const T*)image.data + n * image.batch + h * image.row + w * image.pixel;
}

// Where the operands of one pixel start; null where there is none.
template <typename T>
struct AdjointPixel {
    const T* multiplier;
    const T* identity;
    const void* gate;
    T* out;
    T* raw;
    bool gate_is_bits;
};

// Row m of the gradients, pixel (h, w) of an image of the given size.
template <typename T>
static inline AdjointPixel<T> adjoint_pixel(
    const Adjoint& a, int64_t m, int64_t h, int64_t w, int64_t height, int64_t width, int64_t channels) {
    const int64_t n = m / a.per_image;
    const int64_t place = ((m * height + h) * width + w) * channels;
    AdjointPixel<T> pixel;
    pixel.multiplier = a.multiplier.data ? at<T>(a.multiplier, n, h, w) : nullptr;
    pixel.identity = a.identity.data ? at<T>(a.identity, m, h, w) : nullptr;
    pixel.gate = nullptr;
    if (a.gate.data && a.raw) {
        pixel.gate = a.gate_is_bits ? (const void*)at<uint8_t>(a.gate, n, h, w) : (const void*)at<T>(a.gate, n, h, w);
    }
    pixel.out = (T*)a.out + place;
    pixel.raw = a.raw ? (T*)a.raw + place : nullptr;
    pixel.gate_is_bits = a.gate_is_bits;
    return pixel;
}

// Channels c to c + n (n < LANES only if PART) of a pixel.
template <bool PART, typename T>
static inline __attribute__((always_inline)) void finish(
    const AdjointPixel<T>& pixel, int64_t c, int n, vfloat total) {
    if (pixel.identity) total += get<PART>(pixel.identity + c, n);
    put<PART>(pixel.out + c, pixel.multiplier ? total * get<PART>(pixel.multiplier + c, n) : total, n);
    if (!pixel.raw) return;
    if (pixel.gate) {
        vfloat gate;
        if (pixel.gate_is_bits) {
            gate = from_bits(mask_bits((const uint8_t*)pixel.gate, c, n)) ? broadcast(1.f) : vfloat{};
        } else {
            gate = get<PART>((const T*)pixel.gate + c, n);
        }
        total *= gate;  // a product, not a choice: what is infinite or NaN stays so
    }
    put<PART>(pixel.raw + c, total, n);
}

}  // namespace BCOS_ISA
}  // namespace bcos
