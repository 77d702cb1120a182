// Runs CUDA kernels on the CPU for tests: the threads of a block are fibres of one thread, one block at a
// time.
//
// A fibre runs until it meets a barrier or exchanges values with its warp, or ends; then the next one runs, in
// ascending or in descending order of threadIdx; blocks follow one another in the same order. A warp goes on
// until all its lanes are at a barrier, as far ahead of the others as the program allows, so that a missing
// barrier lets a thread read what others have not written yet, or overwrite what they have not read. A barrier
// that some thread never reaches, and a shuffle that names a lane which is not there, are errors. Stands in for
// the toolkit's headers (cuda_runtime.h and cuda_bf16.h beside this file), so that no toolkit is needed.
//
// A block of a dependent launch runs up to its wait for the kernel before as if that had not run yet: what that
// kernel may touch (`produced`) is poison until then. A thread that never waits is an error, in any launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibre.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct float2 {
    float x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr size_t kWarp = 32;
constexpr unsigned char kPoison = 0xff;
constexpr int kMostBarriers = 10000;  // that one block meets; more are taken for a loop without an end

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class State { ready, at_barrier, at_exchange, at_wait, done };

// What a lane shows to its warp in one exchange.
struct Letter {
    uint32_t word[8];
};

// 16 bytes on their way from global to shared memory; zeros unless `reads`.
struct Copy {
    void* to;
    const void* from;  // null: `early` has been read
    bool reads;
    unsigned char early[16];
};

// Memory that the kernel before a dependent launch may touch.
struct Produced {
    unsigned char* begin;
    size_t bytes;
    std::vector<unsigned char> kept;
};

inline std::vector<Produced> produced;

inline void hide_produced() {
    for (Produced& memory : produced) memory.kept.assign(memory.begin, memory.begin + memory.bytes);
    for (Produced& memory : produced) std::memset(memory.begin, kPoison, memory.bytes);
}

// Whether nothing was written to it meanwhile.
inline bool reveal_produced() {
    bool untouched = true;
    for (Produced& memory : produced) {
        for (size_t i = 0; i < memory.kept.size(); ++i) untouched &= memory.begin[i] == kPoison;
    }
    for (Produced& memory : produced) {
        std::memcpy(memory.begin, memory.kept.data(), memory.kept.size());
        memory.kept.clear();
    }
    return untouched;
}

struct Thread {
    Fibre fibre;
    State state = State::done;
    int exchanges = 0;
    bool waited = false;                    // for the kernel before
    std::vector<std::vector<Copy>> copies;  // groups, the last one not yet committed
};

// The threads of a block; they serve one block after the other.
class Block {
  public:
    static inline std::unique_ptr<Block> current;
    static inline bool descending = false;

    explicit Block(size_t threads) : threads_(threads), mailbox_(2 * threads) {}

    size_t size() const { return threads_.size(); }

    // Dynamic shared memory begins as what is no number. early: the kernel before is not over yet.
    void run(const std::function<void()>& body, size_t dynamic_bytes, bool early) {
        body_ = &body;
        early_ = early;
        if (early) hide_produced();
        dynamic_.assign(dynamic_bytes, kPoison);
        dynamic_.shrink_to_fit();
        for (Thread& thread : threads_) {
            thread.state = State::ready;
            thread.exchanges = 0;
            thread.waited = false;
            thread.copies.assign(1, {});
        }
        for (int barriers = 0; !finished(); ++barriers) {
            bool progressed = false;
            for (size_t i = 0; i < size(); i += kWarp) {
                progressed |= run_warp(descending ? size() - kWarp - i : i);
            }
            progressed |= release(0, size(), State::at_barrier);
            if (release(0, size(), State::at_wait)) {
                progressed = true;
                if (!reveal_produced())
                    throw Failure("a block writes before it has waited for the kernel before");
            }
            if (!progressed) throw Failure("threads wait for others that never come (barrier or shuffle)");
            if (barriers == kMostBarriers) throw Failure("a block does not end");
        }
        for (const Thread& thread : threads_) {
            if (!thread.waited) throw Failure("a thread ends that has not waited for the kernel before");
        }
    }

    // Copies that are on their way have read what they copy by now.
    void wait_for_previous_kernel() {
        threads_[active_].waited = true;
        if (!early_) return;
        for (auto& group : threads_[active_].copies) {
            for (Copy& copy : group) {
                if (copy.reads && copy.from) std::memcpy(copy.early, std::exchange(copy.from, nullptr), 16);
            }
        }
        wait(State::at_wait);
    }

    void barrier() { wait(State::at_barrier); }

    // Every lane leaves its letter and sees those of its warp, until its next exchange but one. Two mailboxes
    // in turn: no lane can be more than one exchange ahead of another.
    const Letter* exchange(uint32_t mask, const Letter& letter) {
        if (mask != 0xffffffffu) std::abort();  // only exchanges of whole warps are emulated
        const size_t mine = active_, box = threads_[mine].exchanges++ % 2 * size();
        mailbox_[box + mine] = letter;
        wait(State::at_exchange);
        return &mailbox_[box + mine / kWarp * kWarp];
    }

    size_t lane() const { return active_ % kWarp; }

    void* dynamic_memory() { return dynamic_.data(); }

    // A copy is made where its thread waits for it: until then there is poison.
    void copy(const Copy& copy) {
        std::memset(copy.to, kPoison, 16);
        threads_[active_].copies.back().push_back(copy);
    }

    void commit() { threads_[active_].copies.emplace_back(); }

    void wait_for_copies(size_t pending) {
        auto& groups = threads_[active_].copies;
        while (groups.size() > pending + 1) {
            for (const Copy& copy : groups.front()) {
                if (!copy.reads) std::memset(copy.to, 0, 16);
                if (copy.reads) std::memcpy(copy.to, copy.from ? copy.from : copy.early, 16);
            }
            groups.erase(groups.begin());
        }
    }

  private:
    static void serve() {
        while (true) {
            (*current->body_)();
            current->wait(State::done);
        }
    }

    // Runs the warp that begins at thread `first` until all its lanes are at a barrier or a wait, or done; whether any ran.
    bool run_warp(size_t first) {
        bool progressed = false;
        do {
            for (size_t lane = 0; lane < kWarp; ++lane) {
                const size_t thread = first + (descending ? kWarp - 1 - lane : lane);
                if (threads_[thread].state != State::ready) continue;
                resume(thread);
                progressed = true;
            }
        } while (release(first, first + kWarp, State::at_exchange));
        return progressed;
    }

    void resume(size_t index) {
        active_ = index;
        const unsigned thread = static_cast<unsigned>(index), row = thread / blockDim.x;
        threadIdx = dim3(thread % blockDim.x, row % blockDim.y, row / blockDim.y);
        threads_[index].fibre.resume(&Block::serve);
    }

    void wait(State state) {
        threads_[active_].state = state;
        threads_[active_].fibre.suspend();
    }

    // Lets threads first .. last go on if all of them have arrived at `state`.
    bool release(size_t first, size_t last, State state) {
        for (size_t thread = first; thread < last; ++thread) {
            if (threads_[thread].state != state) return false;
        }
        for (size_t thread = first; thread < last; ++thread) threads_[thread].state = State::ready;
        return true;
    }

    bool finished() const {
        for (const Thread& thread : threads_) {
            if (thread.state != State::done) return false;
        }
        return true;
    }

    std::vector<Thread> threads_;
    std::vector<Letter> mailbox_;
    std::vector<unsigned char> dynamic_;
    const std::function<void()>* body_ = nullptr;
    size_t active_ = 0;
    bool early_ = false;
};

inline void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, bool early,
                     const std::function<void()>& body) {
    gridDim = grid;
    blockDim = block;
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads % kWarp != 0) throw Failure("a block must consist of whole warps");
    if (!Block::current || Block::current->size() != threads) Block::current.reset(new Block(threads));
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned turn = 0; turn < blocks; ++turn) {
        const unsigned i = Block::descending ? blocks - 1 - turn : turn;
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        try {
            Block::current->run(body, dynamic_bytes, early);
        } catch (const Failure&) {
            reveal_produced();
            Block::current.reset();  // its threads are stuck
            throw;
        }
    }
}

template <class T>
T exchange(uint32_t mask, T value, size_t source) {
    Letter letter = {};
    std::memcpy(&letter, &value, sizeof value);
    const Letter* letters = Block::current->exchange(mask, letter);
    std::memcpy(&value, &letters[source % kWarp], sizeof value);
    return value;
}

}  // namespace simt

// The functions of csrc/cuda/async_copy.h.
inline void* dynamic_shared_memory() { return simt::Block::current->dynamic_memory(); }

inline void copy_async(void* to, const void* from, bool condition) {
    simt::Block::current->copy({to, from, condition, {}});
}

inline void commit_copies() { simt::Block::current->commit(); }

template <int kPending>
void wait_for_copies() {
    simt::Block::current->wait_for_copies(kPending);
}

// The function of csrc/cuda/dependent_launch.h.
inline void wait_for_previous_kernel() { simt::Block::current->wait_for_previous_kernel(); }

inline void __syncthreads() { simt::Block::current->barrier(); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    return simt::exchange(mask, value, simt::Block::current->lane() ^ static_cast<size_t>(distance));
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
    return simt::exchange(mask, value, static_cast<size_t>(source));
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
    const size_t lane = simt::Block::current->lane(), away = static_cast<size_t>(distance);
    return simt::exchange(mask, value, lane >= away ? lane - away : lane);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
    simt::Letter letter = {};
    letter.word[0] = vote;
    const simt::Letter* letters = simt::Block::current->exchange(mask, letter);
    uint32_t votes = 0;
    for (size_t lane = 0; lane < simt::kWarp; ++lane) votes |= letters[lane].word[0] << lane;
    return votes;
}

// Four bytes of the eight of b | a, each picked by a hexadecimal digit of the selector.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

inline int __popc(uint32_t value) { return __builtin_popcount(value); }

inline int __clzll(long long value) {
    return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Fibres never run at the same time, so that every addition is atomic.
template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

// Counts up to `last`, then from 0 again.
inline unsigned atomicInc(unsigned* address, unsigned last) {
    const unsigned before = *address;
    *address = before >= last ? 0 : before + 1;
    return before;
}

inline void __threadfence() {}

template <class T>
T __ldcg(const T* address) {
    return *address;
}

inline float simt_bfloat16(uint32_t word, size_t half) {
    const uint32_t bits = half == 0 ? word << 16 : word & 0xffff0000u;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Four matrices of 8 x 8 elements of 16 bits, transposed, as in csrc/cuda/mma.h: lane i names row i % 8 of
// matrix i / 8.
inline void load_transposed(uint32_t (&b)[4], const void* row) {
    simt::Letter letter = {};
    std::memcpy(letter.word, &row, sizeof row);
    const simt::Letter* letters = simt::Block::current->exchange(0xffffffffu, letter);
    const size_t lane = simt::Block::current->lane();
    for (size_t matrix = 0; matrix < 4; ++matrix) {
        b[matrix] = 0;
        for (size_t half = 0; half < 2; ++half) {
            const uint16_t* elements;
            std::memcpy(&elements, letters[matrix * 8 + lane % 4 * 2 + half].word, sizeof elements);
            b[matrix] |= static_cast<uint32_t>(elements[lane / 4]) << 16 * half;
        }
    }
}

namespace simt {

// The largest float that is not farther from zero.
inline float cut_off(double value) {
    const float nearest = static_cast<float>(value);
    return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// A sum as the coarsest tensor cores make it: its terms are cut off where the largest of them would end as a
// float, and so is the sum.
template <size_t count>
float add_aligned(const double (&terms)[count]) {
    double largest = 0.0, exact = 0.0;
    for (double term : terms) {
        largest = std::fmax(largest, std::fabs(term));
        exact += term;
    }
    if (largest == 0.0 || !std::isfinite(exact)) return static_cast<float>(exact);
    int exponent;
    std::frexp(largest, &exponent);
    const double units = std::ldexp(1.0, 24 - exponent);
    int64_t sum = 0;
    for (double term : terms) sum += static_cast<int64_t>(term * units);
    return cut_off(static_cast<double>(sum) / units);
}

}  // namespace simt

// The tensor cores' product of csrc/cuda/mma.h.
inline void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    simt::Letter letter = {{a[0], a[1], a[2], a[3], b[0], b[1]}};
    const simt::Letter* letters = simt::Block::current->exchange(0xffffffffu, letter);
    const size_t lane = simt::Block::current->lane();
    for (size_t e = 0; e < 4; ++e) {
        const size_t row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        double terms[17] = {sums[e]};
        for (size_t k = 0; k < 16; ++k) {
            const simt::Letter &row_letter = letters[row % 8 * 4 + k % 8 / 2],
                               &column_letter = letters[column * 4 + k % 8 / 2];
            terms[1 + k] = double{simt_bfloat16(row_letter.word[k / 8 * 2 + row / 8], k % 2)} *
                           simt_bfloat16(column_letter.word[4 + k / 8], k % 2);
        }
        sums[e] = simt::add_aligned(terms);
    }
}
