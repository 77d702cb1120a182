// Windows of rows move on behind the draws that are kept: a few integers a row, and its embedding where asked for.
#include "blip3o/ops/advance_windows.h"
#include "cpu/simd.h"

namespace blip3o::cpu::BLIP3O_ISA {
namespace {

// The embeddings of the tokens that rows read; of an id that has none not a number.
template <class Weight, class T>
void embed(const AdvanceWindowsArguments& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t id = a.out[row];
        const bool known = id >= 0 && id < a.embedding.count;
        const Weight* from = a.embedding.row<Weight>(known ? id : 0);
        T* to = a.embedded.row<T>(row);
        for_each_vector(a.embedded.width, [&](int64_t i, int64_t count) {
            store(to + i, known ? load(from + i, count) : broadcast(__builtin_nanf("")), count);
        });
    }
}

void embed_rows(const AdvanceWindowsArguments& a, int64_t begin, int64_t end) {
    if (!a.embeds) return;
    if (a.embedded_dtype == DType::bf16) {
        embed<bf16, bf16>(a, begin, end);
    } else if (a.embedding_dtype == DType::bf16) {
        embed<bf16, float>(a, begin, end);
    } else {
        embed<float, float>(a, begin, end);
    }
}

}  // namespace

void advance_windows(const AdvanceWindowsArguments& a, int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) {
        const int64_t first = a.cu_rows[window], last = window == a.windows ? a.rows : a.cu_rows[window + 1];
        if (window == a.windows || !a.moves(window)) {
            for (int64_t row = first; row < last; ++row) a.stay(row);
            embed_rows(a, first, last);
            continue;
        }
        const int64_t kept = a.num_generated[first];
        const int64_t* ids = a.output_ids + a.output_slots[first] - kept;
        int64_t above = 0, newest = 0;
        for (int64_t index = a.grid_width; index < kept; ++index) {
            above += a.repeats(ids, index, a.grid_width);
            newest += a.repeats(ids, index, 1);
        }
        a.move(window, above >= newest);
        embed_rows(a, first, last);
    }
}

}  // namespace blip3o::cpu::BLIP3O_ISA
