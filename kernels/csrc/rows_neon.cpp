// NEON of AArch64: 4 lanes.

#include <arm_neon.h>
#include <stdint.h>

namespace {

constexpr int64_t W = 4;

struct M {
  uint32x4_t m;  // all bits of a lane
};

struct V {
  float32x4_t v;

  V(float32x4_t value) : v(value) {}
  explicit V(float value) : v(vdupq_n_f32(value)) {}
  static V load(const float* p) { return vld1q_f32(p); }
  static V load_part(const float* p, int64_t n, float fill) {
    float lanes[4] = {fill, fill, fill, fill};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return vld1q_f32(lanes);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_part(float* p, int64_t n) const {
    float lanes[4];
    vst1q_f32(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
};

inline V operator+(V a, V b) { return vaddq_f32(a.v, b.v); }
inline V operator-(V a, V b) { return vsubq_f32(a.v, b.v); }
inline V operator*(V a, V b) { return vmulq_f32(a.v, b.v); }
inline V operator/(V a, V b) { return vdivq_f32(a.v, b.v); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c.v, a.v, b.v); }
inline V fnma(V a, V b, V c) { return vfmsq_f32(c.v, a.v, b.v); }

inline M operator!(M a) { return {vmvnq_u32(a.m)}; }
inline M operator&(M a, M b) { return {vandq_u32(a.m, b.m)}; }
inline M lt(V a, V b) { return {vcltq_f32(a.v, b.v)}; }
inline M gt(V a, V b) { return {vcgtq_f32(a.v, b.v)}; }
inline M eq(V a, V b) { return {vceqq_f32(a.v, b.v)}; }
inline M ne(V a, V b) { return !eq(a, b); }
inline V select(M m, V a, V b) { return vbslq_f32(m.m, a.v, b.v); }
inline V where(M m, V a) {
  return vreinterpretq_f32_u32(vandq_u32(m.m, vreinterpretq_u32_f32(a.v)));
}
inline unsigned bits(M m) {
  constexpr uint32_t weight[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m.m, vld1q_u32(weight)));
}
// not vmaxq_f32, which gives NaN where only a is one
inline V max(V a, V b) { return select(gt(a, b), a, b); }

inline V minus_abs(V a) { return vnegq_f32(vabsq_f32(a.v)); }
inline V pow2(V biased) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(biased.v), 23));
}

struct Split {
  V k, m;
};
inline Split split_exponent(V u) {
  int32x4_t bits = vreinterpretq_s32_f32(u.v);
  int32x4_t k = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3F3504F3)), 23);
  int32x4_t m = vsubq_s32(bits, vshlq_n_s32(k, 23));
  return {vcvtq_f32_s32(k), vreinterpretq_f32_s32(m)};
}

inline float sum(V a) { return vaddvq_f32(a.v); }
inline float maximum(V a) { return vmaxvq_f32(a.v); }

}  // namespace

#include "rows.hpp"

const bidistill::Kernels bidistill::neon_kernels = TABLE;
