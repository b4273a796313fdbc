// Which threads: those of the OpenMP runtime that the process has, PyTorch's, if there is one.
//
// Linking an OpenMP runtime would be wrong twice. A wheel of PyTorch brings its own under a name of
// its own, so a library that needs libgomp.so.1 does not load where the system has none. And where
// it does, or with threads of our own, there are two teams: after a product of matrices PyTorch's
// workers go on spinning for milliseconds on the cores that ours need, and take half of them away.
// So GOMP_parallel, part of the ABI of GNU's runtime and offered by LLVM's and Intel's as well, is
// looked up when first needed; PyTorch loads its runtime with global visibility. The team is warm
// then, and is the one whose size torch.set_num_threads means. Without it threads are started.

#include "parallel.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace bidistill {
namespace {

// Elements a thread takes at a time, at least: 10 us or more against 1 us to take them
constexpr int64_t GRAIN = 8192;

struct Loop {
  void (*work)(const void*, int64_t);
  const void* context;
  int64_t rows;
  int64_t step;
  std::atomic<int64_t> next;
};

void run(void* argument) {
  Loop& loop = *static_cast<Loop*>(argument);
  for (;;) {
    int64_t begin = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
    if (begin >= loop.rows) return;
    int64_t end = std::min(begin + loop.step, loop.rows);
    for (int64_t row = begin; row < end; ++row) loop.work(loop.context, row);
  }
}

using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Team find_team() { return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

void run_on_new_threads(Loop& loop, int64_t threads) {
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(run, &loop);
  } catch (const std::exception&) {
    // the system gives no more threads: these do
  }
  run(&loop);
  for (std::thread& other : others) other.join();
}

}  // namespace

void for_each_row(int64_t rows, int64_t cols, int64_t threads,
                  void (*work)(const void* context, int64_t row), const void* context) {
  int64_t step = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, cols));
  Loop loop{work, context, rows, step, {0}};
  threads = std::min(threads, (rows + step - 1) / step);
  if (threads <= 1) return run(&loop);
  static const Team team = find_team();
  if (team != nullptr) return team(run, &loop, static_cast<unsigned>(threads), 0);
  run_on_new_threads(loop, threads);
}

}  // namespace bidistill
