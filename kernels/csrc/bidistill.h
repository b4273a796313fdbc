// C interface of the native kernels: raw pointers, int64 sizes and strides in elements, error
// codes.
//
// Row functions take `rows` rows of `cols` logits. Columns lie side by side; rows lie `stride`
// apart, at least `cols` where there are two of them. A row is computed by one thread, and by the
// same instructions wherever it lies: results do not depend on `threads`.
//
// A function returns BD_OK, or why it touched nothing. It throws nothing, keeps nothing and frees
// nothing of the caller's; what is written may not overlap anything else, except as said.
// Divergences are in nats; "final" logits have gone through the transform of `bd_model`. NaN of an
// input shows in every result of its row. Probabilities below 2^-126 of the largest one count as 0.

#ifndef BIDISTILL_H
#define BIDISTILL_H

#include <stdint.h>

#define BD_API extern "C" __attribute__((visibility("default")))

enum bd_status {
  BD_OK = 0,
  BD_BAD_SIZE = 1,    // rows, cols, k or n is negative, k above cols, or threads below 1
  BD_BAD_STRIDE = 2,  // rows overlap
  BD_NULL = 3,        // a pointer is missing
  BD_NO_ISA = 4,      // the processor, or this library, does not have this instruction set
  BD_BAD_NAME = 5,    // there is no such function
};

// The logits of one model: final = outer * tanh(inner * (raw + bias)), or inner * (raw + bias)
// where outer is 0. Functions make the rows final in place, so they are called with inner = 1,
// outer = 0 and no bias afterwards.
typedef struct {
  float* logits;  // (rows, cols)
  int64_t stride;
  const float* bias;  // (cols,) or null
  float inner;
  float outer;
} bd_model;

// Version of the library, the same as that of the Python package it was built with.
BD_API const char* bd_version(void);

// Name of the instruction set in use: "scalar", "avx2", "avx512" or "neon".
BD_API const char* bd_isa(void);

// Use this one from now on, in all threads; null for the best one. Calls in progress keep theirs.
BD_API int bd_set_isa(const char* name);

// Make the rows final in place.
BD_API int bd_transform_f32(const bd_model* model, int64_t rows, int64_t cols, int64_t threads);

// forward * KL(p_t || p_s) + reverse * KL(p_s || p_t) + cross_entropy * -log p_s[target].
// target: (rows,), read if cross_entropy is not 0; an id that does not exist gives a NaN.
// gradient: (rows, cols) with respect to the student's raw logits, but for the constant inner
// (times outer); null for none. It may be the student's logits, of the same stride. out: (5, rows):
// loss, log-sum-exp of student and teacher, KL(p_t || p_s), KL(p_s || p_t). A part of weight 0 adds
// nothing, even where it is infinite.
BD_API int bd_bidirectional_kl_f32(const bd_model* student, const bd_model* teacher,
                                   const int64_t* target, int64_t rows, int64_t cols, float forward,
                                   float reverse, float cross_entropy, float* gradient,
                                   int64_t gradient_stride, float* out, int64_t threads);

// Jensen-Shannon divergence, m = beta * p_t + (1 - beta) * p_s. Arguments as above; out: (3, rows):
// loss, log-sum-exps. With a gradient the teacher's logits are overwritten.
BD_API int bd_jsd_f32(const bd_model* student, const bd_model* teacher, int64_t rows, int64_t cols,
                      double beta, float* gradient, int64_t gradient_stride, float* out,
                      int64_t threads);

// sum_v q_v (log max(q_v, eps) - log p_sv), q: the logits of `probs`, as they are: its transform is
// not applied, nothing is renormalised. q = 0 adds nothing, an infinite q counts as NaN. out: (2,
// rows): loss, log-sum-exp of the student.
BD_API int bd_kl_to_probs_f32(const bd_model* student, const bd_model* probs, int64_t rows,
                              int64_t cols, float eps, float* gradient, int64_t gradient_stride,
                              float* out, int64_t threads);

// -log p_s[target]; out: (2, rows): loss, log-sum-exp.
BD_API int bd_cross_entropy_f32(const bd_model* student, const int64_t* target, int64_t rows,
                                int64_t cols, float* gradient, int64_t gradient_stride, float* out,
                                int64_t threads);

// out[n] = log sum_v exp(s_nv). A row of -inf, or of no columns, gives -inf.
BD_API int bd_log_sum_exp_f32(const bd_model* model, int64_t rows, int64_t cols, float* out,
                              int64_t threads);

// gradient_nv = exp(s_nv - base_n) * factor_n * (1 - (slope_rate * s_nv)^2); 0 where base_n is
// -inf.
BD_API int bd_softmax_gradient_f32(const bd_model* model, const float* base, const float* factor,
                                   float slope_rate, int64_t rows, int64_t cols, float* gradient,
                                   int64_t gradient_stride, int64_t threads);

// ids: (rows, k), of the largest final logits, best first; the lowest id first on ties, NaN counts
// as the largest, -0 equals +0.
BD_API int bd_top_ids_f32(const bd_model* model, int64_t rows, int64_t cols, int64_t k,
                          int64_t* ids, int64_t threads);

// out[i] = f(x[i]) by the instruction set in use, for tests of its error. f: "exp" (x <= 88),
// "expm1" and "exp_remainder" e^x - 1 - x (x <= 0), "log1p" (-1 < x <= 0), "log"
// (x >= 2^-126), "tanh".
BD_API int bd_elementary_f32(const char* f, const float* x, int64_t n, float* out);

#endif  // BIDISTILL_H
