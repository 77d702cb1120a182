// How an op runs on the CPU: its kernels one after the other, the work of each divided among threads.
#pragma once

#include <type_traits>
#include <vector>

#include "blip3o/ops/linear_w8a16.h"
#include "blip3o/ops/norm_row_linear.h"
#include "blip3o/ops/row_linear_add.h"
#include "blip3o/ops/sample_tokens.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu {

void sample_rows(const SampleTokensArguments& arguments, int64_t begin,
                 int64_t end);  // sample_tokens.cpp

// Elements that one thread should have at least; less is done sooner than another thread wakes up.
constexpr int64_t kGrainElements = 16 * 1024;

template <class Arguments>
void run(Kernel<Arguments> kernel, const Arguments& arguments, Work work) {
    const int64_t grain = work.elements >= kGrainElements ? 1 : kGrainElements / (work.elements + 1) + 1;
    parallel_for(work.units, grain, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

template <class Op, class = void>
struct ChecksValues : std::false_type {};
template <class Op>
struct ChecksValues<Op, std::void_t<decltype(&Op::check_values)>> : std::true_type {};

template <class Op>
void launch(Kernel<ArgumentsOf<Op>> kernel, const ArgumentsOf<Op>& arguments) {
    if constexpr (ChecksValues<Op>::value) Op::check_values(arguments);
    run(kernel, arguments, Op::work(arguments));
}

template <>
inline void launch<Linear>(Kernel<LinearArguments> kernel, const LinearArguments& arguments) {
    LinearArguments a = arguments;
    a.pair_products = has_bf16_products();
    run(kernel, a, Linear::work(a));
}

template <>
inline void launch<ReluLinearAttention>(Kernel<ReluLinearAttentionArguments> kernel,
                                        const ReluLinearAttentionArguments& arguments) {
    ReluLinearAttentionArguments a = arguments;
    const int64_t tokens = a.q_weight || a.k_weight ? a.qkv.count : 0;
    std::vector<float> inverse_rms(2 * tokens);
    a.inverse_rms = inverse_rms.data();
    run(kernels().relu_linear_attention_norms, a, {tokens, a.qkv.width});
    run(kernel, a, ReluLinearAttention::work(a));
}

template <>
inline void launch<CrossAttention>(Kernel<CrossAttentionArguments> kernel,
                                   const CrossAttentionArguments& arguments) {
    CrossAttentionArguments a = arguments;
    const int64_t queries = a.query_weight ? a.query.count : 0;
    std::vector<float> inverse_rms(queries);
    a.inverse_rms = inverse_rms.data();
    a.pair_products = has_bf16_products();
    run(kernels().cross_attention_norms, a, {queries, a.query.width});
    run(kernel, a, CrossAttention::work(a));
}

inline void launch_row_product(const RowProductArguments& a) {
    a.scale ? launch<RowLinearW8>(kernels().row_linear_w8, a) : launch<RowLinear>(kernels().row_linear, a);
}

// A matrix between two kernels of an op, in memory that the calling thread keeps.
template <int kWhich>
Rows intermediate(int64_t rows, int64_t columns) {
    thread_local std::vector<float> memory;
    const size_t floats = static_cast<size_t>(rows * columns);
    if (memory.size() < floats) memory.resize(floats);
    return {memory.data(), rows, columns, columns};
}

inline void launch_norm_row_linear(const RowProductArguments& a) {
    const Rows normed = intermediate<0>(a.x.count, a.x.width);
    launch<RmsNorm>(kernels().rms_norm, {a.x, {}, normed, a.norm_weight, nullptr, a.dtype, a.eps});
    RowProductArguments product = a;
    product.x = normed;
    if (a.gated) product.out = intermediate<1>(a.x.count, a.weight.count);
    launch_row_product(product);
    if (a.gated) launch<SiluMul>(kernels().silu_mul, {product.out, a.out, a.dtype});
}

inline void launch_row_linear_add(const RowProductArguments& a) {
    RowProductArguments product = a;
    product.out = intermediate<0>(a.out.count, a.out.width);
    launch_row_product(product);
    thread_local std::vector<float> ones;
    if (ones.size() < static_cast<size_t>(a.out.width)) ones.resize(a.out.width, 1.0f);
    launch<GatedAdd>(kernels().gated_add, {a.out, product.out, ones.data(), a.dtype, DType::f32});
}

inline void launch_sample_tokens(const SampleTokensArguments& a) {
    run(sample_rows, a, {a.logits.count, a.logits.width});
}

// visitor.add<Op>(launch) for every op, where launch runs checked arguments.
template <class Visitor>
void for_each_op(Visitor& visitor) {
#define OP(function, Op) \
    visitor.template add<Op>([](const ArgumentsOf<Op>& a) { launch<Op>(kernels().function, a); });
#define KERNEL(function, Arguments)
#include "cpu/kernels.inc"
    visitor.template add<LinearW8A16>([](const LinearArguments& a) { launch<Linear>(kernels().linear, a); });
    visitor.template add<NormRowLinear>(launch_norm_row_linear);
    visitor.template add<RowLinearAdd>(launch_row_linear_add);
    visitor.template add<SampleTokens>(launch_sample_tokens);
}

}  // namespace blip3o::cpu
