// Layer normalisation and its adjoint; sums over the pixels of each channel.
#include "harness.h"

namespace test {

namespace {

struct Case {
    int64_t images, length, channels, per_image;
    int threads;
    bool affine, every;
};

void forward(const bcos::Table& kernels, const Case& c, bcos::Storage storage) {
    const int64_t rows = c.images * c.length, channels = c.channels;
    Values x(storage, rows * channels), y(storage, rows * channels);
    x.fill();
    // A mean that is large beside the deviation.
    for (int64_t i = 0; i < x.count(); ++i) x.set(i, x.get(i) + 20);
    Values weight = random_floats(channels), bias = random_floats(channels), rstd = floats(rows), squares = floats(rows);
    bcos::LayerNorm a;
    a.rows = rows;
    a.channels = channels;
    a.storage = storage;
    a.x = x.data();
    a.weight = c.affine ? float_data(weight) : nullptr;
    a.bias = c.affine ? float_data(bias) : nullptr;
    a.eps = 1e-6f;
    a.y = y.data();
    a.rstd = float_data(rstd);
    a.squares = c.every ? float_data(squares) : nullptr;
    a.threads = c.threads;
    kernels.layer_norm(a);
    for (int64_t r = 0; r < rows; ++r) {
        double mean = 0, variance = 0, sum = 0;
        for (int64_t i = 0; i < channels; ++i) mean += x.get(r * channels + i) / (double)channels;
        for (int64_t i = 0; i < channels; ++i) {
            variance += std::pow(x.get(r * channels + i) - mean, 2) / (double)channels;
        }
        const double root = 1 / std::sqrt(variance + 1e-6);
        // A row of one channel has no deviation: 1 / sqrt(eps), of what rounding leaves.
        if (channels > 1) close("rstd", rstd, r, root, root);
        for (int64_t i = 0; i < channels && channels > 1; ++i) {
            double v = (x.get(r * channels + i) - mean) * root;
            if (c.affine) v = v * weight.get(i) + bias.get(i);
            close("y", y, r * channels + i, v, 4);
            sum += y.get(r * channels + i) * y.get(r * channels + i);
        }
        if (c.every && channels > 1) close("squares", squares, r, sum, sum + 1);
    }
}

void adjoint(const bcos::Table& kernels, const Case& c, bcos::Storage storage) {
    const int64_t rows = c.images * c.per_image * c.length, channels = c.channels;
    Values grad(storage, rows * channels), identity(storage, rows * channels), out(storage, rows * channels);
    grad.fill();
    identity.fill();
    Values weight = random_floats(channels), rstd = random_floats(c.images * c.length);
    bcos::LayerNormAdjoint a;
    a.rows = rows;
    a.channels = channels;
    a.length = c.length;
    a.per_image = c.per_image;
    a.storage = storage;
    a.grad = grad.data();
    a.identity = c.every ? identity.data() : nullptr;
    a.rstd = float_data(rstd);
    a.weight = c.affine ? float_data(weight) : nullptr;
    a.out = out.data();
    a.threads = c.threads;
    kernels.layer_norm_adjoint(a);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t source = r / c.length / c.per_image * c.length + r % c.length;
        auto weighted = [&](int64_t i) { return grad.get(r * channels + i) * (c.affine ? weight.get(i) : 1); };
        double mean = 0;
        for (int64_t i = 0; i < channels; ++i) mean += weighted(i) / (double)channels;
        for (int64_t i = 0; i < channels; ++i) {
            const double v = rstd.get(source) * (weighted(i) - mean);
            close("adjoint", out, r * channels + i, v + (c.every ? identity.get(r * channels + i) : 0), 1);
        }
    }
}

struct ChannelCase {
    int64_t rows, channels;
    int threads;
};

void channels(const bcos::Table& kernels, const ChannelCase& c) {
    const auto storage = bcos::Storage::float32;
    const int64_t values = c.rows * c.channels;
    Values x(storage, values), y(storage, values), out(storage, values);
    x.fill();
    y.fill();
    // A mean that is large beside the deviation.
    for (int64_t i = 0; i < values; ++i) x.set(i, x.get(i) + 20);
    Values mean = random_floats(c.channels), scale = random_floats(c.channels), slope = random_floats(c.channels);
    for (int64_t i = 0; i < c.channels; ++i) mean.set(i, mean.get(i) + 20);
    std::vector<double> sums(c.channels, -1);
    for (int of = 0; of < 3; ++of) {
        bcos::ChannelSums a;
        a.rows = c.rows;
        a.channels = c.channels;
        a.x = float_data(x);
        a.y = of == 1 ? float_data(y) : nullptr;
        a.mean = of == 1 ? nullptr : float_data(mean);
        a.squared = of == 2;
        a.out = sums.data();
        a.threads = c.threads;
        kernels.channel_sums(a);
        for (int64_t i = 0; i < c.channels; ++i) {
            double expected = 0, size = 0;
            for (int64_t r = 0; r < c.rows; ++r) {
                const double v = x.get(r * c.channels + i), d = v - mean.get(i);
                const double term = of == 0 ? d : of == 1 ? v * y.get(r * c.channels + i) : d * d;
                expected += term;
                size += std::fabs(term);
            }
            Values found = floats(1);
            found.set(0, sums[i]);
            close("sum", found, 0, expected, size);
        }
    }
    bcos::ChannelCombine a;
    a.rows = c.rows;
    a.channels = c.channels;
    a.x = float_data(x);
    a.y = float_data(y);
    a.mean = float_data(mean);
    a.x_scale = float_data(slope);
    a.y_scale = float_data(scale);
    a.out = float_data(out);
    a.threads = c.threads;
    kernels.channel_combine(a);
    for (int64_t i = 0; i < values; ++i) {
        const int64_t k = i % c.channels;
        close("combined", out, i, (x.get(i) - mean.get(k)) * slope.get(k) + y.get(i) * scale.get(k), 20);
    }
}

}  // namespace

void test_norms(const bcos::Table& kernels) {
    const std::vector<Case> cases = {
        {1, 1, 1, 1, 1, true, true},   {2, 3, 5, 1, 1, true, true},    {1, 7, 16, 3, 2, false, true},
        {2, 5, 33, 2, 3, true, false}, {0, 4, 8, 1, 2, true, true},    {3, 197, 192, 2, 3, true, true},
        {2, 9, 77, 5, 1, false, false},
    };
    for (const Case& c : cases) {
        for (auto storage : {bcos::Storage::float32, bcos::Storage::bfloat16}) {
            where() = "layer norm, " + std::to_string(c.channels) + " channels";
            forward(kernels, c, storage);
            adjoint(kernels, c, storage);
        }
    }
    // 9000 channels are more than a block of rows holds; 1000 rows of 16 are two blocks.
    for (const ChannelCase& c : std::vector<ChannelCase>{
             {1, 1, 1}, {7, 5, 1}, {1000, 16, 2}, {600, 33, 3}, {0, 8, 2}, {9, 9000, 3}, {5, 0, 1}, {70000, 3, 3}}) {
        where() = "sums of channels, " + std::to_string(c.channels);
        channels(kernels, c);
    }
}

}  // namespace test
