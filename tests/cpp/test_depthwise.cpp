// Depthwise convolutions with their norms, and their adjoints.
#include "harness.h"

namespace test {

namespace {

struct Case {
    int64_t channels, height, width;
    bcos::Window window;
};

const std::vector<Case>& cases() {
    static const std::vector<Case> all = {
        {5, 9, 7, {3, 3, 1, 1, 1, 1, 1, 1}},   {40, 8, 33, {3, 3, 2, 2, 1, 1, 1, 1}},
        {66, 6, 19, {5, 5, 1, 1, 2, 2, 1, 1}}, {16, 11, 13, {5, 5, 2, 2, 0, 0, 1, 1}},
        {24, 7, 9, {3, 3, 1, 1, 2, 2, 2, 2}},  {8, 9, 10, {2, 3, 3, 1, 0, 1, 1, 1}},
        {32, 6, 20, {7, 7, 1, 1, 3, 3, 1, 1}}, {32, 16, 21, {7, 7, 2, 2, 3, 3, 1, 1}},
        {16, 3, 2, {5, 5, 1, 1, 2, 2, 1, 1}},  {16, 30, 34, {3, 3, 1, 1, 1, 1, 1, 1}},
    };
    return all;
}

bcos::Sizes sizes_of(int64_t batch, const Case& c) {
    const bcos::Window& w = c.window;
    return {batch, c.channels, c.height, c.width,
            (c.height + 2 * w.padding_h - w.dilation_h * (w.kernel_h - 1) - 1) / w.stride_h + 1,
            (c.width + 2 * w.padding_w - w.dilation_w * (w.kernel_w - 1) - 1) / w.stride_w + 1};
}

}  // namespace

void test_depthwise(const bcos::Table& kernels) {
    for (const bcos::Storage storage : storages()) {
        for (const Case& c : cases()) {
            for (const double b : {1., 2., 1.5}) {
                for (const int activation : {0, 1, 4}) {
                    const bcos::Sizes size = sizes_of(2, c);
                    const bcos::Window& win = c.window;
                    const int64_t pixels = 2 * size.out_height * size.out_width, channels = c.channels;
                    Picture x(storage, 2, c.height, c.width, channels, 1, 6);
                    Picture residual(storage, 2, size.out_height, size.out_width, channels, 2, 1);
                    Values weight = random_floats(win.kernel_h * win.kernel_w * channels);
                    Values bias = random_floats(channels), scale = random_floats(channels), shift = random_floats(channels);
                    Values y(storage, pixels * channels), multiplier(storage, pixels * channels);
                    Values gate(storage, pixels * channels), squares = floats(pixels);
                    Bits mask(pixels, channels);
                    bcos::Depthwise a;
                    a.sizes = size;
                    a.window = win;
                    a.storage = storage;
                    a.x = x.image();
                    a.residual = residual.image();
                    a.weight = float_data(weight);
                    a.bias = float_data(bias);
                    a.scale = float_data(scale);
                    a.shift = float_data(shift);
                    a.b = (float)b;
                    a.eps = 1e-6f;
                    a.activation = activation;
                    a.y = y.data();
                    a.multiplier = multiplier.data();
                    a.gate = activation == 1 ? (void*)mask.data() : activation ? gate.data() : nullptr;
                    a.squares = float_data(squares);
                    a.threads = 2;
                    kernels.depthwise(a);
                    for (int64_t p = 0; p < pixels; ++p) {
                        const int64_t n = p / (size.out_height * size.out_width), oh = p / size.out_width % size.out_height,
                                      ow = p % size.out_width;
                        double total = 0;
                        for (int64_t i = 0; i < channels; ++i) {
                            double z = bias.get(i), sum = 0;
                            for (int64_t r = 0; r < win.kernel_h; ++r) {
                                for (int64_t s = 0; s < win.kernel_w; ++s) {
                                    const double v = x.padded(
                                        n, oh * win.stride_h - win.padding_h + r * win.dilation_h,
                                        ow * win.stride_w - win.padding_w + s * win.dilation_w, i);
                                    z += v * weight.get((r * win.kernel_w + s) * channels + i);
                                    sum += v * v;
                                }
                            }
                            const double s = response_scale(z, std::sqrt(sum + 1e-6), b) * scale.get(i);
                            const double u = z * s + shift.get(i) + residual.get(n, oh, ow, i), on = gate_of(u, activation);
                            const int64_t place = p * channels + i;
                            const double magnitude = std::fabs(z * s) + 1;
                            close("y", y, place, activated(u, activation), magnitude);
                            total += y.get(place) * y.get(place);
                            if (std::fabs(u) < 1e-4 * magnitude) continue;  // on either side of a ReLU
                            close("multiplier", multiplier, place, s * on, std::fabs(s) + 1);
                            if (activation == 1 && mask.get(p, i) != (u > 0)) fail("gate");
                            if (activation > 1) close("gate", gate, place, on);
                        }
                        close("squares", squares, p, total, total);
                    }
                    x.untouched();
                    residual.untouched();
                }
            }
        }
    }
}

void test_depthwise_adjoint(const bcos::Table& kernels) {
    const int64_t images = 1, per_image = 2, rows = images * per_image;
    for (const bcos::Storage storage : storages()) {
        for (const Case& c : cases()) {
            for (const bool plain : {false, true}) {
                const bcos::Sizes size = sizes_of(rows, c);
                const bcos::Window& win = c.window;
                const int64_t channels = c.channels, pixels = rows * c.height * c.width;
                Picture grad(storage, rows, size.out_height, size.out_width, channels, 3, 0);
                Picture multiplier(storage, images, c.height, c.width, channels, 0, 2);
                Picture identity(storage, rows, c.height, c.width, channels, 1, 0);
                Picture gate(storage, images, c.height, c.width, channels);
                Values weight = random_floats(win.kernel_h * win.kernel_w * channels);
                Values out(storage, pixels * channels), raw(storage, pixels * channels);
                bcos::DepthwiseAdjoint a;
                a.sizes = size;
                a.window = win;
                a.storage = storage;
                a.grad = grad.image();
                a.weight = float_data(weight);
                a.adjoint.per_image = per_image;
                a.adjoint.out = out.data();
                if (!plain) {
                    a.adjoint.multiplier = multiplier.image();
                    a.adjoint.identity = identity.image();
                    a.adjoint.gate = gate.image();
                    a.adjoint.raw = raw.data();
                }
                a.threads = 2;
                kernels.depthwise_adjoint(a);
                std::vector<double> expected((size_t)(pixels * channels), 0.);
                for (int64_t p = 0; p < rows * size.out_height * size.out_width; ++p) {
                    const int64_t m = p / (size.out_height * size.out_width), oh = p / size.out_width % size.out_height,
                                  ow = p % size.out_width;
                    for (int64_t r = 0; r < win.kernel_h; ++r) {
                        for (int64_t s = 0; s < win.kernel_w; ++s) {
                            const int64_t h = oh * win.stride_h - win.padding_h + r * win.dilation_h;
                            const int64_t w = ow * win.stride_w - win.padding_w + s * win.dilation_w;
                            if (h < 0 || w < 0 || h >= c.height || w >= c.width) continue;
                            for (int64_t i = 0; i < channels; ++i) {
                                expected[(size_t)(((m * c.height + h) * c.width + w) * channels + i)] +=
                                    grad.get(m, oh, ow, i) * weight.get((r * win.kernel_w + s) * channels + i);
                            }
                        }
                    }
                }
                for (int64_t p = 0; p < pixels; ++p) {
                    const int64_t m = p / (c.height * c.width), h = p / c.width % c.height, w = p % c.width;
                    for (int64_t i = 0; i < channels; ++i) {
                        const int64_t place = p * channels + i;
                        double g = expected[(size_t)place];
                        if (plain) {
                            close("out", out, place, g);
                            continue;
                        }
                        g += identity.get(m, h, w, i);
                        close("out", out, place, g * multiplier.get(m / per_image, h, w, i));
                        close("raw", raw, place, g * gate.get(m / per_image, h, w, i));
                    }
                }
                grad.untouched();
            }
        }
    }
}

}  // namespace test
