// 3 x 3 convolutions by Winograd's algorithm.
#include "harness.h"

namespace test {

void test_winograd(const bcos::Table& kernels) {
    struct Case {
        int64_t batch, channels, outputs, height, width, padding_h, padding_w;
    };
    const Case cases[] = {
        {1, 16, 16, 1, 1, 1, 1},  {2, 16, 32, 5, 7, 1, 1},   {1, 48, 64, 8, 4, 0, 0},  {1, 32, 128, 9, 14, 2, 2},
        {3, 16, 80, 6, 3, 1, 0},  {1, 64, 32, 29, 31, 1, 1}, {2, 16, 192, 12, 12, 0, 2},
    };
    for (const Case& c : cases) {
        const int64_t oh = c.height + 2 * c.padding_h - 2, ow = c.width + 2 * c.padding_w - 2;
        Picture x(bcos::Storage::float32, c.batch, c.height, c.width, c.channels, 1, 3);
        Values weight = random_floats(c.outputs * c.channels * 9);
        Values packed = floats(36 * c.outputs * c.channels), output = floats(c.batch * oh * ow * c.outputs);
        Values scratch = floats(bcos::winograd_scratch(
            c.batch * ((oh + 3) / 4) * ((ow + 3) / 4), c.channels, c.outputs));
        bcos::WinogradPack pack;
        pack.weight = float_data(weight);
        pack.packed = float_data(packed);
        pack.outputs = c.outputs;
        pack.channels = c.channels;
        kernels.winograd_pack(pack);
        bcos::Winograd a;
        a.input = x.image();
        a.weight = float_data(packed);
        a.output = float_data(output);
        a.scratch = float_data(scratch);
        a.sizes = {c.batch, c.channels, c.height, c.width, oh, ow};
        a.outputs = c.outputs;
        a.padding_h = c.padding_h;
        a.padding_w = c.padding_w;
        a.threads = 2;
        kernels.winograd(a);
        const double scale = std::sqrt((double)(9 * c.channels));
        for (int64_t p = 0; p < c.batch * oh * ow; ++p) {
            const int64_t n = p / (oh * ow), h = p / ow % oh, w = p % ow;
            for (int64_t o = 0; o < c.outputs; ++o) {
                double sum = 0;
                for (int64_t i = 0; i < c.channels; ++i) {
                    for (int64_t t = 0; t < 9; ++t) {
                        sum += x.padded(n, h - c.padding_h + t / 3, w - c.padding_w + t % 3, i) *
                               weight.get((o * c.channels + i) * 9 + t);
                    }
                }
                close("output", output, p * c.outputs + o, sum, scale);
            }
        }
        x.untouched();
    }
}

}  // namespace test
