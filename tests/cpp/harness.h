// What the C++ tests of the kernels share: operands whose edges are watched, random values, comparisons in double.
//
// Every operand is a heap block of exactly its size, so that the address sanitizer sees one element too many. An image
// that is a slice of the channels of a wider one has NaN in the others: a kernel that reads them spoils its result,
// and one that writes them is caught by `untouched`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "table.h"

namespace test {

// Failed comparisons of the whole run.
int& failures();
// What is being tested, for messages.
std::string& where();
void fail(const std::string& what);

// The next of a fixed sequence of values, uniform in [-1, 1).
double random_value();

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bfloat16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Values of float or, as 16 bits, bfloat16; NaN until something is written.
class Values {
public:
    Values(bcos::Storage storage, int64_t count)
        : storage_(storage), count_(count), bytes_(new uint8_t[(size_t)(count * width())]) {
        for (int64_t i = 0; i < count; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
    }
    int64_t count() const { return count_; }
    bcos::Storage storage() const { return storage_; }
    void* data() { return bytes_.get(); }
    void* at(int64_t i) { return bytes_.get() + i * width(); }
    double get(int64_t i) const {
        if (storage_ == bcos::Storage::bfloat16) {
            uint16_t half;
            std::memcpy(&half, bytes_.get() + i * 2, 2);
            return from_bfloat16(half);
        }
        float value;
        std::memcpy(&value, bytes_.get() + i * 4, 4);
        return value;
    }
    void set(int64_t i, double value) {
        const float single = (float)value;
        if (storage_ == bcos::Storage::bfloat16) {
            const uint16_t half = to_bfloat16(single);
            std::memcpy(bytes_.get() + i * 2, &half, 2);
        } else {
            std::memcpy(bytes_.get() + i * 4, &single, 4);
        }
    }
    void fill() {
        for (int64_t i = 0; i < count_; ++i) set(i, random_value());
    }
    Values copy() const {
        Values other(storage_, count_);
        std::memcpy(other.bytes_.get(), bytes_.get(), (size_t)(count_ * width()));
        return other;
    }

private:
    int64_t width() const { return storage_ == bcos::Storage::bfloat16 ? 2 : 4; }
    bcos::Storage storage_;
    int64_t count_;
    std::unique_ptr<uint8_t[]> bytes_;
};

inline Values floats(int64_t count) { return Values(bcos::Storage::float32, count); }
inline Values random_floats(int64_t count) {
    Values v = floats(count);
    v.fill();
    return v;
}
inline float* float_data(Values& v) { return (float*)v.data(); }

// [N, H, W, C], random, with `before` and `after` more channels of NaN around it.
class Picture {
public:
    Picture(bcos::Storage storage, int64_t n, int64_t h, int64_t w, int64_t c, int64_t before = 0, int64_t after = 0)
        : n_(n), h_(h), w_(w), c_(c), before_(before), wide_(before + c + after), values_(storage, n * h * w * wide_) {
        for (int64_t p = 0; p < n * h * w; ++p) {
            for (int64_t i = 0; i < c; ++i) values_.set(p * wide_ + before + i, random_value());
        }
    }
    bcos::Image image() {
        return {values_.at(before_), h_ * w_ * wide_, w_ * wide_, wide_};
    }
    void* data() { return values_.at(before_); }
    double get(int64_t n, int64_t h, int64_t w, int64_t c) const {
        return values_.get(((n * h_ + h) * w_ + w) * wide_ + before_ + c);
    }
    // 0 outside the image.
    double padded(int64_t n, int64_t h, int64_t w, int64_t c) const {
        return h < 0 || w < 0 || h >= h_ || w >= w_ ? 0 : get(n, h, w, c);
    }
    Values& values() { return values_; }
    // The channels around the slice are still NaN.
    void untouched() const {
        for (int64_t p = 0; p < n_ * h_ * w_; ++p) {
            for (int64_t i = 0; i < wide_; ++i) {
                if ((i < before_ || i >= before_ + c_) && !std::isnan(values_.get(p * wide_ + i))) {
                    fail("wrote outside its channels");
                    return;
                }
            }
        }
    }

private:
    int64_t n_, h_, w_, c_, before_, wide_;
    Values values_;
};

// One bit a channel, [pixels, ceil(C / 8)].
class Bits {
public:
    Bits(int64_t pixels, int64_t channels) : width_((channels + 7) / 8), bytes_(new uint8_t[(size_t)(pixels * width_)]) {
        for (int64_t i = 0; i < pixels * width_; ++i) bytes_[(size_t)i] = 0xa5;
    }
    uint8_t* data() { return bytes_.get(); }
    int64_t width() const { return width_; }
    bool get(int64_t pixel, int64_t c) const { return bytes_[(size_t)(pixel * width_ + c / 8)] >> (c % 8) & 1; }
    void set(int64_t pixel, int64_t c, bool on) {
        uint8_t& byte = bytes_[(size_t)(pixel * width_ + c / 8)];
        byte = (uint8_t)((byte & ~(1 << (c % 8))) | (on << (c % 8)));
    }

private:
    int64_t width_;
    std::unique_ptr<uint8_t[]> bytes_;
};

// Equal up to the rounding of the storage, relative to the expected value or `scale` where that is larger.
void close(const char* what, const Values& actual, int64_t i, double expected, double scale = 1);

double gate_of(double u, int activation);
double activated(double u, int activation);
double root_of_norm(double sum, double eps, bool of_rows);
// (|z| / n)^(b-1), with the published 1e-6 for B other than 1 and 2.
double response_scale(double z, double n, double b);

const std::vector<bcos::Storage>& storages();

void test_epilogue(const bcos::Table& kernels);
void test_adjoint_end(const bcos::Table& kernels);
void test_scale_act(const bcos::Table& kernels);
void test_square_sum(const bcos::Table& kernels);
void test_encode(const bcos::Table& kernels);
void test_contributions(const bcos::Table& kernels);
void test_depthwise(const bcos::Table& kernels);
void test_depthwise_adjoint(const bcos::Table& kernels);
void test_response_grad(const bcos::Table& kernels);
void test_pointwise_forward(const bcos::Table& kernels);
void test_pointwise_adjoint(const bcos::Table& kernels);
void test_winograd(const bcos::Table& kernels);
void test_norms(const bcos::Table& kernels);

}  // namespace test
