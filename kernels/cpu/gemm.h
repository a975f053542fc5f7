// Matrix products with sums in registers: a few rows of A times a panel of B, whose columns are packed side by side.
#pragma once

#include "vector.h"

namespace bcos {
namespace BCOS_ISA {

// Vectors of a panel, and rows of A for panels of 1 to WIDE vectors: as many sums as the registers hold.
#if BCOS_LANES == 16
static constexpr int WIDE = 4;
static constexpr int ROWS_OF[WIDE + 1] = {0, 14, 12, 8, 6};
#else
static constexpr int WIDE = 2;
static constexpr int ROWS_OF[WIDE + 1] = {0, 8, 5};
#endif
static constexpr int MOST_ROWS = ROWS_OF[1];

// Columns of a packed B: panels of WIDE vectors, the last one of as many as are left, filled up with zeros.
static inline int64_t padded_columns(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }
static inline int64_t panels_of(int64_t columns) { return (columns + WIDE * LANES - 1) / (WIDE * LANES); }
static inline int vectors_of_panel(int64_t columns, int64_t panel) {
    const int64_t left = padded_columns(columns) / LANES - panel * WIDE;
    return (int)(left < WIDE ? left : WIDE);
}

// A is read in `taps` pieces of `depth` values next to each other, `tap` apart; B has their rows one after the other.
struct Left {
    const float* row[MOST_ROWS];
    int64_t taps, tap, depth;
};

// C [ROWS, NV vectors] = A B; of the last vector `last` lanes are stored.
template <int ROWS, int NV>
static inline void product(const Left& a, const float* b, float* c, int64_t c_row, int last) {
    vfloat sum[ROWS][NV] = {};
    const float* row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = a.row[r];
    for (int64_t t = 0; t < a.taps; ++t) {
        for (int64_t k = 0; k < a.depth; ++k) {
            vfloat right[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) right[v] = load(b + v * LANES);
            b += NV * LANES;
#pragma GCC unroll 14
            for (int r = 0; r < ROWS; ++r) {
                const vfloat left = broadcast(row[r][k]);
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) sum[r][v] += left * right[v];
            }
        }
#pragma GCC unroll 14
        for (int r = 0; r < ROWS; ++r) row[r] += a.tap;
    }
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV - 1; ++v) store(c + r * c_row + v * LANES, sum[r][v]);
        float* const end = c + r * c_row + (NV - 1) * LANES;
        if (last == LANES) {
            store(end, sum[r][NV - 1]);
        } else {
            store_part(end, sum[r][NV - 1], last);
        }
    }
}

template <int ROWS, int NV>
static inline void product_of(int rows, const Left& a, const float* b, float* c, int64_t c_row, int last) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) {
            product<ROWS, NV>(a, b, c, c_row, last);
        } else {
            product_of<ROWS - 1, NV>(rows, a, b, c, c_row, last);
        }
    }
}

// Rows first to first + count of A times one panel; `row_of(i)` is where row i of A begins.
template <int NV, typename RowOf>
static inline void panel_rows(
    int64_t first, int64_t count, Left a, const RowOf& row_of, const float* b, float* c, int64_t c_row, int last) {
    const int64_t parts = (count + ROWS_OF[NV] - 1) / ROWS_OF[NV];
    // Of nearly equal height: 16 rows are 6, 5 and 5.
    for (int64_t part = 0, done = 0; part < parts; ++part) {
        const int height = (int)((count - done + parts - part - 1) / (parts - part));
        for (int r = 0; r < height; ++r) a.row[r] = row_of(first + done + r);
        product_of<ROWS_OF[NV], NV>(height, a, b, c + (first + done) * c_row, c_row, last);
        done += height;
    }
}

// The same for a panel of a matrix of `columns` columns; b and c, whose rows are c_row apart, are whole matrices.
template <typename RowOf>
static inline void panel_product(
    int64_t first, int64_t count, const Left& a, const RowOf& row_of, const float* b, float* c, int64_t c_row,
    int64_t columns, int64_t panel) {
    const int nv = vectors_of_panel(columns, panel);
    const int64_t column = panel * WIDE * LANES;
    const int64_t left = columns - column - (nv - 1) * LANES;
    const int last = (int)(left < LANES ? left : LANES);
    b += column * a.taps * a.depth;
    c += column;
#if BCOS_LANES == 16
    if (nv == 4) return panel_rows<4>(first, count, a, row_of, b, c, c_row, last);
    if (nv == 3) return panel_rows<3>(first, count, a, row_of, b, c, c_row, last);
#endif
    if (nv == 2) return panel_rows<2>(first, count, a, row_of, b, c, c_row, last);
    panel_rows<1>(first, count, a, row_of, b, c, c_row, last);
}

// B [rows, columns] given by `value(row, column)`, packed.
template <typename Value>
static inline void pack_panels(int64_t rows, int64_t columns, float* packed, const Value& value) {
    for (int64_t panel = 0; panel < panels_of(columns); ++panel) {
        const int64_t column = panel * WIDE * LANES, width = (int64_t)vectors_of_panel(columns, panel) * LANES;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < width; ++i) *packed++ = column + i < columns ? value(r, column + i) : 0.f;
        }
    }
}

}  // namespace BCOS_ISA
}  // namespace bcos
