// AVX-512 F, BW, DQ and VL: 16 lanes, mask registers.

#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int64_t W = 16;

struct M {
  __mmask16 m;
};

struct V {
  __m512 v;

  V(__m512 value) : v(value) {}
  explicit V(float value) : v(_mm512_set1_ps(value)) {}
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load_part(const float* p, int64_t n, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p);
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_part(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
};

inline V operator+(V a, V b) { return _mm512_add_ps(a.v, b.v); }
inline V operator-(V a, V b) { return _mm512_sub_ps(a.v, b.v); }
inline V operator*(V a, V b) { return _mm512_mul_ps(a.v, b.v); }
inline V operator/(V a, V b) { return _mm512_div_ps(a.v, b.v); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
inline V max(V a, V b) { return _mm512_max_ps(a.v, b.v); }

inline M operator!(M a) { return {_knot_mask16(a.m)}; }
inline M operator&(M a, M b) { return {_kand_mask16(a.m, b.m)}; }
inline M lt(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline M gt(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline M eq(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline M ne(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
inline V select(M m, V a, V b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
inline V where(M m, V a) { return _mm512_maskz_mov_ps(m.m, a.v); }
inline unsigned bits(M m) { return m.m; }

inline V minus_abs(V a) { return _mm512_or_ps(a.v, _mm512_set1_ps(-0.0f)); }
inline V pow2(V biased) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased.v), 23));
}

struct Split {
  V k, m;
};
inline Split split_exponent(V u) {
  __m512i bits = _mm512_castps_si512(u.v);
  __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3F3504F3)), 23);
  __m512i m = _mm512_sub_epi32(bits, _mm512_slli_epi32(k, 23));
  return {_mm512_cvtepi32_ps(k), _mm512_castsi512_ps(m)};
}

inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(V a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace

#include "rows.hpp"

const bidistill::Kernels bidistill::avx512_kernels = TABLE;
