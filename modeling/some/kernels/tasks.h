// What the kernels of the experts share: routed rows as the caller has them, their division into tasks, and scratch memory.
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

struct Rows {  // as the caller has it; row_of (T, K): the row of each of a token's experts, or -1
    const int64_t *tokens, *row_of, *of_expert;
    int64_t experts, R, T, K;
};

struct Task {  // rows of one expert
    int64_t expert, first, rows;
};

// Tasks of at most `most` rows, fewer where threads would otherwise wait for each other; sizes are multiples of `multiple`
// but for an expert's last, and as equal as that allows.
inline std::vector<Task> make_tasks(const Rows& rows, int64_t most, int64_t multiple) {
    constexpr int64_t FEWEST = 32;
    const int64_t share = rows.R / (8 * int64_t(omp_get_max_threads()));
    most = std::clamp(share / FEWEST * FEWEST, FEWEST, most);
    std::vector<Task> tasks;
    int64_t first = 0;
    for (int64_t expert = 0; expert < rows.experts; ++expert) {
        const int64_t end = first + rows.of_expert[expert];
        const int64_t parts = (end - first + most - 1) / most;
        for (int64_t left = parts; left > 0; --left) {
            const int64_t even = (end - first + left - 1) / left;
            const int64_t size = std::min(end - first, (even + multiple - 1) / multiple * multiple);
            if (size > 0) tasks.push_back({expert, first, size});
            first += size;
        }
    }
    return tasks;
}

constexpr int64_t HUGE_PAGE = 2 << 20;

// Ask for huge pages in memory that is not yet touched: one fault instead of 512.
inline void ask_huge_pages(void* memory, int64_t bytes) {
    const uintptr_t first = (uintptr_t(memory) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t end = (uintptr_t(memory) + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

// Memory that lives as long as its thread, so that its pages are touched once.
class Scratch {
  public:
    ~Scratch() { std::free(memory); }
    template <typename Value>
    Value* get(int64_t values) {
        const int64_t bytes = (values * int64_t(sizeof(Value)) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        if (bytes > size) {
            std::free(memory);
            memory = std::aligned_alloc(HUGE_PAGE, bytes);
            if (memory == nullptr) std::abort();
            ask_huge_pages(memory, bytes);
            size = bytes;
        }
        return static_cast<Value*>(memory);
    }

  private:
    void* memory = nullptr;
    int64_t size = 0;
};
