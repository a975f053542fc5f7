// Layer normalisation and its adjoint, a row at a time while it is in the first cache, and sums over the pixels of each
// channel. Compiled once for each instruction set.
#include "norms.h"

#include <memory>

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

// What is summed in float before double takes over: it fits the first cache, and loses few digits.
static constexpr int64_t BLOCK_VALUES = 8192, BLOCK_ROWS = 128;

template <typename Term>
struct SumBlock {
    const Term term;  // a copy, as above
    const int64_t channels, first, last;
    float* to;

    template <bool PART>
    inline void add(int64_t c, int n) {
        vfloat sum = {};
        for (int64_t row = first; row < last; ++row) sum += term.template of<PART>(row * channels + c, c, n);
        put<PART>(to + c, sum, n);
    }
    void run() { BCOS_VECTORS(channels, add) }
};

template <typename Term>
static void sum_channels(const ChannelSums& a, const Term& term) {
    const int64_t channels = a.channels;
    if (!channels) return;
    const int64_t fitting = channels < BLOCK_VALUES ? BLOCK_VALUES / channels : 1;
    const int64_t length = fitting < BLOCK_ROWS ? fitting : BLOCK_ROWS;
    const int64_t blocks = (a.rows + length - 1) / length;
    // Blocks of one size whatever the number of threads, and added in their order: so the sums are the same.
    const std::unique_ptr<float[]> sums(new float[blocks * channels]);
    in_parts(blocks, a.rows * channels, a.threads, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * length, last = first + length < a.rows ? first + length : a.rows;
            SumBlock<Term>{term, channels, first, last, sums.get() + block * channels}.run();
        }
    });
    for (int64_t c = 0; c < channels; ++c) a.out[c] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t c = 0; c < channels; ++c) a.out[c] += sums[block * channels + c];
    }
}

template <bool SQUARED>
struct Deviation {
    const float *x, *mean;
    template <bool PART>
    inline vfloat of(int64_t place, int64_t c, int n) const {
        const vfloat d = get<PART>(x + place, n) - get<PART>(mean + c, n);
        return SQUARED ? d * d : d;
    }
};

struct Products {
    const float *x, *y;
    template <bool PART>
    inline vfloat of(int64_t place, int64_t, int n) const {
        return get<PART>(x + place, n) * get<PART>(y + place, n);
    }
};

void channel_sums(const ChannelSums& a) {
    if (a.y) return sum_channels(a, Products{a.x, a.y});
    if (a.squared) return sum_channels(a, Deviation<true>{a.x, a.mean});
    sum_channels(a, Deviation<false>{a.x, a.mean});
}

struct CombinedRow {
    const ChannelCombine a;  // a copy, as above
    int64_t place;

    template <bool PART>
    inline void write(int64_t c, int n) {
        const vfloat v = (get<PART>(a.x + place + c, n) - get<PART>(a.mean + c, n)) * get<PART>(a.x_scale + c, n);
        put<PART>(a.out + place + c, v + get<PART>(a.y + place + c, n) * get<PART>(a.y_scale + c, n), n);
    }
    void run() { BCOS_VECTORS(a.channels, write) }
};

void channel_combine(const ChannelCombine& a) {
    in_parts(a.rows, a.rows * a.channels, a.threads, [&](int64_t begin, int64_t end) {
        CombinedRow row{a, 0};
        for (int64_t r = begin; r < end; ++r) {
            row.place = r * a.channels;
            row.run();
        }
    });
}

}  // namespace BCOS_ISA
}  // namespace bcos
