// The kernels of one instruction set, and how the module picks a set when it is loaded.
#pragma once

#include "depthwise.h"
#include "epilogue.h"
#include "norms.h"
#include "pointwise.h"
#include "winograd.h"

namespace bcos {

struct Table {
    void (*epilogue)(const Epilogue&);
    void (*adjoint_end)(const AdjointEpilogue&);
    void (*response_grad)(const ResponseGrad&);
    void (*scale_act)(const ScaleAct&);
    void (*square_sum)(const SquareSum&);
    void (*encode)(const Encode&);
    void (*contributions)(const Contributions&);
    void (*depthwise)(const Depthwise&);
    void (*depthwise_adjoint)(const DepthwiseAdjoint&);
    void (*pointwise_pack)(const PointwisePack&);
    void (*pointwise_forward)(const PointwiseForward&);
    void (*pointwise_adjoint)(const PointwiseAdjoint&);
    void (*winograd_pack)(const WinogradPack&);
    void (*winograd)(const Winograd&);
    void (*layer_norm)(const LayerNorm&);
    void (*layer_norm_adjoint)(const LayerNormAdjoint&);
    void (*channel_sums)(const ChannelSums&);
    void (*channel_combine)(const ChannelCombine&);
};

#define BCOS_DECLARE(isa)                                   \
    namespace isa {                                         \
    void epilogue(const Epilogue&);                         \
    void adjoint_end(const AdjointEpilogue&);               \
    void response_grad(const ResponseGrad&);                \
    void scale_act(const ScaleAct&);                        \
    void square_sum(const SquareSum&);                      \
    void encode(const Encode&);                             \
    void contributions(const Contributions&);               \
    void depthwise(const Depthwise&);                       \
    void depthwise_adjoint(const DepthwiseAdjoint&);        \
    void pointwise_pack(const PointwisePack&);              \
    void pointwise_forward(const PointwiseForward&);        \
    void pointwise_adjoint(const PointwiseAdjoint&);        \
    void winograd_pack(const WinogradPack&);                \
    void winograd(const Winograd&);                         \
    void layer_norm(const LayerNorm&);                      \
    void layer_norm_adjoint(const LayerNormAdjoint&);       \
    void channel_sums(const ChannelSums&);                  \
    void channel_combine(const ChannelCombine&);            \
    static inline Table table() {                           \
        return {epilogue,          adjoint_end,       response_grad,  scale_act,     \
                square_sum,        encode,            contributions,  depthwise,     \
                depthwise_adjoint, pointwise_pack,    pointwise_forward,             \
                pointwise_adjoint, winograd_pack,     winograd,       layer_norm,    \
                layer_norm_adjoint, channel_sums,     channel_combine};      \
    }                                                       \
    }

BCOS_DECLARE(portable)
#ifdef BCOS_X86
BCOS_DECLARE(avx2)
BCOS_DECLARE(avx512)
#endif

// The best set this processor has, or the one named ("avx512", "avx2", "portable") where it is not a better one.
// `name` becomes the set's.
static inline Table pick(const char* wanted, const char** name) {
    const bool any = !wanted || !*wanted;
    auto is = [wanted](const char* candidate) { return wanted && !__builtin_strcmp(wanted, candidate); };
    (void)is;
#ifdef BCOS_X86
    if ((any || is("avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        *name = "avx512";
        return avx512::table();
    }
    if ((any || is("avx512") || is("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        *name = "avx2";
        return avx2::table();
    }
#endif
    (void)any;
    *name = "portable";
    return portable::table();
}

}  // namespace bcos
