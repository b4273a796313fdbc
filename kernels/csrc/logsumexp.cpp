// Row log-sum-exp in the obvious way: the maximum first, then the sum of exp(x - maximum), which
// cannot overflow.

#include <cmath>
#include <limits>

#include "bidistill.h"

namespace {

float row_logsumexp(const float* x, int64_t cols) {
  float maximum = -std::numeric_limits<float>::infinity();
  for (int64_t v = 0; v < cols; ++v) {
    if (std::isnan(x[v])) return x[v];
    if (x[v] > maximum) maximum = x[v];
  }
  if (std::isinf(maximum)) return maximum;  // inf - inf below would be NaN
  double sum = 0.0;
  for (int64_t v = 0; v < cols; ++v) {
    sum += std::exp(static_cast<double>(x[v]) - static_cast<double>(maximum));
  }
  return static_cast<float>(static_cast<double>(maximum) + std::log(sum));
}

}  // namespace

const char* bd_version(void) { return BD_VERSION; }

int bd_logsumexp_f32(const float* x, int64_t rows, int64_t cols, int64_t stride, float* out) {
  if (rows < 0 || cols < 0) return BD_BAD_SIZE;
  for (int64_t n = 0; n < rows; ++n) out[n] = row_logsumexp(x + n * stride, cols);
  return 0;
}
