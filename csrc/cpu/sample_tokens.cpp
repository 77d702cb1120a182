// Top-k, top-p, temperature and a Gumbel-max draw, row by row; scalar code, so compiled once.
//
// Top-k finds the k-th logit with a histogram of the upper bits and a selection within one bin, so the
// vocabulary is read a few times and only what is kept is ever sorted (for top-p) or given a random number.
// Everything after the logits is double, as in the reference.
#include "blip3o/ops/sample_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "blip3o/philox.h"

namespace blip3o::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Candidate {
    float logit;
    int32_t token;
};

// An unsigned number that orders as the logit does; both zeros are one.
uint32_t order_key(float logit) {
    const float value = logit == 0.0f ? 0.0f : logit;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// False if the row must not be drawn from: it holds NaN or +inf, or nothing finite.
bool is_drawable(const float* logits, int64_t size) {
    bool finite = false;
    for (int64_t i = 0; i < size; ++i) {
        if (!(logits[i] < kInfinity)) return false;
        finite |= logits[i] > -kInfinity;
    }
    return finite;
}

// The k-th largest key (k >= 1), and how many keys are above it.
struct Threshold {
    uint32_t key;
    int64_t above;
};

Threshold kth_largest(const float* logits, int64_t size, int64_t k) {
    constexpr int kBinBits = 12, kShift = 32 - kBinBits;
    std::vector<int32_t> bins(size_t{1} << kBinBits);
    for (int64_t i = 0; i < size; ++i) ++bins[order_key(logits[i]) >> kShift];
    int64_t above = 0;
    uint32_t bin = (1u << kBinBits) - 1;
    while (above + bins[bin] < k) above += bins[bin--];
    std::vector<uint32_t> keys;
    keys.reserve(bins[bin]);
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t key = order_key(logits[i]);
        if (key >> kShift == bin) keys.push_back(key);
    }
    const auto kth = keys.begin() + (k - above - 1);
    std::nth_element(keys.begin(), kth, keys.end(), std::greater<uint32_t>());
    const uint32_t key = *kth;
    above += std::count_if(keys.begin(), keys.end(), [key](uint32_t other) { return other > key; });
    return {key, above};
}

// The first k tokens of the order (logit descending, index ascending) that can be drawn at all, by index.
std::vector<Candidate> keep_top_k(const float* logits, int64_t size, int64_t k) {
    std::vector<Candidate> kept;
    if (k <= 0 || k >= size) {
        kept.reserve(size);
        for (int64_t i = 0; i < size; ++i) {
            if (logits[i] > -kInfinity) kept.push_back({logits[i], static_cast<int32_t>(i)});
        }
        return kept;
    }
    const Threshold threshold = kth_largest(logits, size, k);
    int64_t ties_left = k - threshold.above;
    kept.reserve(k);
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t key = order_key(logits[i]);
        const bool keep = key > threshold.key || (key == threshold.key && ties_left-- > 0);
        if (keep && logits[i] > -kInfinity) kept.push_back({logits[i], static_cast<int32_t>(i)});
    }
    return kept;
}

// Sorts the candidates and cuts them after the shortest prefix whose probability reaches top_p.
void keep_top_p(std::vector<Candidate>& kept, double temperature, double top_p) {
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    });
    const double largest = kept.front().logit / temperature;
    std::vector<double> mass;
    mass.reserve(kept.size());
    double total = 0.0;
    for (const Candidate& candidate : kept) {
        mass.push_back(std::exp(candidate.logit / temperature - largest));
        total += mass.back();
    }
    double before = 0.0;
    size_t count = 0;
    while (count < kept.size() && (count == 0 || before < top_p)) before += mass[count++] / total;
    kept.resize(count);
}

int64_t draw(const std::vector<Candidate>& kept, double temperature, uint64_t seed, uint32_t position) {
    double best = -std::numeric_limits<double>::infinity();
    int64_t token = std::numeric_limits<int64_t>::max();
    uint64_t block = ~uint64_t{0};
    PhiloxBlock numbers{};
    for (const Candidate& candidate : kept) {
        const uint64_t wanted = static_cast<uint64_t>(candidate.token) / 4;
        if (wanted != block) numbers = philox_block(seed, Stream::tokens, position, block = wanted);
        const double uniform = as_uniform(numbers.word[candidate.token % 4]);
        const double score = candidate.logit / temperature - std::log(-std::log(uniform));
        if (score > best || (score == best && candidate.token < token)) {
            best = score;
            token = candidate.token;
        }
    }
    return token;
}

}  // namespace

void sample_rows(const SampleTokensArguments&, int64_t begin, int64_t end);

void sample_rows(const SampleTokensArguments& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float* logits = a.logits.row<const float>(row);
        const double temperature = a.temperature[row];
        a.out[row] = -1;
        if (!(temperature > 0.0) || !is_drawable(logits, a.logits.width)) continue;
        std::vector<Candidate> kept = keep_top_k(logits, a.logits.width, a.top_k[row]);
        if (a.top_p[row] < 1.0f) keep_top_p(kept, temperature, a.top_p[row]);
        a.out[row] = draw(kept, temperature, static_cast<uint64_t>(a.seeds[row]),
                          static_cast<uint32_t>(a.positions[row]));
    }
}

}  // namespace blip3o::cpu
