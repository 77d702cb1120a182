// Stands in for cpu/thread_pool.cpp: shows how the work of a call is split among up to kMostThreads threads.
//
// The parts of the most threads run one after the other, each on the memory as it was before the call. A byte that
// two of them change is an error. With BLIP3O_SPLITS=FILE nothing runs: for every kernel a line is appended, units,
// grain, and how many of 1, 2, .. kMostThreads threads would have work.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "blip3o/tensor_view.h"
#include "cpu/thread_pool.h"

extern std::vector<std::vector<char>> memory;  // server.cpp

namespace blip3o::cpu {
namespace {

constexpr int kMostThreads = 64;

// How many threads have work; their ranges must follow each other from the first unit to the last.
int busy_threads(int64_t count, int64_t grain, int threads) {
    int busy = 0;
    int64_t done = 0;
    for (int part = 0; part < threads; ++part) {
        const Range range = range_of_part(count, grain, part, threads);
        if (range.begin >= range.end) continue;
        if (range.begin != done) throw ArgumentError("units are left out, or done by two threads");
        done = range.end;
        ++busy;
    }
    if (done != count) throw ArgumentError("units are left out");
    return busy;
}

void note(const char* file, int64_t count, int64_t grain) {
    std::string line = std::to_string(count) + " " + std::to_string(grain);
    for (int threads = 1; threads <= kMostThreads; ++threads) {
        line += " " + std::to_string(busy_threads(count, grain, threads));
    }
    std::FILE* const out = std::fopen(file, "a");
    std::fprintf(out, "%s\n", line.c_str());
    std::fclose(out);
}

}  // namespace

int num_threads() { return kMostThreads; }

void set_num_threads(int) {}

void detail::parallel_ranges(int64_t count, int64_t grain, RangeFunction run, const void* context) {
    if (count <= 0) return;
    if (const char* file = std::getenv("BLIP3O_SPLITS")) return note(file, count, grain);
    const auto before = memory;
    auto after = memory;
    std::vector<std::vector<int>> writer;  // 0: none yet
    for (const auto& bytes : memory) writer.emplace_back(bytes.size());
    for (int part = 0; part < kMostThreads; ++part) {
        const Range range = range_of_part(count, grain, part, kMostThreads);
        if (range.begin >= range.end) continue;
        run(context, range.begin, range.end);
        for (size_t i = 0; i < memory.size(); ++i) {
            for (size_t byte = 0; byte < memory[i].size(); ++byte) {
                if (memory[i][byte] == before[i][byte]) continue;
                if (writer[i][byte] != 0) throw ArgumentError("two threads write the same byte");
                writer[i][byte] = part + 1;
                after[i][byte] = memory[i][byte];
                memory[i][byte] = before[i][byte];
            }
        }
    }
    for (size_t i = 0; i < memory.size(); ++i) std::copy(after[i].begin(), after[i].end(), memory[i].begin());
}

float* thread_scratch(int64_t floats) {
    static std::vector<float> scratch;
    if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
    return scratch.data();
}

}  // namespace blip3o::cpu
