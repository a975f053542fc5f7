// Python's door to the kernels: addresses, sizes and strides in, nothing of torch's C++ interface.
//
// An operand is None or (address, batch stride, row stride, pixel stride); sizes and windows are tuples in the order of
// their structs. The callers (kernels/cpu/__init__.py) check shapes and dtypes; nothing is checked here.
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "table.h"

namespace py = pybind11;
using namespace bcos;

static const char* isa_name = "portable";
static const Table kernels = pick(std::getenv("BCOS_RT_ISA"), &isa_name);

template <typename T>
static T* address(int64_t value) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(value));
}

static Image image(const py::object& given) {
    if (given.is_none()) return {};
    const auto t = py::cast<py::tuple>(given);
    return {address<const void>(t[0].cast<int64_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}

static Planes planes(const py::tuple& t) {
    return {address<const void>(t[0].cast<int64_t>()), t[1].cast<bool>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int64_t>(), t[5].cast<int64_t>()};
}

static Sizes sizes(const py::tuple& t) {
    return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            t[3].cast<int64_t>(), t[4].cast<int64_t>(), t[5].cast<int64_t>()};
}

static Window window(const py::tuple& t) {
    return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
            t[4].cast<int64_t>(), t[5].cast<int64_t>(), t[6].cast<int64_t>(), t[7].cast<int64_t>()};
}

// (multiplier, identity, gate, gate_is_bits, per_image, out, raw)
static Adjoint adjoint(const py::tuple& t) {
    Adjoint a;
    a.multiplier = image(t[0]);
    a.identity = image(t[1]);
    a.gate = image(t[2]);
    a.gate_is_bits = t[3].cast<bool>();
    a.per_image = t[4].cast<int64_t>();
    a.out = address<void>(t[5].cast<int64_t>());
    a.raw = address<void>(t[6].cast<int64_t>());
    return a;
}

// (input, depth, stride_h, stride_w, packed weight)
static Product product(const py::object& given) {
    const auto t = py::cast<py::tuple>(given);
    Product a;
    a.input = image(t[0]);
    a.depth = t[1].cast<int64_t>();
    a.stride_h = t[2].cast<int64_t>();
    a.stride_w = t[3].cast<int64_t>();
    a.weight = address<const float>(t[4].cast<int64_t>());
    return a;
}

template <typename Arguments>
static void run(void (*kernel)(const Arguments&), const Arguments& arguments) {
    py::gil_scoped_release release;
    kernel(arguments);
}

PYBIND11_MODULE(_native, m) {
    m.doc() = "bcos-rt's CPU kernels; call them through bcos_rt.kernels.cpu.";
    m.def("isa", [] { return isa_name; });

    m.def("epilogue", [](py::tuple size, py::tuple win, int storage, int64_t z, int64_t z_pixel, int64_t y,
                         int64_t y_pixel, int64_t squares, int64_t entries, int64_t groups, bool of_rows, int64_t scale, int64_t shift,
                         py::object residual, float b, float eps, int activation, int64_t multiplier, int64_t gate,
                         int64_t out_squares, int threads, py::object before) {
        Epilogue a;
        a.sizes = sizes(size);
        a.window = window(win);
        a.storage = static_cast<Storage>(storage);
        a.z = address<const void>(z);
        a.z_pixel = z_pixel;
        a.y = address<void>(y);
        a.y_pixel = y_pixel;
        a.squares = address<const float>(squares);
        a.entries = entries;
        a.groups = groups;
        a.of_rows = of_rows;
        a.scale = address<const float>(scale);
        a.shift = address<const float>(shift);
        a.residual = image(residual);
        a.b = b;
        a.eps = eps;
        a.activation = activation;
        a.multiplier = address<void>(multiplier);
        a.gate = address<void>(gate);
        a.out_squares = address<float>(out_squares);
        a.threads = threads;
        if (!before.is_none()) return run(kernels.pointwise_forward, PointwiseForward{product(before), a});
        run(kernels.epilogue, a);
    });

    m.def("adjoint_end", [](py::tuple size, int storage, py::object total, py::tuple end, int threads,
                            py::object before) {
        AdjointEpilogue a;
        a.sizes = sizes(size);
        a.storage = static_cast<Storage>(storage);
        a.total = image(total);
        a.adjoint = adjoint(end);
        a.threads = threads;
        if (!before.is_none()) return run(kernels.pointwise_adjoint, PointwiseAdjoint{product(before), a});
        run(kernels.adjoint_end, a);
    });

    m.def("response_grad", [](py::tuple size, py::tuple win, int storage, int64_t y, int64_t y_pixel, py::object grad,
                              int64_t squares, int64_t entries, int64_t groups, bool of_rows, float eps, int64_t grad_z,
                              int64_t norm, int threads) {
        ResponseGrad a;
        a.layer.sizes = sizes(size);
        a.layer.window = window(win);
        a.layer.storage = static_cast<Storage>(storage);
        a.layer.z = address<const void>(y);
        a.layer.z_pixel = y_pixel;
        a.layer.squares = address<const float>(squares);
        a.layer.entries = entries;
        a.layer.groups = groups;
        a.layer.of_rows = of_rows;
        a.layer.eps = eps;
        a.layer.threads = threads;
        a.grad = image(grad);
        a.grad_z = address<void>(grad_z);
        a.norm = address<float>(norm);
        run(kernels.response_grad, a);
    });

    m.def("scale_act", [](py::tuple size, int storage, py::object x, py::object grad, py::object identity, int64_t scale,
                          int64_t shift, int activation, int64_t groups, int64_t per_image, int64_t out,
                          int64_t out_pixel, int64_t squares, int threads) {
        ScaleAct a;
        a.sizes = sizes(size);
        a.storage = static_cast<Storage>(storage);
        a.x = image(x);
        a.grad = image(grad);
        a.identity = image(identity);
        a.scale = address<const float>(scale);
        a.shift = address<const float>(shift);
        a.activation = activation;
        a.groups = groups;
        a.per_image = per_image;
        a.out = address<void>(out);
        a.out_pixel = out_pixel;
        a.squares = address<float>(squares);
        a.threads = threads;
        run(kernels.scale_act, a);
    });

    m.def("square_sum", [](py::tuple size, int storage, py::object x, int64_t groups, int64_t squares, int threads) {
        SquareSum a;
        a.sizes = sizes(size);
        a.storage = static_cast<Storage>(storage);
        a.x = image(x);
        a.groups = groups;
        a.squares = address<float>(squares);
        a.threads = threads;
        run(kernels.square_sum, a);
    });

    m.def("encode", [](py::tuple size, int storage, py::tuple image, int64_t mean, int64_t inverse_std, bool six,
                       int64_t out, int64_t squares, int threads) {
        Encode a;
        a.sizes = sizes(size);
        a.storage = static_cast<Storage>(storage);
        a.image = planes(image);
        a.mean = address<const float>(mean);
        a.inverse_std = address<const float>(inverse_std);
        a.six = six;
        a.out = address<void>(out);
        a.squares = address<float>(squares);
        a.threads = threads;
        run(kernels.encode, a);
    });

    m.def("contributions", [](py::tuple size, int storage, py::object grad, int64_t block, int64_t inner,
                              int64_t per_image, py::tuple of, int64_t inverse_std, float scale, int64_t weights,
                              int64_t map, int64_t colour, int threads) {
        Contributions a;
        a.sizes = sizes(size);
        a.storage = static_cast<Storage>(storage);
        a.grad = image(grad);
        a.block = block;
        a.inner = inner;
        a.per_image = per_image;
        a.image = planes(of);
        a.inverse_std = address<const float>(inverse_std);
        a.scale = scale;
        a.weights = address<float>(weights);
        a.contributions = address<float>(map);
        a.colour = address<float>(colour);
        a.threads = threads;
        run(kernels.contributions, a);
    });

    m.def("depthwise", [](py::tuple size, py::tuple win, int storage, py::object x, py::object residual, int64_t weight,
                          int64_t bias, int64_t scale, int64_t shift, float b, float eps, int activation, int64_t y,
                          int64_t multiplier, int64_t gate, int64_t squares, int threads) {
        Depthwise a;
        a.sizes = sizes(size);
        a.window = window(win);
        a.storage = static_cast<Storage>(storage);
        a.x = image(x);
        a.residual = image(residual);
        a.weight = address<const float>(weight);
        a.bias = address<const float>(bias);
        a.scale = address<const float>(scale);
        a.shift = address<const float>(shift);
        a.b = b;
        a.eps = eps;
        a.activation = activation;
        a.y = address<void>(y);
        a.multiplier = address<void>(multiplier);
        a.gate = address<void>(gate);
        a.squares = address<float>(squares);
        a.threads = threads;
        run(kernels.depthwise, a);
    });

    m.def("depthwise_adjoint", [](py::tuple size, py::tuple win, int storage, py::object grad, int64_t weight,
                                  py::tuple end, int threads) {
        DepthwiseAdjoint a;
        a.sizes = sizes(size);
        a.window = window(win);
        a.storage = static_cast<Storage>(storage);
        a.grad = image(grad);
        a.weight = address<const float>(weight);
        a.adjoint = adjoint(end);
        a.threads = threads;
        run(kernels.depthwise_adjoint, a);
    });

    m.def("layer_norm", [](int64_t rows, int64_t channels, int storage, int64_t x, int64_t weight, int64_t bias, float eps,
                           int64_t y, int64_t rstd, int64_t squares, int threads) {
        LayerNorm a;
        a.rows = rows;
        a.channels = channels;
        a.storage = static_cast<Storage>(storage);
        a.x = address<const void>(x);
        a.weight = address<const float>(weight);
        a.bias = address<const float>(bias);
        a.eps = eps;
        a.y = address<void>(y);
        a.rstd = address<float>(rstd);
        a.squares = address<float>(squares);
        a.threads = threads;
        run(kernels.layer_norm, a);
    });

    m.def("layer_norm_adjoint", [](int64_t rows, int64_t channels, int64_t length, int64_t per_image, int storage,
                                   int64_t grad, int64_t identity, int64_t rstd, int64_t weight, int64_t out,
                                   int threads) {
        LayerNormAdjoint a;
        a.rows = rows;
        a.channels = channels;
        a.length = length;
        a.per_image = per_image;
        a.storage = static_cast<Storage>(storage);
        a.grad = address<const void>(grad);
        a.identity = address<const void>(identity);
        a.rstd = address<const float>(rstd);
        a.weight = address<const float>(weight);
        a.out = address<void>(out);
        a.threads = threads;
        run(kernels.layer_norm_adjoint, a);
    });

    m.def("channel_sums", [](int64_t rows, int64_t channels, int64_t x, int64_t y, int64_t mean, bool squared,
                             int64_t out, int threads) {
        ChannelSums a;
        a.rows = rows;
        a.channels = channels;
        a.x = address<const float>(x);
        a.y = address<const float>(y);
        a.mean = address<const float>(mean);
        a.squared = squared;
        a.out = address<double>(out);
        a.threads = threads;
        run(kernels.channel_sums, a);
    });

    m.def("channel_combine", [](int64_t rows, int64_t channels, int64_t x, int64_t y, int64_t mean, int64_t x_scale,
                                int64_t y_scale, int64_t out, int threads) {
        ChannelCombine a;
        a.rows = rows;
        a.channels = channels;
        a.x = address<const float>(x);
        a.y = address<const float>(y);
        a.mean = address<const float>(mean);
        a.x_scale = address<const float>(x_scale);
        a.y_scale = address<const float>(y_scale);
        a.out = address<float>(out);
        a.threads = threads;
        run(kernels.channel_combine, a);
    });

    m.attr("POINTWISE_PAD") = (int64_t)PointwisePack::PAD;

    m.def("pointwise_pack", [](int64_t outputs, int64_t depth, int64_t weight, int64_t packed) {
        PointwisePack a;
        a.weight = address<const float>(weight);
        a.packed = address<float>(packed);
        a.outputs = outputs;
        a.depth = depth;
        run(kernels.pointwise_pack, a);
    });

    m.def("winograd_scratch", &winograd_scratch);

    m.def("winograd_pack", [](int64_t outputs, int64_t channels, int64_t weight, int64_t packed) {
        WinogradPack a;
        a.weight = address<const float>(weight);
        a.packed = address<float>(packed);
        a.outputs = outputs;
        a.channels = channels;
        run(kernels.winograd_pack, a);
    });

    m.def("winograd", [](py::tuple size, py::object x, int64_t weight, int64_t outputs, int64_t padding_h,
                         int64_t padding_w, int64_t output, int64_t scratch, int threads) {
        Winograd a;
        a.sizes = sizes(size);
        a.input = image(x);
        a.weight = address<const float>(weight);
        a.outputs = outputs;
        a.padding_h = padding_h;
        a.padding_w = padding_w;
        a.output = address<float>(output);
        a.scratch = address<float>(scratch);
        a.threads = threads;
        run(kernels.winograd, a);
    });
}
