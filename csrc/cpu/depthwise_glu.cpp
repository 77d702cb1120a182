// Bias, SiLU, depthwise 3x3 convolution, bias and gate over an image held channels last.
//
// Blocking  channels in blocks whose three activated rows, of value and gate, stay in the second-level cache:
//           each element of the input is read and activated once, into a ring of three rows of vectors, and
//           each output row is two passes along the ring, of value and of gate, with the nine taps of a vector
//           in registers. The next row of the input is fetched meanwhile.
// Bytes     the input once and the result once: 3 x 2 C B H W in bfloat16.
// FLOPs     36 for the taps and three exponentials and divisions per element of the result: bound by the
//           multiply-add units at one core, by memory at many.
#include "blip3o/ops/depthwise_glu.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

constexpr int64_t kRingFloats = 64 * 1024;  // 256 KiB
constexpr int64_t kWidestBlock = 256;       // channels
constexpr int64_t kTaps = 9;

static_assert(kDepthwiseGluChannels % kLanes == 0);

// A vector of channels through the block: value's and gate's come one after the other.
struct Block {
    int64_t batch, first, channels, vectors;  // vectors: of each half
    int64_t pitch;                            // floats of a vector's three rows
    float* ring;                              // [2 * vectors][3 rows][width] vectors
    float* zeros;                             // [width] vectors, the rows above and below the image
    float* parameters;                        // [2 * vectors] [input bias, nine taps, bias] vectors
    float* sums;                              // [width] vectors, the convolved values of a row
};

constexpr int64_t kParameters = (kTaps + 2) * kLanes;  // floats of a vector's parameters

int64_t block_channels(int64_t width) {
    const int64_t fitting = kRingFloats / (6 * width) / kDepthwiseGluChannels * kDepthwiseGluChannels;
    return fitting < kDepthwiseGluChannels ? kDepthwiseGluChannels
           : fitting > kWidestBlock        ? kWidestBlock
                                           : fitting;
}

Block make_block(const DepthwiseGluArguments& a) {
    Block block;
    block.pitch = (3 * a.width | 1) * kLanes;  // odd, since rows at a power of two would share cache sets
    const int64_t vectors = 2 * block_channels(a.width) / kLanes;
    block.ring = thread_scratch(vectors * (block.pitch + kParameters) + 2 * a.width * kLanes);
    block.parameters = block.ring + vectors * block.pitch;
    block.zeros = block.parameters + vectors * kParameters;
    block.sums = block.zeros + a.width * kLanes;
    for (int64_t x = 0; x < a.width; ++x) store(block.zeros + x * kLanes, Vec{});
    return block;
}

// Channels of vector v of the block within a pixel of the input, and how many of them there are.
int64_t channel_of(const DepthwiseGluArguments& a, const Block& block, int64_t v) {
    return v < block.vectors ? block.first + v * kLanes
                             : a.channels + block.first + (v - block.vectors) * kLanes;
}

int64_t lanes_of(const Block& block, int64_t v) {
    const int64_t left_over = block.channels - (v < block.vectors ? v : v - block.vectors) * kLanes;
    return left_over < kLanes ? left_over : kLanes;
}

template <class T>
void load_parameters(const DepthwiseGluArguments& a, const Block& block) {
    for (int64_t v = 0; v < 2 * block.vectors; ++v) {
        const int64_t channel = channel_of(a, block, v), lanes = lanes_of(block, v);
        float* to = block.parameters + v * kParameters;
        store(to, load(static_cast<const T*>(a.input_bias) + channel, lanes));
        store(to + (kTaps + 1) * kLanes, load(static_cast<const T*>(a.bias) + channel, lanes));
        float taps[kLanes * kTaps] = {};
        widen_row(taps, static_cast<const T*>(a.weight) + channel * kTaps, lanes * kTaps);
        for (int64_t tap = 0; tap < kTaps; ++tap) {
            for (int64_t i = 0; i < kLanes; ++i) to[(1 + tap) * kLanes + i] = taps[i * kTaps + tap];
        }
    }
}

// Into the second-level cache; the hardware foresees too little of pixels that lie pages apart.
template <class T>
BLIP3O_INLINE void prefetch(const T* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// silu(x + input bias) of image row y into its place in the ring.
template <class T>
void activate_row(const DepthwiseGluArguments& a, const Block& block, int64_t y) {
    const int64_t first_row = (block.batch * a.height + y) * a.width;
    float* ring = block.ring + y % 3 * a.width * kLanes;
    for (int64_t x = 0; x < a.width; ++x) {
        const T* pixel = a.x.row<T>(first_row + x);
        for (int64_t half = 0; half < 2; ++half) {
            const T* from = pixel + half * a.channels + block.first;
            if (y + 1 < a.height) prefetch(from + a.width * a.x.stride, block.channels);
            float* to = ring + half * block.vectors * block.pitch + x * kLanes;
            const float* bias = block.parameters + half * block.vectors * kParameters;
            for_each_vector(block.channels, [&](int64_t i, int64_t lanes) {
                store(to, silu(load(from + i, lanes) + load(bias)));
                to += block.pitch;
                bias += kParameters;
            });
        }
    }
}

// The convolution of one vector of channels along a row: three sums are open at a time, of the pixel before
// the column being read, of the pixel at it, and of the one after it.
struct Taps {
    Vec tap[kTaps], bias;
    Vec before, at, after;

    BLIP3O_INLINE explicit Taps(const float* parameters) {
        for (int64_t t = 0; t < kTaps; ++t) tap[t] = load(parameters + (1 + t) * kLanes);
        bias = load(parameters + (kTaps + 1) * kLanes);
        at = bias;
        before = bias;
    }

    BLIP3O_INLINE void read(const float* const rows[3], int64_t x) {
        after = bias;
        for (int row = 0; row < 3; ++row) {
            const Vec pixel = load(rows[row] + x * kLanes);
            before += pixel * tap[3 * row + 2];
            at += pixel * tap[3 * row + 1];
            after += pixel * tap[3 * row];
        }
    }

    BLIP3O_INLINE void advance() {
        before = at;
        at = after;
    }
};

// emit(x, sum) for vector v of every pixel of row y.
template <class Emit>
BLIP3O_INLINE void convolve_vector(const DepthwiseGluArguments& a, const Block& block, int64_t y, int64_t v,
                                   const Emit& emit) {
    const float* rows[3];
    for (int64_t row = 0; row < 3; ++row) {
        const bool inside = y + row >= 1 && y + row <= a.height;
        const float* activated = block.ring + v * block.pitch + (y + row + 2) % 3 * a.width * kLanes;
        rows[row] = inside ? activated : block.zeros;
    }
    const int64_t width = a.width;
    Taps taps(block.parameters + v * kParameters);
    taps.read(rows, 0);
    for (int64_t x = 1; x < width; ++x) {
        taps.advance();
        taps.read(rows, x);
        emit(x - 1, taps.before);
    }
    emit(width - 1, taps.at);
}

// Row y of the result for vector v of the block: values first, then gates, since the taps of both would leave
// too few registers for the SiLU.
template <class T>
void convolve_row(const DepthwiseGluArguments& a, const Block& block, int64_t y, int64_t v) {
    float* const sums = block.sums;
    convolve_vector(a, block, y, v, [=](int64_t x, Vec value) { store(sums + x * kLanes, value); });

    const int64_t lanes = lanes_of(block, v), stride = a.out.stride, gate = block.vectors + v;
    T* const out = a.out.row<T>((block.batch * a.height + y) * a.width) + block.first + v * kLanes;
    const auto gated = [=](int64_t x, Vec sum) { return load(sums + x * kLanes) * silu(sum); };
    if (lanes == kLanes) {
        convolve_vector(a, block, y, gate,
                        [=](int64_t x, Vec sum) { store(out + x * stride, gated(x, sum)); });
    } else {
        convolve_vector(a, block, y, gate,
                        [=](int64_t x, Vec sum) { store(out + x * stride, gated(x, sum), lanes); });
    }
}

template <class T>
void convolve(const DepthwiseGluArguments& a, const Block& block) {
    load_parameters<T>(a, block);
    activate_row<T>(a, block, 0);
    for (int64_t y = 0; y < a.height; ++y) {
        if (y + 1 < a.height) activate_row<T>(a, block, y + 1);
        for (int64_t v = 0; v < block.vectors; ++v) convolve_row<T>(a, block, y, v);
    }
}

// Units are kDepthwiseGluChannels channels of an image, those of an image one after another.
template <class T>
void convolve_images(const DepthwiseGluArguments& a, int64_t begin, int64_t end) {
    Block block = make_block(a);
    const int64_t widest = block_channels(a.width);
    const int64_t units = (a.channels + kDepthwiseGluChannels - 1) / kDepthwiseGluChannels;
    for (int64_t unit = begin; unit < end;) {
        block.batch = unit / units;
        const int64_t last = end < (block.batch + 1) * units ? end : (block.batch + 1) * units;
        block.first = (unit - block.batch * units) * kDepthwiseGluChannels;
        const int64_t until = (last - block.batch * units) * kDepthwiseGluChannels;
        block.channels = (until < a.channels ? until : a.channels) - block.first;
        if (block.channels > widest) block.channels = widest;
        block.vectors = round_up(block.channels) / kLanes;
        convolve<T>(a, block);
        unit += (block.channels + kDepthwiseGluChannels - 1) / kDepthwiseGluChannels;
    }
}

}  // namespace

void depthwise_glu(const DepthwiseGluArguments& arguments, int64_t begin, int64_t end) {
    arguments.dtype == DType::bf16 ? convolve_images<bf16>(arguments, begin, end)
                                   : convolve_images<float>(arguments, begin, end);
}

}  // namespace blip3o::cpu::BLIP3O_ISA
