// Layer normalisation and its adjoint, a row at a time while it is in the first cache. Compiled once for each
// instruction set.
#include "norms.h"

#include "parallel.h"
#include "vector.h"

namespace bcos {
namespace BCOS_ISA {

// Calls step(c, n) for the vectors of a row; the last has n < LANES channels, which `part` says at compile time.
#define BCOS_VECTORS(channels, step)                                       \
    {                                                                      \
        int64_t c = 0;                                                     \
        for (; c + LANES <= (channels); c += LANES) step<false>(c, LANES); \
        if (c < (channels)) step<true>(c, (int)((channels) - c));          \
    }

template <bool PART>
static inline vfloat counted(vfloat v, int n) {
    return PART ? first_lanes(v, n) : v;
}

template <typename T>
struct NormRow {
    const LayerNorm a;  // a copy that no store can be to: its members stay in registers
    const T* x;
    T* y;
    float mean, rstd;
    vfloat sum, squares;

    template <bool PART>
    inline void add(int64_t c, int n) {
        sum += get<PART>(x + c, n);
    }
    // The sum of squared differences, not the mean of squares less the squared mean: that loses digits.
    template <bool PART>
    inline void deviate(int64_t c, int n) {
        const vfloat d = counted<PART>(get<PART>(x + c, n) - mean, n);
        squares += d * d;
    }
    template <bool PART>
    inline void write(int64_t c, int n) {
        vfloat v = (get<PART>(x + c, n) - mean) * rstd;
        if (a.weight) v *= get<PART>(a.weight + c, n);
        if (a.bias) v += get<PART>(a.bias + c, n);
        put<PART>(y + c, v, n);
        const vfloat stored = counted<PART>(rounded(v, (const T*)nullptr), n);
        squares += stored * stored;
    }
    void run(int64_t row) {
        const int64_t channels = a.channels;
        sum = vfloat{};
        BCOS_VECTORS(channels, add)
        mean = sum_lanes(sum) / (float)channels;
        squares = vfloat{};
        BCOS_VECTORS(channels, deviate)
        rstd = 1.f / __builtin_sqrtf(sum_lanes(squares) / (float)channels + a.eps);
        squares = vfloat{};
        BCOS_VECTORS(channels, write)
        a.rstd[row] = rstd;
        if (a.squares) a.squares[row] = sum_lanes(squares);
    }
};

template <typename T>
static void norm_rows(const LayerNorm& a) {
    in_parts(a.rows, a.rows * a.channels, a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t place = row * a.channels;
            NormRow<T>{a, (const T*)a.x + place, (T*)a.y + place, 0, 0, {}, {}}.run(row);
        }
    });
}

template <typename T>
struct AdjointRow {
    const LayerNormAdjoint a;  // a copy, as above
    const T *grad, *identity;
    T* out;
    float rstd, mean;
    vfloat sum;

    template <bool PART>
    inline vfloat weighted(int64_t c, int n) const {
        const vfloat g = get<PART>(grad + c, n);
        return a.weight ? g * get<PART>(a.weight + c, n) : g;
    }
    template <bool PART>
    inline void add(int64_t c, int n) {
        sum += weighted<PART>(c, n);
    }
    template <bool PART>
    inline void write(int64_t c, int n) {
        vfloat v = (weighted<PART>(c, n) - mean) * rstd;
        if (identity) v += get<PART>(identity + c, n);
        put<PART>(out + c, v, n);
    }
    void run() {
        BCOS_VECTORS(a.channels, add)
        mean = sum_lanes(sum) / (float)a.channels;
        BCOS_VECTORS(a.channels, write)
    }
};

template <typename T>
static void adjoint_rows(const LayerNormAdjoint& a) {
    in_parts(a.rows, a.rows * a.channels, a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t place = row * a.channels, image = row / a.length;
            const float rstd = a.rstd[image / a.per_image * a.length + row % a.length];
            const T* identity = a.identity ? (const T*)a.identity + place : nullptr;
            AdjointRow<T>{a, (const T*)a.grad + place, identity, (T*)a.out + place, rstd, 0, {}}.run();
        }
    });
}

void layer_norm(const LayerNorm& a) {
    if (a.storage == Storage::bfloat16) return norm_rows<uint16_t>(a);
    norm_rows<float>(a);
}

void layer_norm_adjoint(const LayerNormAdjoint& a) {
    if (a.storage == Storage::bfloat16) return adjoint_rows<uint16_t>(a);
    adjoint_rows<float>(a);
}

}  // namespace BCOS_ISA
}  // namespace bcos
