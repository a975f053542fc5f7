// The end of a layer and the end of an adjoint.
#include "harness.h"

namespace test {

namespace {

struct Case {
    bcos::Sizes sizes;  // height and width of the map; channels and out_* of z
    bcos::Window window;
    int64_t entries, groups;
    bool of_rows;
    int threads;
};

int64_t windowed(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

Case convolution(
    int64_t n, int64_t channels, int64_t h, int64_t w, bcos::Window win, int64_t entries, int64_t groups, int threads) {
    Case c = {{n, channels, h, w, 0, 0}, win, entries, groups, false, threads};
    c.sizes.out_height = windowed(h, win.kernel_h, win.stride_h, win.padding_h, win.dilation_h);
    c.sizes.out_width = windowed(w, win.kernel_w, win.stride_w, win.padding_w, win.dilation_w);
    return c;
}

void check(
    const bcos::Table& kernels, const Case& c, bcos::Storage storage, double b, int activation, bool every,
    bool apart = false) {
    const bcos::Sizes& size = c.sizes;
    const bcos::Window& win = c.window;
    const int64_t pixels = size.batch * size.out_height * size.out_width, channels = size.channels;
    Values z(storage, pixels * channels);
    z.fill();
    for (int64_t i = 0; i < z.count(); ++i) z.set(i, 4 * z.get(i));  // reaches past 6
    const Values response = z.copy();
    Values map = random_floats(size.batch * size.height * size.width * c.entries);
    for (int64_t i = 0; i < map.count(); ++i) map.set(i, std::fabs(map.get(i)));
    Values scale = random_floats(channels), shift = random_floats(channels);
    Picture residual(storage, size.batch, size.out_height, size.out_width, channels, 3, 2);
    Values multiplier(storage, pixels * channels), gate(storage, pixels * channels);
    Bits mask(pixels, channels);
    Values out_squares = floats(pixels * c.groups);

    bcos::Epilogue a;
    a.sizes = size;
    a.window = win;
    a.storage = storage;
    // In place, or into the channels of a wider picture.
    Picture out(storage, size.batch, size.out_height, size.out_width, channels, 2, 3);
    a.z = z.data();
    a.z_pixel = channels;
    a.y = apart ? out.data() : z.data();
    a.y_pixel = apart ? out.image().pixel : channels;
    a.squares = b == 1 ? nullptr : float_data(map);
    a.entries = c.entries;
    a.groups = c.groups;
    a.of_rows = c.of_rows;
    a.b = (float)b;
    a.eps = 1e-6f;
    a.activation = activation;
    if (every) {
        a.scale = float_data(scale);
        a.shift = float_data(shift);
        a.residual = residual.image();
        a.multiplier = multiplier.data();
        a.gate = activation == 1 ? (void*)mask.data() : activation ? gate.data() : nullptr;
        a.out_squares = float_data(out_squares);
    }
    a.threads = c.threads;
    kernels.epilogue(a);
    if (apart) {
        out.untouched();
        for (int64_t i = 0; i < z.count(); ++i) {
            if (z.get(i) != response.get(i)) return fail("z was written to");
            z.set(i, out.values().get(i / channels * a.y_pixel + 2 + i % channels));
        }
    }

    const int64_t per_group = channels / c.groups, entries = c.entries / c.groups;
    for (int64_t p = 0; p < pixels; ++p) {
        const int64_t n = p / (size.out_height * size.out_width), oh = p / size.out_width % size.out_height,
                      ow = p % size.out_width;
        for (int64_t g = 0; g < c.groups; ++g) {
            double sum = 0;
            for (int64_t r = 0; r < win.kernel_h; ++r) {
                for (int64_t s = 0; s < win.kernel_w; ++s) {
                    const int64_t h = oh * win.stride_h - win.padding_h + r * win.dilation_h;
                    const int64_t w = ow * win.stride_w - win.padding_w + s * win.dilation_w;
                    if (h < 0 || w < 0 || h >= size.height || w >= size.width) continue;
                    for (int64_t t = 0; t < entries; ++t) {
                        sum += map.get(((n * size.height + h) * size.width + w) * c.entries + g * entries + t);
                    }
                }
            }
            const double norm = root_of_norm(sum, 1e-6, c.of_rows);
            double squares = 0;
            for (int64_t i = g * per_group; i < (g + 1) * per_group; ++i) {
                const int64_t place = p * channels + i;
                const double value = response.get(place);
                double s = response_scale(value, norm, b), shifted = 0;
                if (every) {
                    s *= scale.get(i);
                    shifted = shift.get(i) + residual.get(n, oh, ow, i);
                }
                const double u = value * s + shifted, on = gate_of(u, activation);
                // A window of padding alone has a norm of 1e-3: what is left of z is large.
                const double magnitude = std::fabs(value * s) + 1;
                close("y", z, place, activated(u, activation), magnitude);
                squares += z.get(place) * z.get(place);
                const bool certain = std::fabs(u) > 1e-4 * magnitude;  // on which side of 0
                if (!every || !certain) continue;
                close("multiplier", multiplier, place, s * on, std::fabs(s) + 1);
                if (activation == 1 && mask.get(p, i) != (u > 0)) fail("gate");
                if (activation > 1) close("gate", gate, place, on);
            }
            if (every) close("squares", out_squares, p * c.groups + g, squares, squares);
        }
        // What fills the last byte of a mask up is 0.
        for (int64_t i = channels; every && activation == 1 && i < mask.width() * 8; ++i) {
            if (mask.get(p, i)) fail("a bit beyond the channels");
        }
    }
    residual.untouched();
}

}  // namespace

void test_epilogue(const bcos::Table& kernels) {
    const std::vector<Case> cases = {
        convolution(1, 5, 6, 7, {3, 3, 2, 2, 1, 1, 1, 1}, 1, 1, 1),
        convolution(2, 24, 5, 3, {1, 1, 1, 1, 0, 0, 1, 1}, 3, 1, 2),
        convolution(2, 66, 7, 9, {3, 2, 1, 3, 2, 1, 2, 1}, 2, 1, 3),
        convolution(1, 30, 5, 5, {3, 3, 1, 1, 1, 1, 1, 1}, 6, 3, 1),
        convolution(1, 64, 4, 5, {3, 3, 1, 1, 1, 1, 1, 1}, 4, 4, 2),
        convolution(0, 8, 4, 4, {1, 1, 1, 1, 0, 0, 1, 1}, 1, 1, 2),
        // Large enough for a team of threads, with rows that are no multiple of it; and for no buffer on the stack.
        convolution(1, 48, 27, 31, {5, 5, 1, 1, 2, 2, 1, 1}, 1, 1, 3),
        convolution(1, 4, 1, 5000, {1, 3, 1, 1, 0, 1, 1, 1}, 2, 2, 2),
        {{1, 33, 1, 11, 1, 11}, {1, 1, 1, 1, 0, 0, 1, 1}, 1, 1, true, 1},
    };
    for (const bcos::Storage storage : storages()) {
        for (const Case& c : cases) {
            for (const double b : {1., 2., 1.5}) {
                for (int activation = 0; activation < 6; ++activation) check(kernels, c, storage, b, activation, true);
                check(kernels, c, storage, b, 1, false);
                check(kernels, c, storage, b, 1, true, true);
            }
        }
    }
}

void test_adjoint_end(const bcos::Table& kernels) {
    struct Shape {
        int64_t images, per_image, height, width, channels;
        int threads;
    };
    const std::vector<Shape> shapes = {
        {2, 3, 3, 5, 21, 2}, {1, 1, 2, 2, 64, 1}, {3, 1, 1, 7, 5, 2}, {1, 2, 23, 29, 40, 3}, {0, 1, 4, 4, 8, 2}};
    for (const bcos::Storage storage : storages()) {
        for (const Shape& s : shapes) {
            for (int with = 0; with < 32; ++with) {
                const bool bits = with & 8;
                const int64_t rows = s.images * s.per_image, pixels = rows * s.height * s.width;
                Values total(storage, pixels * s.channels), raw(storage, pixels * s.channels);
                total.fill();
                const Values before = total.copy();
                Picture multiplier(storage, s.images, s.height, s.width, s.channels, 0, 4);
                Picture identity(storage, rows, s.height, s.width, s.channels, 5, 1);
                Picture gate(storage, s.images, s.height, s.width, s.channels);
                Bits mask(s.images * s.height * s.width, s.channels);
                for (int64_t p = 0; p < s.images * s.height * s.width; ++p) {
                    for (int64_t c = 0; c < s.channels; ++c) mask.set(p, c, gate.values().get(p * s.channels + c) > 0);
                }
                bcos::AdjointEpilogue a;
                a.sizes = {rows, s.channels, s.height, s.width, s.height, s.width};
                a.storage = storage;
                a.threads = s.threads;
                a.adjoint.per_image = s.per_image;
                // In place, or from the channels of a wider picture.
                Picture apart(storage, rows, s.height, s.width, s.channels, 1, 2);
                for (int64_t i = 0; i < total.count(); ++i) {
                    apart.values().set(i / s.channels * (s.channels + 3) + 1 + i % s.channels, before.get(i));
                }
                a.adjoint.out = total.data();
                a.total = with & 16
                    ? apart.image()
                    : bcos::Image{total.data(), s.height * s.width * s.channels, s.width * s.channels, s.channels};
                if (with & 1) a.adjoint.multiplier = multiplier.image();
                if (with & 2) a.adjoint.identity = identity.image();
                if (with & 4) a.adjoint.raw = raw.data();
                const int64_t width = mask.width();
                a.adjoint.gate = bits ? bcos::Image{mask.data(), s.height * s.width * width, s.width * width, width}
                                      : gate.image();
                a.adjoint.gate_is_bits = bits;
                kernels.adjoint_end(a);
                for (int64_t p = 0; p < pixels; ++p) {
                    const int64_t m = p / (s.height * s.width), h = p / s.width % s.height, w = p % s.width;
                    const int64_t image = m / s.per_image, pixel = (image * s.height + h) * s.width + w;
                    for (int64_t c = 0; c < s.channels; ++c) {
                        const int64_t i = p * s.channels + c;
                        const double g = before.get(i) + (with & 2 ? identity.get(m, h, w, c) : 0);
                        close("out", total, i, with & 1 ? g * multiplier.get(image, h, w, c) : g);
                        if (!(with & 4)) continue;
                        close("raw", raw, i, bits ? g * mask.get(pixel, c) : g * gate.get(image, h, w, c));
                    }
                }
                multiplier.untouched();
                identity.untouched();
            }
        }
    }
}

void test_response_grad(const bcos::Table& kernels) {
    for (const bcos::Storage storage : storages()) {
        for (const int64_t groups : {1, 2, 3}) {
            const Case c = convolution(2, 21 * groups, 7, 9, {3, 2, 2, 1, 1, 1, 1, 2}, groups, groups, 2);
            const bcos::Sizes& size = c.sizes;
            const int64_t oh = size.out_height, ow = size.out_width, pixels = 2 * oh * ow, channels = size.channels;
            Picture y(storage, 2, oh, ow, channels), grad(storage, 2, oh, ow, channels, 2, 1);
            Values map = random_floats(2 * 7 * 9 * groups), grad_z(storage, pixels * channels);
            for (int64_t i = 0; i < map.count(); ++i) map.set(i, 0.5 + std::fabs(map.get(i)));
            Values norm = floats(pixels * groups);
            bcos::ResponseGrad a;
            a.layer.sizes = size;
            a.layer.window = c.window;
            a.layer.storage = storage;
            a.layer.z = y.data();
            a.layer.z_pixel = channels;
            a.layer.squares = float_data(map);
            a.layer.entries = a.layer.groups = groups;
            a.layer.eps = 1e-6f;
            a.layer.threads = 2;
            a.grad = grad.image();
            a.grad_z = grad_z.data();
            a.norm = float_data(norm);
            kernels.response_grad(a);
            const bcos::Window& w = c.window;
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t n = p / (oh * ow), h = p / ow % oh, x = p % ow;
                for (int64_t g = 0; g < groups; ++g) {
                    double sum = 0, products = 0;
                    for (int64_t r = 0; r < w.kernel_h; ++r) {
                        for (int64_t s = 0; s < w.kernel_w; ++s) {
                            const int64_t i = h * w.stride_h - w.padding_h + r * w.dilation_h;
                            const int64_t j = x * w.stride_w - w.padding_w + s * w.dilation_w;
                            if (i >= 0 && i < 7 && j >= 0 && j < 9) sum += map.get(((n * 7 + i) * 9 + j) * groups + g);
                        }
                    }
                    const double root = std::sqrt(sum + 1e-6);
                    for (int64_t o = g * channels / groups; o < (g + 1) * channels / groups; ++o) {
                        const double value = y.get(n, h, x, o), slope = grad.get(n, h, x, o);
                        close("grad_z", grad_z, p * channels + o, 2 * slope * std::sqrt(std::fabs(value) / root), 1);
                        products += slope * value;
                    }
                    close("norm", norm, p * groups + g, -products / root / root, 1);
                }
            }
            grad.untouched();
        }
    }
}

}  // namespace test
