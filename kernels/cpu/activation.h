// Activations as gates, act(u) = gate(u) u, and the general exponent, on vectors.
#pragma once

#include <cmath>

#include "vector.h"

namespace bcos {
namespace BCOS_ISA {

// `activation` is a position in ACTIVATIONS of kernels/reference.py.
static inline vfloat activation_gate(vfloat u, int activation) {
    const vfloat zero = {}, one = broadcast(1.f);
    switch (activation) {
        case 1:
            return u > 0.f ? one : zero;
        case 2:
            return u > 0.f ? (u < 6.f ? one : 6.f / u) : zero;
        case 3:
            return 0.5f * (1.f + error_function(u * 0.70710678118654752f));
        case 4:
            return 1.f / (1.f + exponential(-u));
        case 5: {
            vfloat v = u + 3.f;
            v = v < 0.f ? zero : v;
            v = v > 6.f ? broadcast(6.f) : v;
            return v * (1.f / 6.f);
        }
        default:
            return one;
    }
}

// A ReLU keeps NaN and does not multiply an infinity by 0.
static inline vfloat activated(vfloat u, vfloat gate, int activation) {
    return activation == 1 ? (u < 0.f ? vfloat{} : u) : u * gate;
}

// (s + 1e-6)^(b - 1), the published form for B other than 1 and 2.
static inline vfloat general_power(vfloat s, float exponent) {
    for (int i = 0; i < LANES; ++i) s[i] = powf(s[i] + 1e-6f, exponent);
    return s;
}

}  // namespace BCOS_ISA
}  // namespace bcos
