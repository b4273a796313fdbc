// For every processor: 4 lanes in the vector type of GCC and Clang, which they turn into what the
// oldest processor of the platform has, or into scalar code. Products and sums stay apart
// (-ffp-contract=off): the same bits on every platform.

#include <stdint.h>
#include <string.h>

namespace {

constexpr int64_t W = 4;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint32_t Uints __attribute__((vector_size(16)));

inline Ints as_ints(Floats v) { return reinterpret_cast<Ints>(v); }
inline Floats as_floats(Ints v) { return reinterpret_cast<Floats>(v); }

struct M {
  Ints m;  // all bits of a lane
};

struct V {
  Floats v;

  V(Floats value) : v(value) {}
  explicit V(float value) : v{value, value, value, value} {}
  static V load(const float* p) {
    Floats out;
    memcpy(&out, p, sizeof out);
    return out;
  }
  static V load_part(const float* p, int64_t n, float fill) {
    Floats out{fill, fill, fill, fill};
    for (int64_t i = 0; i < n; ++i) out[i] = p[i];
    return out;
  }
  void store(float* p) const { memcpy(p, &v, sizeof v); }
  void store_part(float* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
};

inline V operator+(V a, V b) { return a.v + b.v; }
inline V operator-(V a, V b) { return a.v - b.v; }
inline V operator*(V a, V b) { return a.v * b.v; }
inline V operator/(V a, V b) { return a.v / b.v; }
inline V fma(V a, V b, V c) { return a.v * b.v + c.v; }
inline V fnma(V a, V b, V c) { return c.v - a.v * b.v; }

inline M operator!(M a) { return {~a.m}; }
inline M operator&(M a, M b) { return {a.m & b.m}; }
inline M lt(V a, V b) { return {a.v < b.v}; }
inline M gt(V a, V b) { return {a.v > b.v}; }
inline M eq(V a, V b) { return {a.v == b.v}; }
inline M ne(V a, V b) { return {a.v != b.v}; }
inline V select(M m, V a, V b) { return as_floats((m.m & as_ints(a.v)) | (~m.m & as_ints(b.v))); }
inline V where(M m, V a) { return as_floats(m.m & as_ints(a.v)); }
inline unsigned bits(M m) {
  unsigned out = 0;
  for (int64_t i = 0; i < W; ++i) out |= (m.m[i] != 0 ? 1u : 0u) << i;
  return out;
}
inline V max(V a, V b) { return select(gt(a, b), a, b); }

inline V minus_abs(V a) { return as_floats(as_ints(a.v) | INT32_MIN); }
// bits that are shifted out of a signed number would be undefined
inline Ints shift_left(Ints v) { return reinterpret_cast<Ints>(reinterpret_cast<Uints>(v) << 23); }
inline V pow2(V biased) { return as_floats(shift_left(as_ints(biased.v))); }

struct Split {
  V k, m;
};
inline Split split_exponent(V u) {
  Ints k = (as_ints(u.v) - 0x3F3504F3) >> 23;
  return {__builtin_convertvector(k, Floats), as_floats(as_ints(u.v) - shift_left(k))};
}

inline float sum(V a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float maximum(V a) {
  float out = a.v[0];
  for (int64_t i = 1; i < W; ++i) out = a.v[i] > out ? a.v[i] : out;
  return out;
}

}  // namespace

#include "rows.hpp"

const bidistill::Kernels bidistill::scalar_kernels = TABLE;
