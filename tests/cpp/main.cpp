// Every kernel of every instruction set that this processor has, on odd shapes, against the definitions in double.
// Built with the address and undefined-behaviour sanitizers (`make cpp-sanitize`); exit code 1 if anything differs.
#include "harness.h"

namespace test {

int& failures() {
    static int count = 0;
    return count;
}

std::string& where() {
    static std::string text;
    return text;
}

void fail(const std::string& what) {
    // Enough to see the pattern; the count says how many there were.
    if (++failures() <= 40) std::fprintf(stderr, "FAILED %s: %s\n", where().c_str(), what.c_str());
}

double random_value() {
    static uint64_t state = 20240229;
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (double)(int64_t)(state >> 11) / (double)(1ll << 52) - 1;
}

void close(const char* what, const Values& actual, int64_t i, double expected, double scale) {
    const double got = actual.get(i);
    if (std::isnan(expected) && std::isnan(got)) return;
    if (got == expected) return;
    const bool half = actual.storage() == bcos::Storage::bfloat16;
    const double tolerance = (half ? 1.0 / 128 : 2e-5) * std::fmax(std::fabs(expected), scale);
    if (std::fabs(got - expected) <= tolerance) return;
    char text[160];
    std::snprintf(text, sizeof text, "%s[%lld]: got %.9g, expected %.9g", what, (long long)i, got, expected);
    fail(text);
}

double gate_of(double u, int activation) {
    switch (activation) {
        case 1:
            return u > 0 ? 1 : 0;
        case 2:
            return u > 0 ? (u < 6 ? 1 : 6 / u) : 0;
        case 3:
            return 0.5 * (1 + std::erf(u * std::sqrt(0.5)));
        case 4:
            return 1 / (1 + std::exp(-u));
        case 5:
            return std::fmin(std::fmax(u + 3, 0), 6) / 6;
        default:
            return 1;
    }
}

double activated(double u, int activation) {
    if (activation == 1) return u < 0 ? 0 : u;
    return u * gate_of(u, activation);
}

double root_of_norm(double sum, double eps, bool of_rows) {
    return of_rows ? std::sqrt(sum) + eps : std::sqrt(sum + eps);
}

double response_scale(double z, double n, double b) {
    if (b == 1) return 1;
    const double ratio = std::fabs(z) / n;
    return b == 2 ? ratio : std::pow(ratio + 1e-6, b - 1);
}

const std::vector<bcos::Storage>& storages() {
    static const std::vector<bcos::Storage> both = {bcos::Storage::float32, bcos::Storage::bfloat16};
    return both;
}

}  // namespace test

int main() {
    int sets = 0;
    for (const char* wanted : {"portable", "avx2", "avx512"}) {
        const char* name = nullptr;
        const bcos::Table kernels = bcos::pick(wanted, &name);
        if (std::string(name) != wanted) continue;  // this processor has less
        const int before = test::failures();
        const std::pair<const char*, void (*)(const bcos::Table&)> tests[] = {
            {"epilogue", test::test_epilogue},
            {"adjoint_end", test::test_adjoint_end},
            {"response_grad", test::test_response_grad},
            {"scale_act", test::test_scale_act},
            {"square_sum", test::test_square_sum},
            {"encode", test::test_encode},
            {"contributions", test::test_contributions},
            {"depthwise", test::test_depthwise},
            {"depthwise_adjoint", test::test_depthwise_adjoint},
            {"pointwise_forward", test::test_pointwise_forward},
            {"pointwise_adjoint", test::test_pointwise_adjoint},
            {"winograd", test::test_winograd},
            {"norms", test::test_norms},
        };
        for (const auto& [kernel, run] : tests) {
            test::where() = std::string(name) + " " + kernel;
            run(kernels);
        }
        std::printf("%s: %s\n", name, test::failures() == before ? "fine" : "FAILED");
        ++sets;
    }
    std::printf("%d instruction sets, %d failures\n", sets, test::failures());
    return sets > 0 && test::failures() == 0 ? 0 : 1;
}
