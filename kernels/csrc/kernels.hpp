// What a translation unit of one instruction set offers, and what its row functions are given.

#ifndef BIDISTILL_KERNELS_HPP
#define BIDISTILL_KERNELS_HPP

#include "bidistill.h"

namespace bidistill {

struct Rows {
  int64_t rows, cols;
};

struct Gradient {
  float* data;  // (rows, cols) or null
  int64_t stride;
};

struct BidirectionalKl {
  Rows size;
  bd_model student, teacher;
  const int64_t* target;  // (rows,)
  float forward, reverse, cross_entropy;
  Gradient gradient;
  float* out;  // (5, rows)
};

struct Jsd {
  Rows size;
  bd_model student, teacher;
  float beta, one_less;  // 1 - beta in double, then rounded: it is not 1 where beta is tiny
  Gradient gradient;
  float* out;  // (3, rows)
};

struct KlToProbs {
  Rows size;
  bd_model student, probs;
  float eps;
  Gradient gradient;
  float* out;  // (2, rows)
};

struct CrossEntropy {
  Rows size;
  bd_model student;
  const int64_t* target;  // (rows,)
  Gradient gradient;
  float* out;  // (2, rows)
};

struct LogSumExp {
  Rows size;
  bd_model model;
  float* out;  // (rows,)
};

struct SoftmaxGradient {
  Rows size;
  bd_model model;
  const float *base, *factor;  // (rows,)
  float slope_rate;
  Gradient gradient;
};

struct TopIds {
  Rows size;
  bd_model model;
  int64_t k;
  int64_t* ids;  // (rows, k)
};

struct Transform {
  Rows size;
  bd_model model;
};

// Each computes one row.
struct Kernels {
  void (*bidirectional_kl)(const BidirectionalKl&, int64_t row);
  void (*jsd)(const Jsd&, int64_t row);
  void (*kl_to_probs)(const KlToProbs&, int64_t row);
  void (*cross_entropy)(const CrossEntropy&, int64_t row);
  void (*log_sum_exp)(const LogSumExp&, int64_t row);
  void (*softmax_gradient)(const SoftmaxGradient&, int64_t row);
  void (*top_ids)(const TopIds&, int64_t row);
  void (*transform)(const Transform&, int64_t row);
  int (*elementary)(const char* f, const float* x, int64_t n, float* out);
};

// The rows_*.cpp of this platform; only a processor that has the instructions may call into them.
extern const Kernels scalar_kernels, avx2_kernels, avx512_kernels, neon_kernels;

}  // namespace bidistill

#endif  // BIDISTILL_KERNELS_HPP
