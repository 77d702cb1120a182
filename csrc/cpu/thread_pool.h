// The persistent threads that CPU ops share: those of torch where its OpenMP runtime is GNU's, else their own.
//
// Work is split by position alone into contiguous ranges of outputs, and an output is computed by one thread
// from start to end, so results never depend on how many threads there are.
#pragma once

#include <cstdint>

namespace blip3o::cpu {

// Threads used by parallel_for, the caller's included. At first: as many as the hardware runs at once.
int num_threads();

// At least 1. Waits for running work; the old threads end.
void set_num_threads(int threads);

// Part `part` of `parts` of so many units.
struct Range {
    int64_t begin, end;
};

inline Range range_of_part(int64_t count, int64_t grain, int part, int parts) {
    const int64_t grains = (count + grain - 1) / grain, end = grains * (part + 1) / parts * grain;
    return {grains * part / parts * grain, end < count ? end : count};
}

namespace detail {
using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_ranges(int64_t count, int64_t grain, RangeFunction run, const void* context);
}  // namespace detail

// body(begin, end) over ranges that cover 0 .. count, at the same time where each can have `grain` units or
// more. Range borders are multiples of `grain`. A call from a second thread while the pool works runs on the
// caller alone. What `body` throws is thrown here once no range is being worked on.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    detail::parallel_ranges(
        count, grain,
        [](const void* context, int64_t begin, int64_t end) {
            (*static_cast<const Body*>(context))(begin, end);
        },
        &body);
}

// Memory of the calling thread that lives until the thread ends; grows on demand and is then reused, so that
// a decoding loop stops allocating after its first step. 64-byte aligned. A second call invalidates the
// first.
float* thread_scratch(int64_t floats);

}  // namespace blip3o::cpu
