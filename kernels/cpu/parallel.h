// Work shared out among threads, for kernels that go over pixels.
#pragma once

#include <omp.h>

#include <cstdint>

namespace bcos {
namespace BCOS_ISA {

// Below this many values a team of threads costs more than it saves.
static constexpr int64_t PARALLEL_VALUES = 1 << 15;

// run(begin, end) for parts of [0, count), one a thread. They end anywhere (7 rows are no two equal parts), so results
// must not depend on where.
template <typename Run>
static inline void in_parts(int64_t count, int64_t values, int threads, const Run& run) {
    if (threads <= 1 || values <= PARALLEL_VALUES) {
        if (count > 0) run(0, count);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
        const int64_t begin = count * member / team, end = count * (member + 1) / team;
        if (begin < end) run(begin, end);
    }
}

// run(row, first, last) for the pieces into which the ends of rows cut the pixels [begin, end).
template <typename Run>
static inline void by_row(int64_t begin, int64_t end, int64_t width, const Run& run) {
    int64_t row = begin / width, first = begin % width;
    while (begin < end) {
        const int64_t left = first + end - begin, last = left < width ? left : width;
        run(row, first, last);
        begin += last - first;
        first = 0;
        ++row;
    }
}

}  // namespace BCOS_ISA
}  // namespace bcos
