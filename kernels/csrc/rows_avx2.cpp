// AVX2 and FMA: 8 lanes.

#include <immintrin.h>
#include <stdint.h>

namespace {

constexpr int64_t W = 8;

struct M {
  __m256 m;  // all bits of a lane
};

struct V {
  __m256 v;

  V(__m256 value) : v(value) {}
  explicit V(float value) : v(_mm256_set1_ps(value)) {}
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_part(const float* p, int64_t n, float fill) {
    __m256i mask = first(n);
    __m256 value = _mm256_maskload_ps(p, mask);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), value, _mm256_castsi256_ps(mask));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_part(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

inline V operator+(V a, V b) { return _mm256_add_ps(a.v, b.v); }
inline V operator-(V a, V b) { return _mm256_sub_ps(a.v, b.v); }
inline V operator*(V a, V b) { return _mm256_mul_ps(a.v, b.v); }
inline V operator/(V a, V b) { return _mm256_div_ps(a.v, b.v); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
inline V max(V a, V b) { return _mm256_max_ps(a.v, b.v); }

inline M operator!(M a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
inline M operator&(M a, M b) { return {_mm256_and_ps(a.m, b.m)}; }
inline M lt(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline M gt(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline M eq(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline M ne(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
inline V select(M m, V a, V b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
inline V where(M m, V a) { return _mm256_and_ps(m.m, a.v); }
inline unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m.m)); }

inline V minus_abs(V a) { return _mm256_or_ps(a.v, _mm256_set1_ps(-0.0f)); }
inline V pow2(V biased) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased.v), 23));
}

struct Split {
  V k, m;
};
inline Split split_exponent(V u) {
  __m256i bits = _mm256_castps_si256(u.v);
  __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F3504F3)), 23);
  __m256i m = _mm256_sub_epi32(bits, _mm256_slli_epi32(k, 23));
  return {_mm256_cvtepi32_ps(k), _mm256_castsi256_ps(m)};
}

inline float sum(V a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float maximum(V a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

}  // namespace

#include "rows.hpp"

const bidistill::Kernels bidistill::avx2_kernels = TABLE;
