// The functions of bidistill.h: arguments are checked, then rows go to threads.

#include <algorithm>

#include "bidistill.h"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace bidistill {
namespace {

struct Call {
  int64_t rows, cols, threads;
  int status = BD_OK;

  Call(int64_t rows_, int64_t cols_, int64_t threads_)
      : rows(rows_), cols(cols_), threads(threads_) {
    refuse_if(rows < 0 || cols < 0 || threads < 1, BD_BAD_SIZE);
  }

  void refuse_if(bool wrong, int why) {
    if (status == BD_OK && wrong) status = why;
  }
  void needs(const void* pointer) { refuse_if(pointer == nullptr && rows > 0, BD_NULL); }
  void needs_rows(const float* data, int64_t stride) {
    refuse_if(data == nullptr && rows > 0 && cols > 0, BD_NULL);
    refuse_if(rows > 1 && stride < cols, BD_BAD_STRIDE);
  }
  void needs_model(const bd_model* model) {
    refuse_if(model == nullptr, BD_NULL);
    if (model != nullptr) needs_rows(model->logits, model->stride);
  }
  void takes_gradient(const float* data, int64_t stride) {
    if (data != nullptr) needs_rows(data, stride);
  }

  // Runs Kernels::*function on all rows of the job.
  template <class Job>
  int run(const Job& job, void (*Kernels::*function)(const Job&, int64_t)) const {
    struct Bound {
      const Job& job;
      void (*function)(const Job&, int64_t);
    };
    const Bound bound{job, kernels().*function};
    for_each_row(
        rows, cols, threads,
        [](const void* context, int64_t row) {
          const Bound& work = *static_cast<const Bound*>(context);
          work.function(work.job, row);
        },
        &bound);
    return BD_OK;
  }
};

}  // namespace
}  // namespace bidistill

using namespace bidistill;

const char* bd_version(void) { return BD_VERSION; }

int bd_transform_f32(const bd_model* model, int64_t rows, int64_t cols, int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(model);
  if (call.status != BD_OK) return call.status;
  return call.run(Transform{{rows, cols}, *model}, &Kernels::transform);
}

int bd_bidirectional_kl_f32(const bd_model* student, const bd_model* teacher, const int64_t* target,
                            int64_t rows, int64_t cols, float forward, float reverse,
                            float cross_entropy, float* gradient, int64_t gradient_stride,
                            float* out, int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(student);
  call.needs_model(teacher);
  if (cross_entropy != 0.0f) call.needs(target);
  call.takes_gradient(gradient, gradient_stride);
  call.needs(out);
  if (call.status != BD_OK) return call.status;
  const BidirectionalKl job{{rows, cols}, *student, *teacher,      target,
                            forward,      reverse,  cross_entropy, {gradient, gradient_stride},
                            out};
  return call.run(job, &Kernels::bidirectional_kl);
}

int bd_jsd_f32(const bd_model* student, const bd_model* teacher, int64_t rows, int64_t cols,
               double beta, float* gradient, int64_t gradient_stride, float* out, int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(student);
  call.needs_model(teacher);
  call.takes_gradient(gradient, gradient_stride);
  call.needs(out);
  if (call.status != BD_OK) return call.status;
  const float share = static_cast<float>(beta), one_less = static_cast<float>(1.0 - beta);
  const Jsd job{{rows, cols}, *student, *teacher, share, one_less, {gradient, gradient_stride},
                out};
  return call.run(job, &Kernels::jsd);
}

int bd_kl_to_probs_f32(const bd_model* student, const bd_model* probs, int64_t rows, int64_t cols,
                       float eps, float* gradient, int64_t gradient_stride, float* out,
                       int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(student);
  call.needs_model(probs);
  call.takes_gradient(gradient, gradient_stride);
  call.needs(out);
  if (call.status != BD_OK) return call.status;
  const KlToProbs job{{rows, cols}, *student, *probs, eps, {gradient, gradient_stride}, out};
  return call.run(job, &Kernels::kl_to_probs);
}

int bd_cross_entropy_f32(const bd_model* student, const int64_t* target, int64_t rows, int64_t cols,
                         float* gradient, int64_t gradient_stride, float* out, int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(student);
  call.needs(target);
  call.takes_gradient(gradient, gradient_stride);
  call.needs(out);
  if (call.status != BD_OK) return call.status;
  const CrossEntropy job{{rows, cols}, *student, target, {gradient, gradient_stride}, out};
  return call.run(job, &Kernels::cross_entropy);
}

int bd_log_sum_exp_f32(const bd_model* model, int64_t rows, int64_t cols, float* out,
                       int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(model);
  call.needs(out);
  if (call.status != BD_OK) return call.status;
  return call.run(LogSumExp{{rows, cols}, *model, out}, &Kernels::log_sum_exp);
}

int bd_softmax_gradient_f32(const bd_model* model, const float* base, const float* factor,
                            float slope_rate, int64_t rows, int64_t cols, float* gradient,
                            int64_t gradient_stride, int64_t threads) {
  Call call(rows, cols, threads);
  call.needs_model(model);
  call.needs(base);
  call.needs(factor);
  call.needs_rows(gradient, gradient_stride);
  if (call.status != BD_OK) return call.status;
  const SoftmaxGradient job{{rows, cols}, *model,     base,
                            factor,       slope_rate, {gradient, gradient_stride}};
  return call.run(job, &Kernels::softmax_gradient);
}

int bd_top_ids_f32(const bd_model* model, int64_t rows, int64_t cols, int64_t k, int64_t* ids,
                   int64_t threads) {
  Call call(rows, cols, threads);
  // ids share 64 bits with their logit
  call.refuse_if(k < 0 || k > cols || cols > INT64_C(0x7FFFFFFF), BD_BAD_SIZE);
  call.needs_model(model);
  if (k > 0) call.needs(ids);
  if (call.status != BD_OK) return call.status;
  return call.run(TopIds{{rows, cols}, *model, k, ids}, &Kernels::top_ids);
}

int bd_elementary_f32(const char* f, const float* x, int64_t n, float* out) {
  if (n < 0) return BD_BAD_SIZE;
  if (f == nullptr || ((x == nullptr || out == nullptr) && n > 0)) return BD_NULL;
  return kernels().elementary(f, x, n, out);
}
