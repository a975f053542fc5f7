// 1 x 1 convolutions with the epilogue, and adjoints with theirs.
#include "harness.h"

namespace test {

namespace {

struct Case {
    int64_t batch, depth, outputs, height, width, stride;
    int threads;
};

const Case CASES[] = {
    {1, 1, 1, 1, 1, 1, 1},    {2, 5, 3, 3, 4, 1, 2},     {1, 24, 96, 7, 7, 1, 2},    {2, 33, 21, 9, 11, 2, 2},
    {1, 16, 40, 17, 13, 1, 2}, {3, 64, 130, 5, 6, 3, 1}, {1, 40, 1000, 2, 3, 1, 2}, {1, 9, 72, 20, 21, 1, 2},
};

Values packed_weight(const bcos::Table& kernels, const Case& c, Values& weight) {
    const int64_t pad = bcos::PointwisePack::PAD;
    Values packed = floats(c.depth * ((c.outputs + pad - 1) / pad * pad));
    bcos::PointwisePack pack;
    pack.weight = float_data(weight);
    pack.packed = float_data(packed);
    pack.outputs = c.outputs;
    pack.depth = c.depth;
    kernels.pointwise_pack(pack);
    return packed;
}

bcos::Product product_of(const Case& c, Picture& input, Values& packed) {
    bcos::Product product;
    product.input = input.image();
    product.depth = c.depth;
    product.stride_h = product.stride_w = c.stride;
    product.weight = float_data(packed);
    return product;
}

double response(const Case& c, const Picture& x, const Values& weight, int64_t n, int64_t h, int64_t w, int64_t o) {
    double sum = 0;
    for (int64_t i = 0; i < c.depth; ++i) {
        sum += x.get(n, h * c.stride, w * c.stride, i) * weight.get(o * c.depth + i);
    }
    return sum;
}

}  // namespace

void test_pointwise_forward(const bcos::Table& kernels) {
    for (const Case& c : CASES) {
        const int64_t oh = (c.height - 1) / c.stride + 1, ow = (c.width - 1) / c.stride + 1;
        Picture x(bcos::Storage::float32, c.batch, c.height, c.width, c.depth, 2, 1);
        Picture y(bcos::Storage::float32, c.batch, oh, ow, c.outputs, 3, 2);
        Values weight = random_floats(c.outputs * c.depth), packed = packed_weight(kernels, c, weight);
        Values map = random_floats(c.batch * c.height * c.width), scale = random_floats(c.outputs);
        for (int64_t i = 0; i < map.count(); ++i) map.set(i, 1 + std::fabs(map.get(i)));
        Values out_squares = floats(c.batch * oh * ow), multiplier = floats(c.batch * oh * ow * c.outputs);
        bcos::PointwiseForward a;
        a.product = product_of(c, x, packed);
        a.end.sizes = {c.batch, c.outputs, c.height, c.width, oh, ow};
        a.end.window.stride_h = a.end.window.stride_w = c.stride;
        a.end.z = a.end.y = y.data();
        a.end.z_pixel = a.end.y_pixel = y.image().pixel;
        a.end.squares = float_data(map);
        a.end.scale = float_data(scale);
        a.end.multiplier = multiplier.data();
        a.end.out_squares = float_data(out_squares);
        a.end.threads = c.threads;
        kernels.pointwise_forward(a);
        const double size = std::sqrt((double)c.depth);
        for (int64_t p = 0; p < c.batch * oh * ow; ++p) {
            const int64_t n = p / (oh * ow), h = p / ow % oh, w = p % ow;
            const double norm = std::sqrt(map.get((n * c.height + h * c.stride) * c.width + w * c.stride));
            double squares = 0;
            for (int64_t o = 0; o < c.outputs; ++o) {
                const double z = response(c, x, weight, n, h, w, o), m = std::fabs(z) / norm * scale.get(o);
                close("y", y.values(), p * a.end.y_pixel + 3 + o, z * m, size * size);
                close("multiplier", multiplier, p * c.outputs + o, m, size);
                squares += z * m * z * m;
            }
            close("squares", out_squares, p, squares, 1);
        }
        x.untouched();
        y.untouched();
    }
}

void test_pointwise_adjoint(const bcos::Table& kernels) {
    for (const Case& c : CASES) {
        if (c.stride != 1) continue;
        const int64_t pixels = c.height * c.width, per_image = 3;
        for (const bool plain : {false, true}) {
            Picture grad(bcos::Storage::float32, c.batch * per_image, c.height, c.width, c.depth, 0, 3);
            Picture m(bcos::Storage::float32, c.batch, c.height, c.width, c.outputs, 1, 1);
            Picture identity(bcos::Storage::float32, c.batch * per_image, c.height, c.width, c.outputs, 4, 0);
            Values weight = random_floats(c.outputs * c.depth), packed = packed_weight(kernels, c, weight);
            Values out = floats(c.batch * per_image * pixels * c.outputs), raw = floats(out.count());
            bcos::PointwiseAdjoint a;
            a.product = product_of(c, grad, packed);
            a.end.sizes = {c.batch * per_image, c.outputs, c.height, c.width, c.height, c.width};
            a.end.total = {out.data(), pixels * c.outputs, c.width * c.outputs, c.outputs};
            a.end.adjoint.out = out.data();
            a.end.adjoint.per_image = per_image;
            if (!plain) {
                a.end.adjoint.multiplier = m.image();
                a.end.adjoint.identity = identity.image();
                a.end.adjoint.raw = raw.data();
            }
            a.end.threads = c.threads;
            kernels.pointwise_adjoint(a);
            const double size = std::sqrt((double)c.depth);
            for (int64_t p = 0; p < c.batch * per_image * pixels; ++p) {
                const int64_t n = p / pixels, h = p / c.width % c.height, w = p % c.width;
                for (int64_t o = 0; o < c.outputs; ++o) {
                    double total = response(c, grad, weight, n, h, w, o);
                    if (!plain) {
                        total += identity.get(n, h, w, o);
                        close("raw", raw, p * c.outputs + o, total, size);
                        total *= m.get(n / per_image, h, w, o);
                    }
                    close("out", out, p * c.outputs + o, total, size);
                }
            }
            grad.untouched();
        }
    }
}

}  // namespace test
