// Chooses an instruction set that processor and operating system have; compiled for the oldest one.

#include "dispatch.hpp"

#include <atomic>
#include <cstring>

namespace bidistill {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*is_there)();
};

bool always() { return true; }

// best first
constexpr Isa ISAS[] = {
#if defined(__x86_64__)
    // __builtin_cpu_supports asks the operating system, too, whether it saves the registers
    {"avx512", &avx512_kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &avx2_kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#elif defined(__aarch64__)
    {"neon", &neon_kernels, always},
#endif
    {"scalar", &scalar_kernels, always},
};

const Isa* find(const char* name) {
  for (const Isa& isa : ISAS) {
    if ((name == nullptr || std::strcmp(name, isa.name) == 0) && isa.is_there()) return &isa;
  }
  return nullptr;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{find(nullptr)};
  return isa;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

}  // namespace bidistill

const char* bd_isa(void) { return bidistill::current().load(std::memory_order_relaxed)->name; }

int bd_set_isa(const char* name) {
  const bidistill::Isa* isa = bidistill::find(name);
  if (isa == nullptr) return BD_NO_ISA;
  bidistill::current().store(isa, std::memory_order_relaxed);
  return BD_OK;
}
