// Rows over threads.

#ifndef BIDISTILL_PARALLEL_HPP
#define BIDISTILL_PARALLEL_HPP

#include <cstdint>

namespace bidistill {

// Calls work(context, row) for every row below `rows`, each by one of at most `threads` threads.
void for_each_row(int64_t rows, int64_t cols, int64_t threads,
                  void (*work)(const void* context, int64_t row), const void* context);

}  // namespace bidistill

#endif  // BIDISTILL_PARALLEL_HPP
