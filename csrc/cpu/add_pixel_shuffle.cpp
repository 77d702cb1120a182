// result += bias + pixel_shuffle(x, channels repeated): the shortcut of an upsampling block, channels last.
//
// A coarse pixel is widened once, its channels are dealt out to the four corners in the first-level cache, and
// each corner is added to its pixel of the result. Memory bound: an element of the result in and out, and its
// share of x.
#include "blip3o/ops/add_pixel_shuffle.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

// to[c] = x[(4 c + corner) / repeats]; inlined, so that a constant `repeats` leaves loads at one distance.
BLIP3O_INLINE void deal_out(float* to, const float* x, int64_t wanted, int64_t corner, int64_t repeats) {
    for (int64_t c = 0; c < wanted; ++c) to[c] = x[(4 * c + corner) / repeats];
}

template <class T>
void add_rows(const PixelShuffleArguments& a, int64_t begin, int64_t end) {
    const int64_t wanted = a.fine_channels, repeats = 4 * wanted / a.coarse_channels;
    float* x = thread_scratch(round_up(a.coarse_channels) + 2 * round_up(wanted));
    float* corner = x + round_up(a.coarse_channels);
    float* bias = corner + round_up(wanted);
    for (int64_t c = 0; c < wanted; ++c) bias[c] = a.bias ? load(static_cast<const T*>(a.bias) + c, 1)[0] : 0;
    for (int64_t pixel = begin * a.width; pixel < end * a.width; ++pixel) {
        widen_row(x, static_cast<const T*>(a.x) + pixel * a.coarse_channels, a.coarse_channels);
        const int64_t row = pixel / a.width, column = pixel % a.width;
        for (int64_t k = 0; k < 4; ++k) {
            repeats == 4   ? deal_out(corner, x, wanted, k, 4)
            : repeats == 2 ? deal_out(corner, x, wanted, k, 2)
                           : deal_out(corner, x, wanted, k, repeats);
            const int64_t fine = (2 * row + k / 2) * 2 * a.width + 2 * column + k % 2;
            T* result = static_cast<T*>(a.result) + fine * wanted;
            for_each_vector(wanted, [&](int64_t i, int64_t count) {
                store(result + i, load(result + i, count) + load(corner + i) + load(bias + i), count);
            });
        }
    }
}

}  // namespace

void add_pixel_shuffle(const PixelShuffleArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? add_rows<bf16>(arguments, begin, end)
                                   : add_rows<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
