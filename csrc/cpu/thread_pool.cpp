#include "cpu/thread_pool.h"

#include <dlfcn.h>
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
#include <type_traits>
#include <vector>

namespace blip3o::cpu {
namespace {

// The threads of the OpenMP runtime that torch has loaded, where it is GNU's. A second set of threads would
// run beside torch's, which look for work for milliseconds after each of its products before they sleep.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);  // null where there is none
    int (*thread_number)();
    int (*team_size)();
    int (*in_parallel)();
};

const OpenMp& open_mp() {
    static const OpenMp found = [] {
        OpenMp runtime{};
        const auto look_up = [](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
            return function != nullptr;
        };
        const bool complete = look_up(runtime.thread_number, "omp_get_thread_num") &&
                              look_up(runtime.team_size, "omp_get_num_threads") &&
                              look_up(runtime.in_parallel, "omp_in_parallel") &&
                              look_up(runtime.parallel, "GOMP_parallel");
        return complete ? runtime : OpenMp{};
    }();
    return found;
}

// A call's work, in as many ranges as threads come to it.
struct Job {
    int64_t count, grain;
    detail::RangeFunction function;
    const void* context;
    std::mutex mutex;
    std::exception_ptr error;  // the first; guarded by mutex

    void run_part(int part, int parts) noexcept {
        const Range range = range_of_part(count, grain, part, parts);
        try {
            if (range.begin < range.end) function(context, range.begin, range.end);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    }
};

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

    // False if the pool is in use.
    bool run(Job& job) {
        if (busy_.exchange(true, std::memory_order_acquire)) return false;
        work_ = &job;
        running_.store(threads_ - 1, std::memory_order_relaxed);
        announce();
        job.run_part(0, threads_);
        wait_for_workers();
        busy_.store(false, std::memory_order_release);
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
            work_->run_part(part, threads_);
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

    // Written before the current job is announced.
    bool stopping_ = false;
    Job* work_ = nullptr;
};

// Never destroyed: at exit its threads sleep until the process ends.
std::atomic<ThreadPool*> pool{nullptr};
std::atomic<int> wanted_threads{0};

std::atomic<bool> open_mp_busy{false}, forked{false};

// fork copies only the thread that calls it: the child gets a pool of its own when it first needs one, and
// never again asks a runtime whose threads are gone.
void forget_threads_in_child() {
    pool.store(nullptr);
    forked.store(true);
}

// From the module's loading on: torch's threads can be at work before an op's first call.
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, forget_threads_in_child);

ThreadPool& current_pool() {
    if (ThreadPool* found = pool.load(std::memory_order_acquire)) return *found;
    auto* created = new ThreadPool(num_threads());
    ThreadPool* first = nullptr;
    if (pool.compare_exchange_strong(first, created)) return *created;
    created->resize(1);  // another thread was faster
    delete created;
    return *first;
}

// False where its threads are at work already, for this caller or for another.
bool run_on_open_mp(Job& job) {
    if (open_mp().in_parallel() || open_mp_busy.exchange(true, std::memory_order_acquire)) return false;
    const auto part = [](void* work) {
        static_cast<Job*>(work)->run_part(open_mp().thread_number(), open_mp().team_size());
    };
    open_mp().parallel(part, &job, static_cast<unsigned>(num_threads()), 0);
    open_mp_busy.store(false, std::memory_order_release);
    return true;
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
    if (count <= grain || num_threads() == 1) return run(context, 0, count);
    Job job{count, grain, run, context, {}, {}};
    const bool shared = open_mp().parallel && !forked.load();
    if (!(shared ? run_on_open_mp(job) : current_pool().run(job))) return run(context, 0, count);
    if (job.error) std::rethrow_exception(job.error);
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
