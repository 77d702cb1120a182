// Philox4x32-10, the source of every random number; the same function as blip3o_rt/ops/random.py.
//
// Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11).
#pragma once

#include <cstdint>

#include "blip3o/host_device.h"

namespace blip3o {

// Streams of random numbers; those of blip3o_rt/ops/random.py.
enum class Stream : uint32_t { tokens = 1, noise = 2 };

struct PhiloxBlock {
    uint32_t word[4];
};

BLIP3O_HOST_DEVICE inline PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                    static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                    static_cast<uint32_t>(product0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Numbers 4 * block .. 4 * block + 3 of (seed, stream, position).
BLIP3O_HOST_DEVICE inline PhiloxBlock philox_block(uint64_t seed, Stream stream, uint32_t position,
                                                   uint64_t block) {
    return philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), position,
                        static_cast<uint32_t>(stream)}},
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// A word as a number strictly between 0 and 1, exact in double: its top 24 bits and a half, over 2^24.
BLIP3O_HOST_DEVICE inline double as_uniform(uint32_t word) {
    return (static_cast<double>(word >> 8) + 0.5) * (1.0 / 16777216.0);
}

}  // namespace blip3o
