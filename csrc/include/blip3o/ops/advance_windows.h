// Draws that agree with their guesses are kept, and each image's window of rows moves on behind them. The embeddings
// of the tokens that its rows read may be written too.
#pragma once

#include "blip3o/host_device.h"
#include "blip3o/op.h"

namespace blip3o {

struct AdvanceWindowsArguments {
    const int64_t* sampled_ids;
    const int32_t* cu_rows;
    const int64_t* first_ids;
    const int32_t* page_table;
    int32_t *num_generated, *context_lens;
    int64_t *output_slots, *output_ids;
    int32_t *positions, *slot_mapping;
    int64_t* out;
    Rows embedding, embedded;  // where `embeds`
    DType embedding_dtype, embedded_dtype;
    bool embeds;
    int64_t rows, windows, max_pages, page_size, tokens_per_image, grid_width, num_output_slots;

    // Whether a window's image is there and fits its pages and its output slots.
    BLIP3O_HOST_DEVICE bool moves(int64_t window) const {
        const int64_t begin = cu_rows[window];
        if (begin >= cu_rows[window + 1] || context_lens[begin] <= 0) return false;
        const int64_t kept = num_generated[begin], first_slot = output_slots[begin] - kept;
        return context_lens[begin] - kept + tokens_per_image <= max_pages * page_size && first_slot >= 0 &&
               first_slot + tokens_per_image < num_output_slots;
    }

    BLIP3O_HOST_DEVICE void stay(int64_t row) const {
        out[row] = first_ids[row];
        positions[row] = 0;
        slot_mapping[row] = -1;
    }

    // Whether token `index` of the image whose tokens begin at `ids` repeats the one `distance` before it.
    static BLIP3O_HOST_DEVICE bool repeats(const int64_t* ids, int64_t index, int64_t distance) {
        return ids[index] == ids[index - distance];
    }

    // Moves a window that `moves`. above: guess the token one row of the grid up, else the last token.
    BLIP3O_HOST_DEVICE void move(int64_t window, bool above) const {
        const int64_t begin = cu_rows[window], size = cu_rows[window + 1] - begin;
        const int64_t kept = num_generated[begin], prompt = context_lens[begin] - kept;
        const int64_t first_slot = output_slots[begin] - kept;
        int64_t* ids = output_ids + first_slot;

        int64_t drawn = 0;  // by the rows that were decoded; the row of the last token draws nothing
        while (drawn < size && kept + drawn < tokens_per_image && context_lens[begin + drawn] > 0) ++drawn;
        int64_t right = drawn > 0 ? 1 : 0;  // the next row read a guess: its draw counts if that was right
        while (right < drawn && read(sampled_ids[begin + right - 1]) == read(ids[kept + right - 1])) ++right;
        for (int64_t row = 0; row < drawn; ++row) ids[kept + row] = sampled_ids[begin + row];

        const int64_t next = kept + right;  // tokens that are kept now; the window begins at the last of them
        const int64_t end = next - 1 + size < tokens_per_image ? next - 1 + size : tokens_per_image;
        for (int64_t index = kept + drawn; index < end; ++index) {
            ids[index] = ids[index - (above && index >= grid_width ? grid_width : 1)];
        }
        for (int64_t row = begin, index = next - 1; row < begin + size; ++row, ++index) {
            if (index >= tokens_per_image) {
                stay(row);
                num_generated[row] = context_lens[row] = 0;
                output_slots[row] = num_output_slots - 1;
                continue;
            }
            const int64_t position = prompt + index;
            const int64_t page = page_table[row * max_pages + position / page_size];
            out[row] = read(ids[index]) + first_ids[row];
            positions[row] = static_cast<int32_t>(position);
            slot_mapping[row] = static_cast<int32_t>(page * page_size + position % page_size);
            num_generated[row] = static_cast<int32_t>(index + 1);
            context_lens[row] = static_cast<int32_t>(position + 1);
            output_slots[row] = first_slot + index + 1;
        }
    }

  private:
    static BLIP3O_HOST_DEVICE int64_t read(int64_t sampled) { return sampled < 0 ? 0 : sampled; }
};

struct AdvanceWindows {
    static constexpr char kName[] = "advance_windows";
    static constexpr char kParameters[] =
        "sampled_ids, cu_rows, first_ids, page_table, page_size, tokens_per_image, grid_width, "
        "num_generated, context_lens, output_slots, output_ids, positions, slot_mapping, *, embedding=None, "
        "embedded=None, out";

    static AdvanceWindowsArguments check(
        Device device, const TensorView& sampled_ids, const TensorView& cu_rows, const TensorView& first_ids,
        const TensorView& page_table, int64_t page_size, int64_t tokens_per_image, int64_t grid_width,
        const TensorView& num_generated, const TensorView& context_lens, const TensorView& output_slots,
        const TensorView& output_ids, const TensorView& positions, const TensorView& slot_mapping,
        const OptionalView& embedding, const OptionalView& embedded, const TensorView& out) {
        Contract contract(kName, device);
        Dim rows("R"), bounds("B + 1"), max_pages("max_pages"), num_output_slots("N");
        Dim vocabulary("V"), width("D");
        AdvanceWindowsArguments a;
        a.sampled_ids = contract(sampled_ids, "sampled_ids").array<int64_t>({&rows});
        a.cu_rows = contract(cu_rows, "cu_rows").array<int32_t>({&bounds});
        a.first_ids = contract(first_ids, "first_ids").array<int64_t>({&rows});
        a.page_table = contract(page_table, "page_table").array<int32_t>({&rows, &max_pages});
        a.num_generated = contract(num_generated, "num_generated").array<int32_t>({&rows});
        a.context_lens = contract(context_lens, "context_lens").array<int32_t>({&rows});
        a.output_slots = contract(output_slots, "output_slots").array<int64_t>({&rows});
        a.output_ids = contract(output_ids, "output_ids").array<int64_t>({&num_output_slots});
        a.positions = contract(positions, "positions").array<int32_t>({&rows});
        a.slot_mapping = contract(slot_mapping, "slot_mapping").array<int32_t>({&rows});
        a.out = contract(out, "out").array<int64_t>({&rows});
        contract.require(embedding.has_value() == embedded.has_value(),
                         "embedding and embedded must be given together");
        a.embeds = embedding.has_value();
        a.embedding_dtype = a.embeds ? embedding->dtype : DType::f32;
        a.embedded_dtype = a.embeds ? embedded->dtype : DType::f32;
        a.embedding = contract(embedding, "embedding")
                          .dtype({a.embedded_dtype, DType::bf16})
                          .shape({&vocabulary, &width})
                          .rows(vocabulary, width);
        a.embedded = contract(embedded, "embedded").dtype(kFloats).shape({&rows, &width}).rows(rows, width);
        contract.require(bounds.value() > 0, "cu_rows must hold at least one number");
        contract.require(page_size > 0, "page_size must be at least 1");
        contract.require(tokens_per_image > 0, "tokens_per_image must be at least 1");
        contract.require(grid_width > 0, "grid_width must be at least 1");
        a.rows = rows.value();
        a.windows = bounds.value() - 1;
        a.max_pages = max_pages.value();
        a.page_size = page_size;
        a.tokens_per_image = tokens_per_image;
        a.grid_width = grid_width;
        a.num_output_slots = num_output_slots.value();
        return a;
    }

    static void check_values(const AdvanceWindowsArguments& a) {
        for (int64_t window = 0; window <= a.windows; ++window) {
            const int64_t before = window == 0 ? 0 : a.cu_rows[window - 1];
            check_element(kName, "cu_rows", window, a.cu_rows[window], before, window == 0 ? 0 : a.rows,
                          "rows of sampled_ids in order, from 0 on");
        }
        for (int64_t row = 0; row < a.rows; ++row) {
            check_element(kName, "output_slots", row, a.output_slots[row], 0, a.num_output_slots - 1,
                          "the slots of output_ids");
            check_element(kName, "num_generated", row, a.num_generated[row], 0, a.tokens_per_image,
                          "up to tokens_per_image");
        }
    }

    static Work work(const AdvanceWindowsArguments& a) { return {a.windows + 1, 1}; }  // windows, other rows
};

}  // namespace blip3o
