// result += bias + means of groups of channels of pixel_unshuffle(x): the shortcut of a downsampling block,
// channels last.
//
// The four fine pixels of a coarse one are widened once into the first-level cache, averaged there and added.
// Memory bound: each element of x in, and an element of the result in and out.
#include "blip3o/ops/add_pixel_unshuffle.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

// means[d] over the channels d group .. of the unshuffled pixel, whose channel 4 c + corner is channel c of
// that corner; inlined, so that a constant `group` leaves no loop inside.
BLIP3O_INLINE void average(float* means, const float* corners, int64_t pitch, int64_t wanted, int64_t group) {
    const float share = 1.0f / static_cast<float>(group);
    for (int64_t d = 0; d < wanted; ++d) {
        float sum = 0.0f;
        for (int64_t u = d * group; u < (d + 1) * group; ++u) sum += corners[u % 4 * pitch + u / 4];
        means[d] = sum * share;
    }
}

template <class T>
void add_rows(const PixelShuffleArguments& a, int64_t begin, int64_t end) {
    const int64_t wanted = a.coarse_channels, group = 4 * a.fine_channels / wanted;
    const int64_t pitch = round_up(a.fine_channels);
    float* corners = thread_scratch(4 * pitch + 2 * round_up(wanted));
    float* means = corners + 4 * pitch;
    float* bias = means + round_up(wanted);
    for (int64_t d = 0; d < wanted; ++d) bias[d] = a.bias ? load(static_cast<const T*>(a.bias) + d, 1)[0] : 0;
    for (int64_t pixel = begin * a.width; pixel < end * a.width; ++pixel) {
        const int64_t row = pixel / a.width, column = pixel % a.width;
        for (int64_t k = 0; k < 4; ++k) {
            const int64_t fine = (2 * row + k / 2) * 2 * a.width + 2 * column + k % 2;
            widen_row(corners + k * pitch, static_cast<const T*>(a.x) + fine * a.fine_channels,
                      a.fine_channels);
        }
        group == 4   ? average(means, corners, pitch, wanted, 4)
        : group == 2 ? average(means, corners, pitch, wanted, 2)
                     : average(means, corners, pitch, wanted, group);
        T* result = static_cast<T*>(a.result) + pixel * wanted;
        for_each_vector(wanted, [&](int64_t i, int64_t count) {
            store(result + i, load(result + i, count) + load(means + i) + load(bias + i), count);
        });
    }
}

}  // namespace

void add_pixel_unshuffle(const PixelShuffleArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? add_rows<bf16>(arguments, begin, end)
                                   : add_rows<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
