#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace blip3o::cpu {
namespace {

// How often a thread looks for work or for the end of it before it sleeps: some 20 microseconds, longer than
// the gap between two ops of a decoding step and short enough not to starve another process's threads.
constexpr int kSpins = 2000;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class ThreadPool {
  public:
    explicit ThreadPool(int threads) { start(threads); }

    int threads() const { return threads_; }

    // Waits for running work.
    void resize(int threads) {
        while (busy_.exchange(true, std::memory_order_acquire)) std::this_thread::yield();
        if (threads != threads_) {
            stop();
            start(threads);
        }
        busy_.store(false, std::memory_order_release);
    }

    // False if the pool is in use. Throws the first thing that the work threw, once all of it has ended.
    bool run(int64_t count, int64_t grain, detail::RangeFunction function, const void* context) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        count_ = count;
        grain_ = grain;
        function_ = function;
        context_ = context;
        running_.store(threads_ - 1, std::memory_order_relaxed);
        announce();
        run_part(0);
        wait_for_workers();
        const std::exception_ptr error = std::exchange(error_, nullptr);
        busy_.store(false, std::memory_order_release);
        if (error) std::rethrow_exception(error);
        return true;
    }

  private:
    // Fewer threads where the system gives no more.
    void start(int threads) {
        stopping_ = false;
        const uint64_t seen = job_.load();
        workers_.reserve(threads - 1);
        try {
            for (int part = 1; part < threads; ++part) {
                workers_.emplace_back([this, part, seen] { work(part, seen); });
            }
        } catch (const std::system_error&) {
        }
        threads_ = static_cast<int>(workers_.size()) + 1;
    }

    void stop() {
        stopping_ = true;
        announce();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

    void announce() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }

    void run_part(int part) noexcept {
        const int64_t grains = (count_ + grain_ - 1) / grain_;
        const int64_t begin = grains * part / threads_ * grain_;
        const int64_t end = std::min(count_, grains * (part + 1) / threads_ * grain_);
        try {
            if (begin < end) function_(context_, begin, end);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void wait_for_workers() {
        for (int spin = 0; spin < kSpins; ++spin) {
            if (running_.load(std::memory_order_acquire) == 0) return;
            pause_briefly();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_.load(std::memory_order_acquire) == 0; });
    }

    void work(int part, uint64_t seen) {
        while (true) {
            seen = wait_for_job(seen);
            if (stopping_) return;
            run_part(part);
            if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }

    uint64_t wait_for_job(uint64_t seen) {
        for (int spin = 0; spin < kSpins; ++spin) {
            const uint64_t job = job_.load(std::memory_order_acquire);
            if (job != seen) return job;
            pause_briefly();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this, seen] { return job_.load(std::memory_order_acquire) != seen; });
        return job_.load(std::memory_order_acquire);
    }

    int threads_ = 1;
    std::vector<std::thread> workers_;
    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<uint64_t> job_{0};
    std::atomic<int> running_{0};

    // What the current job is; written before it is announced.
    bool stopping_ = false;
    int64_t count_ = 0, grain_ = 1;
    detail::RangeFunction function_ = nullptr;
    const void* context_ = nullptr;
    std::exception_ptr error_;  // guarded by mutex_ while the job runs
};

// Never destroyed: at exit its threads sleep until the process ends.
std::atomic<ThreadPool*> pool{nullptr};
std::atomic<int> wanted_threads{0};

// fork copies only the thread that calls it, so the child gets a pool of its own when it first needs one.
void forget_pool_in_child() { pool.store(nullptr); }

ThreadPool& current_pool() {
    if (ThreadPool* found = pool.load(std::memory_order_acquire)) return *found;
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_in_child);
    static_cast<void>(registered);
    auto* created = new ThreadPool(num_threads());
    ThreadPool* first = nullptr;
    if (pool.compare_exchange_strong(first, created)) return *created;
    created->resize(1);  // another thread was faster
    delete created;
    return *first;
}

}  // namespace

int num_threads() {
    const int wanted = wanted_threads.load();
    return wanted > 0 ? wanted : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void set_num_threads(int threads) {
    wanted_threads.store(std::max(1, threads));
    if (ThreadPool* found = pool.load()) found->resize(num_threads());
}

void detail::parallel_ranges(int64_t count, int64_t grain, RangeFunction run, const void* context) {
    if (count <= 0) return;
    const bool divisible = count > grain && num_threads() > 1;
    if (!divisible || !current_pool().run(count, grain, run, context)) run(context, 0, count);
}

float* thread_scratch(int64_t floats) {
    thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, &std::free);
    thread_local int64_t capacity = 0;
    if (floats > capacity) {
        const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (!memory) {
            capacity = 0;
            throw std::bad_alloc();
        }
        capacity = floats;
    }
    return memory.get();
}

}  // namespace blip3o::cpu
