// Runs CUDA kernels on the CPU for tests: the threads of a block are fibres of one thread, one block at a
// time.
//
// A fibre runs until it meets a barrier or a warp shuffle, or ends; then the next one runs, in ascending or
// in descending order of threadIdx, so that a missing barrier lets a thread read what others have not written
// yet. A barrier that some thread never reaches, and a shuffle that names a lane which is not there, are
// errors. Stands in for the toolkit's headers (cuda_runtime.h and cuda_bf16.h beside this file), so that no
// toolkit is needed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr size_t kWarp = 32, kStackBytes = 64 * 1024;

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class State { ready, at_barrier, at_shuffle, done };

struct Fibre {
    std::vector<char> stack = std::vector<char>(kStackBytes);
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    State state = State::done;
    int shuffles = 0;
};

// The threads of a block; they serve one block after the other. (_setjmp switches between stacks that
// ucontext has set up, because ucontext's own switch makes two system calls.)
class Block {
  public:
    static inline std::unique_ptr<Block> current;
    static inline bool descending = false;

    explicit Block(size_t threads) : fibres_(threads), mailbox_(2 * threads) {}

    size_t threads() const { return fibres_.size(); }

    void run(const std::function<void()>& body) {
        body_ = &body;
        for (Fibre& fibre : fibres_) {
            fibre.state = State::ready;
            fibre.shuffles = 0;
        }
        while (!finished()) {
            bool progressed = false;
            for (size_t i = 0; i < threads(); ++i) {
                const size_t thread = descending ? threads() - 1 - i : i;
                if (fibres_[thread].state != State::ready) continue;
                resume(thread);
                progressed = true;
            }
            progressed |= release(0, threads(), State::at_barrier);
            for (size_t first = 0; first < threads(); first += kWarp) {
                progressed |= release(first, first + kWarp, State::at_shuffle);
            }
            if (!progressed) throw Failure("threads wait for others that never come (barrier or shuffle)");
        }
    }

    void barrier() { wait(State::at_barrier); }

    // Every lane leaves its value and reads that of lane `source`. Two mailboxes in turn: no lane can be more
    // than one shuffle ahead of another.
    uint64_t exchange(uint32_t mask, uint64_t value, size_t source) {
        if (mask != 0xffffffffu) std::abort();  // only shuffles of whole warps are emulated
        const size_t mine = active_, box = fibres_[mine].shuffles++ % 2 * threads();
        mailbox_[box + mine] = value;
        wait(State::at_shuffle);
        return mailbox_[box + mine / kWarp * kWarp + source % kWarp];
    }

    size_t lane() const { return active_ % kWarp; }

  private:
    static void serve() {
        while (true) {
            (*current->body_)();
            current->wait(State::done);
        }
    }

    void resume(size_t thread) {
        Fibre& fibre = fibres_[thread];
        active_ = thread;
        const unsigned row = static_cast<unsigned>(thread) / blockDim.x;
        threadIdx = dim3(static_cast<unsigned>(thread) % blockDim.x, row % blockDim.y, row / blockDim.y);
        if (_setjmp(scheduler_) != 0) return;
        if (fibre.started) _longjmp(fibre.resume, 1);
        fibre.started = true;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.data();
        fibre.start.uc_stack.ss_size = fibre.stack.size();
        makecontext(&fibre.start, &Block::serve, 0);
        setcontext(&fibre.start);
    }

    void wait(State state) {
        Fibre& fibre = fibres_[active_];
        fibre.state = state;
        if (_setjmp(fibre.resume) == 0) _longjmp(scheduler_, 1);
    }

    // Lets threads first .. last go on if all of them have arrived at `state`.
    bool release(size_t first, size_t last, State state) {
        for (size_t thread = first; thread < last; ++thread) {
            if (fibres_[thread].state != state) return false;
        }
        for (size_t thread = first; thread < last; ++thread) fibres_[thread].state = State::ready;
        return true;
    }

    bool finished() const {
        for (const Fibre& fibre : fibres_) {
            if (fibre.state != State::done) return false;
        }
        return true;
    }

    std::vector<Fibre> fibres_;
    std::vector<uint64_t> mailbox_;
    const std::function<void()>* body_ = nullptr;
    jmp_buf scheduler_;
    size_t active_ = 0;
};

inline void run_grid(dim3 grid, dim3 block, const std::function<void()>& body) {
    gridDim = grid;
    blockDim = block;
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads % kWarp != 0) throw Failure("a block must consist of whole warps");
    if (!Block::current || Block::current->threads() != threads) Block::current.reset(new Block(threads));
    for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        try {
            Block::current->run(body);
        } catch (const Failure&) {
            Block::current.reset();  // its threads are stuck
            throw;
        }
    }
}

template <class T>
T exchange(uint32_t mask, T value, size_t source) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = Block::current->exchange(mask, bits, source);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace simt

inline void __syncthreads() { simt::Block::current->barrier(); }

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    return simt::exchange(mask, value, simt::Block::current->lane() ^ static_cast<size_t>(distance));
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
    return simt::exchange(mask, value, source);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, int distance) {
    const size_t lane = simt::Block::current->lane();
    return simt::exchange(mask, value, lane + distance < simt::kWarp ? lane + distance : lane);
}
