// Maps of sums of squares, norms folded to a scale, the network's input and what an explanation is made of.
#include "harness.h"

namespace test {

void test_square_sum(const bcos::Table& kernels) {
    for (const bcos::Storage storage : storages()) {
        for (const auto& [channels, groups] : std::vector<std::pair<int64_t, int64_t>>{{5, 1}, {66, 3}, {64, 4}, {66, 1}}) {
            Picture x(storage, 2, 5, 57, channels, 2, 9);
            Values squares = floats(2 * 5 * 57 * groups);
            bcos::SquareSum a;
            a.sizes = {2, channels, 5, 57, 5, 57};
            a.storage = storage;
            a.x = x.image();
            a.groups = groups;
            a.squares = float_data(squares);
            a.threads = 2;
            kernels.square_sum(a);
            for (int64_t p = 0; p < 2 * 5 * 57; ++p) {
                for (int64_t g = 0; g < groups; ++g) {
                    double sum = 0;
                    for (int64_t c = 0; c < channels / groups; ++c) {
                        const double v = x.get(p / (5 * 57), p / 57 % 5, p % 57, g * (channels / groups) + c);
                        sum += v * v;
                    }
                    close("squares", squares, p * groups + g, sum);
                }
            }
        }
    }
}

void test_scale_act(const bcos::Table& kernels) {
    for (const bcos::Storage storage : storages()) {
        for (const int64_t channels : {5, 24, 66}) {
            for (int activation = 0; activation < 6; ++activation) {
                for (const bool adjoint : {false, true}) {
                    const int64_t per_image = adjoint ? 3 : 1, rows = 2 * per_image, height = 5, width = 19;
                    Picture x(storage, 2, height, width, channels, 4, 1), grad(storage, rows, height, width, channels);
                    Picture identity(storage, rows, height, width, channels, 1, 1);
                    Values scale = random_floats(channels), shift = random_floats(channels);
                    Values out(storage, rows * height * width * channels), squares = floats(rows * height * width * 1);
                    bcos::ScaleAct a;
                    a.sizes = {rows, channels, height, width, height, width};
                    a.storage = storage;
                    a.x = x.image();
                    a.scale = float_data(scale);
                    a.shift = float_data(shift);
                    a.activation = activation;
                    a.per_image = per_image;
                    // Some adjoints overwrite the identity, a slice of channels.
                    const bool in_place = adjoint && activation == 3;
                    const Values added = identity.values().copy();
                    a.out = in_place ? identity.data() : out.data();
                    a.out_pixel = in_place ? channels + 2 : channels;
                    a.threads = 2;
                    if (adjoint) {
                        a.grad = grad.image();
                        if (activation % 2) a.identity = identity.image();
                    } else {
                        a.squares = float_data(squares);
                    }
                    kernels.scale_act(a);
                    for (int64_t i = 0; in_place && i < out.count(); ++i) {
                        out.set(i, identity.values().get(i / channels * (channels + 2) + 1 + i % channels));
                    }
                    for (int64_t p = 0; p < rows * height * width; ++p) {
                        const int64_t m = p / (height * width), h = p / width % height, w = p % width;
                        double sum = 0;
                        for (int64_t c = 0; c < channels; ++c) {
                            const double u = x.get(m / per_image, h, w, c) * scale.get(c) + shift.get(c);
                            double expected = activated(u, activation);
                            if (adjoint) {
                                if (std::fabs(u) < 1e-5) continue;  // on either side of a ReLU
                                expected = grad.get(m, h, w, c) * scale.get(c) * gate_of(u, activation);
                                if (activation % 2) expected += added.get(p * (channels + 2) + 1 + c);
                            }
                            close("out", out, p * channels + c, expected);
                            sum += out.get(p * channels + c) * out.get(p * channels + c);
                        }
                        if (!adjoint) close("squares", squares, p, sum, sum);
                    }
                    x.untouched();
                    identity.untouched();
                }
            }
        }
    }
}

void test_encode(const bcos::Table& kernels) {
    const int64_t batch = 2, height = 37, width = 61;
    for (const bcos::Storage storage : storages()) {
        for (const bool bytes : {false, true}) {
            for (const bool six : {false, true}) {
                for (const bool planar : {false, true}) {
                    for (const int64_t channels : {six ? 6 : 3, 8}) {
                        std::unique_ptr<uint8_t[]> image(new uint8_t[batch * 3 * height * width]);
                        Values given = floats(batch * 3 * height * width);
                        for (int64_t i = 0; i < given.count(); ++i) {
                            image[(size_t)i] = (uint8_t)(127.5 + 127.5 * random_value());
                            given.set(i, image[(size_t)i] / 255.);
                        }
                        Values mean = random_floats(six ? 6 : 3), inverse = random_floats(six ? 6 : 3);
                        const int64_t pixels = batch * height * width;
                        Values out(storage, pixels * channels), squares = floats(pixels);
                        bcos::Encode a;
                        a.sizes = {batch, channels, height, width, height, width};
                        a.storage = storage;
                        a.image.data = bytes ? (void*)image.get() : given.data();
                        a.image.bytes = bytes;
                        a.image.batch = 3 * height * width;
                        a.image.channel = planar ? height * width : 1;
                        a.image.row = planar ? width : 3 * width;
                        a.image.pixel = planar ? 1 : 3;
                        a.mean = float_data(mean);
                        a.inverse_std = float_data(inverse);
                        a.six = six;
                        a.out = out.data();
                        a.squares = float_data(squares);
                        a.threads = 2;
                        kernels.encode(a);
                        for (int64_t p = 0; p < pixels; ++p) {
                            const int64_t n = p / (height * width), h = p / width % height, w = p % width;
                            double sum = 0;
                            for (int64_t c = 0; c < channels; ++c) {
                                const int64_t from = n * a.image.batch + c % 3 * a.image.channel + h * a.image.row +
                                                     w * a.image.pixel;
                                double expected = 0;
                                if (c < (six ? 6 : 3)) {
                                    const double x = c < 3 ? given.get(from) : 1 - given.get(from);
                                    expected = (x - mean.get(c)) * inverse.get(c);
                                }
                                close("out", out, p * channels + c, expected);
                                sum += out.get(p * channels + c) * out.get(p * channels + c);
                            }
                            close("squares", squares, p, sum, sum);
                        }
                    }
                }
            }
        }
    }
}

void test_contributions(const bcos::Table& kernels) {
    const int64_t images = 2, per_image = 2, rows = images * per_image, height = 12;
    for (const bcos::Storage storage : storages()) {
        for (const int64_t block : {1, 2, 3}) {
            for (const int64_t channels : {3, 6}) {
                for (const bool bytes : {false, true}) {
                    const int64_t width = block == 2 ? 38 : 39, inner = 7, plane = height * width;
                    Picture grad(
                        storage, rows, height / block + 1, width / block + 2, inner * block * block, block == 1 ? 1 : 0, 0);
                    std::unique_ptr<uint8_t[]> image(new uint8_t[images * 3 * plane]);
                    Values given = floats(images * 3 * plane);
                    for (int64_t i = 0; i < given.count(); ++i) {
                        image[(size_t)i] = (uint8_t)(127.5 + 127.5 * random_value());
                        given.set(i, image[(size_t)i] / 255.);
                    }
                    Values inverse = random_floats(channels);
                    Values weights = floats(rows * channels * plane), contributions = floats(rows * plane);
                    Values colour = floats(rows * 4 * plane);
                    bcos::Contributions a;
                    a.sizes = {rows, channels, height, width, height, width};
                    a.storage = storage;
                    a.grad = grad.image();
                    a.block = block;
                    a.inner = inner;
                    a.per_image = per_image;
                    a.image.data = bytes ? (void*)image.get() : given.data();
                    a.image.bytes = bytes;
                    a.image.batch = 3 * plane;
                    a.image.channel = plane;
                    a.image.row = width;
                    a.image.pixel = 1;
                    a.inverse_std = float_data(inverse);
                    a.scale = 0.25f;
                    a.weights = float_data(weights);
                    a.contributions = float_data(contributions);
                    a.colour = channels == 6 && !bytes ? float_data(colour) : nullptr;
                    a.threads = 3;
                    kernels.contributions(a);
                    for (int64_t p = 0; p < rows * plane; ++p) {
                        const int64_t m = p / plane, h = p % plane / width, w = p % width;
                        double value[6] = {}, sum = 0, largest = 0, norm = 0;
                        for (int64_t c = 0; c < channels; ++c) {
                            const int64_t at = (h % block * block + w % block) * inner + c;
                            value[c] = grad.get(m, h / block, w / block, at) * inverse.get(c) * 0.25;
                            const double x = given.get((m / per_image * 3 + c % 3) * plane + p % plane);
                            sum += value[c] * (c < 3 ? x : 1 - x);
                            largest = std::fmax(largest, std::fabs(value[c]));
                            norm += value[c] * value[c];
                            close("weights", weights, (m * channels + c) * plane + p % plane, value[c]);
                        }
                        close("contributions", contributions, p, sum);
                        if (!a.colour || std::fabs(sum) < 1e-6) continue;
                        for (int64_t c = 0; c < 3; ++c) {
                            const double first = std::fmax(value[c] / (largest + 1e-12), 0);
                            const double second = std::fmax(value[c + 3] / (largest + 1e-12), 0);
                            close("colour", colour, (m * 4 + c) * plane + p % plane, first / (first + second + 1e-12));
                        }
                        close("alpha", colour, (m * 4 + 3) * plane + p % plane, sum < 0 ? 1e-12 : std::sqrt(norm));
                    }
                }
            }
        }
    }
}

}  // namespace test
