// Row functions of all losses, written once over the vector type V of the including file.
//
// The includer, one rows_<isa>.cpp, defines in an unnamed namespace:
//   W            lanes of a vector
//   V            W floats: V(float), load(p), load_part(p, n, fill), store(p), store_part(p, n),
//                + - * /
//   M            W truth values: ! &
//   fma(a, b, c) = a b + c, fnma(a, b, c) = c - a b; fused where the instruction set is
//   max(a, b)    b where either is NaN
//   lt gt eq     false where either is NaN; ne: true there
//   select(m, a, b) = a where m, else b; where(m, a) = a where m, else 0
//   minus_abs    -|a|
//   pow2(b)      2^k for b = ROUND + k, -126 <= k <= 128
//   split_exponent(u) = {k, m}: u = 2^k m, m in [sqrt(1/2), sqrt(2)), for normal u > 0
//   sum(a), maximum(a), bits(m)
// Everything has internal linkage, and no function of the C++ library is called: the linker could
// otherwise keep the copy that was compiled for the newest processor, for all.
//
// A row is swept in blocks of at most 4 KiB, which stay in the first-level cache: once for the
// maximum, then for what needs it. Sums: see `Sum`. Rows of both models stay in the second-level
// cache between sweeps. Derivations: kernels/README.md. Shapes: V vocabulary.

#ifndef BIDISTILL_ROWS_HPP
#define BIDISTILL_ROWS_HPP

#include <math.h>

#include "elementary.hpp"
#include "kernels.hpp"
#include "select.hpp"

namespace {

using namespace bidistill;

constexpr int64_t BLOCK = 64 * W;
constexpr int64_t GROUP = 8 * W;
// Start of a running maximum. Finite: after a first block that is all -inf, -inf - -inf = NaN
constexpr float LOWEST = -3.4028234663852886e38f;
constexpr float INF = __builtin_inff();

// Whole vectors, and the rest of a row: its missing lanes read as `fill` and are not written.
struct Whole {};
struct Part {
  int64_t n;
};

inline V load(const float* p, Whole, float = 0.0f) { return V::load(p); }
inline V load(const float* p, Part part, float fill = -INF) {
  return V::load_part(p, part.n, fill);
}
inline void store(V value, float* p, Whole) { value.store(p); }
inline void store(V value, float* p, Part part) { value.store_part(p, part.n); }

// body(v, lanes) for the vectors of ids [begin, end)
template <class Body>
inline void sweep(int64_t begin, int64_t end, Body body) {
  int64_t v = begin;
  for (; v + W <= end; v += W) body(v, Whole{});
  if (v < end) body(v, Part{end - v});
}

// A sum over a block: in float over 8 vectors, then over 8 such sums; the caller adds blocks in
// double. One entry often is most of the sum, and each addition to it is a rounding of its size:
// with 256 of them in a row the reverse KL's gradient was off by 1e-5 of its largest entry.
class Sum {
 public:
  void add(V term) { group_ = group_ + term; }
  void end_group() {
    block_ = block_ + group_;
    group_ = V(0.0f);
  }
  double total() const { return static_cast<double>(sum(block_)); }

 private:
  V group_{0.0f}, block_{0.0f};
};

// body(v, lanes) for the vectors of ids [begin, end), with the sums it adds to
template <class Body, class... Sums>
inline void sweep(int64_t begin, int64_t end, Body body, Sums&... sums) {
  for (int64_t v = begin; v < end; v += GROUP) {
    sweep(v, v + GROUP < end ? v + GROUP : end, body);
    (sums.end_group(), ...);
  }
}

// body(begin, end) for the blocks of a row
template <class Body>
inline void blocks(int64_t cols, Body body) {
  for (int64_t v = 0; v < cols; v += BLOCK) body(v, v + BLOCK < cols ? v + BLOCK : cols);
}

inline float* row_of(const bd_model& model, int64_t row) {
  return model.logits + row * model.stride;
}

inline bool is_final(const bd_model& model) {
  return model.bias == nullptr && model.inner == 1.0f && model.outer == 0.0f;
}

// Makes ids [begin, end) of a row final, in place.
inline void finish(const bd_model& model, float* row, int64_t begin, int64_t end) {
  if (is_final(model)) return;
  sweep(begin, end, [&](int64_t v, auto lanes) {
    V s = load(row + v, lanes, 0.0f);
    if (model.bias != nullptr) s = s + load(model.bias + v, lanes, 0.0f);
    s = s * V(model.inner);
    if (model.outer != 0.0f) s = tanh(s) * V(model.outer);
    store(s, row + v, lanes);
  });
}

// Of the soft-cap at final logits
inline V slope(V s, float rate) {
  V u = s * V(rate);
  return (V(1.0f) - u) * (V(1.0f) + u);
}

inline float slope_rate(const bd_model& model) {
  return model.outer == 0.0f ? 0.0f : 1.0f / model.outer;
}

inline float block_maximum(const float* row, int64_t begin, int64_t end) {
  V top(LOWEST);  // drops NaN, which comes back through exp(NaN - top) in the sum
  sweep(begin, end, [&](int64_t v, auto lanes) { top = max(load(row + v, lanes), top); });
  return maximum(top);
}

// Factor of a sum of exponentials whose maximum grows; 0 from where a float would be
inline double shrinkage(float old_top, float new_top) {
  return static_cast<float>(::exp(static_cast<double>(old_top) - static_cast<double>(new_top)));
}

struct Statistics {
  float top = LOWEST;
  double sum = 0.0;  // of exp(s - top)

  float inverse() const { return static_cast<float>(1.0 / sum); }
  float lse() const { return static_cast<float>(static_cast<double>(top) + ::log(sum)); }
};

inline Statistics row_statistics(const bd_model& model, float* row, int64_t cols) {
  Statistics all;
  blocks(cols, [&](int64_t begin, int64_t end) {
    finish(model, row, begin, end);
    float top = block_maximum(row, begin, end);
    if (top > all.top) {
      all.sum *= shrinkage(all.top, top);
      all.top = top;
    }
    Sum total;
    auto add = [&](int64_t v, auto lanes) { total.add(exp(load(row + v, lanes) - V(all.top))); };
    sweep(begin, end, add, total);
    all.sum += total.total();
  });
  return all;
}

// (s - top_s) - (t - top_t), to an ulp of itself where both models nearly agree
struct RelativeGap {
  V base_s, base_t, tops;

  RelativeGap(float top_s, float top_t) : base_s(0.0f), base_t(0.0f), tops(top_s - top_t) {
    // s - t is exact there, s - top_s is not; but s - t near 300 has lost what s - top_s keeps
    if (top_s - top_t > 4.0f || top_t - top_s > 4.0f) {
      base_s = V(top_s);
      base_t = V(top_t);
      tops = V(0.0f);
    }
  }
  V operator()(V s, V t) const { return ((s - base_s) - (t - base_t)) - tops; }
};

struct PairStatistics {
  Statistics s, t;
  double gap = 0.0;  // sum of exp(s - top_s) * ((s - top_s) - (t - top_t))
};

inline PairStatistics pair_statistics(const bd_model& student, const bd_model& teacher,
                                      float* s_row, float* t_row, int64_t cols) {
  PairStatistics all;
  blocks(cols, [&](int64_t begin, int64_t end) {
    finish(student, s_row, begin, end);
    finish(teacher, t_row, begin, end);
    float top_s = block_maximum(s_row, begin, end), top_t = block_maximum(t_row, begin, end);
    top_s = top_s > all.s.top ? top_s : all.s.top;
    top_t = top_t > all.t.top ? top_t : all.t.top;
    if (top_s > all.s.top || top_t > all.t.top) {
      double grown_s = static_cast<double>(top_s) - static_cast<double>(all.s.top);
      double grown_t = static_cast<double>(top_t) - static_cast<double>(all.t.top);
      double shrink = shrinkage(all.s.top, top_s);
      // 0 * inf: an id without probability adds nothing, now or after the maximum has grown
      all.gap = shrink == 0.0 ? 0.0 : (all.gap - (grown_s - grown_t) * all.s.sum) * shrink;
      all.s = {top_s, all.s.sum * shrink};
      all.t = {top_t, all.t.sum * shrinkage(all.t.top, top_t)};
    }
    RelativeGap relative(top_s, top_t);
    Sum sum_s, sum_t, gap;
    auto add = [&](int64_t v, auto lanes) {
      V s = load(s_row + v, lanes), t = load(t_row + v, lanes);
      V e = exp(s - V(top_s));
      sum_s.add(e);
      sum_t.add(exp(t - V(top_t)));
      gap.add(where(ne(e, V(0.0f)), e * relative(s, t)));
    };
    sweep(begin, end, add, sum_s, sum_t, gap);
    all.s.sum += sum_s.total();
    all.t.sum += sum_t.total();
    all.gap += gap.total();
  });
  return all;
}

// Both distributions at some ids, by their larger probability and the decay to the smaller one:
// r = log p_t - log p_s, p_max = max(p_s, p_t), p_min = p_max e^x with x = -|r|. gap is that of
// RelativeGap, r = log(sum_s / sum_t) - gap.
struct Comparison {
  M teacher_larger;
  V gap, x, p_max;
  Decay decayed;

  V p_student() const { return select(teacher_larger, p_max * decayed.e, p_max); }
};

struct Compare {
  RelativeGap relative;
  float log_sums, top_s, top_t, inverse_s, inverse_t;

  explicit Compare(const PairStatistics& all)
      : relative(all.s.top, all.t.top),
        // log of the quotient: a difference of two logarithms near 10 would be off by 1e-6
        log_sums(static_cast<float>(::log(all.s.sum / all.t.sum))),
        top_s(all.s.top),
        top_t(all.t.top),
        inverse_s(all.s.inverse()),
        inverse_t(all.t.inverse()) {}

  Comparison operator()(V s, V t) const {
    // an id that both rule out is absent, r = 0
    M absent = eq(max(s, t), V(-INF)) & eq(s, V(-INF));
    V gap = relative(s, t);
    V r = select(absent, V(0.0f), V(log_sums) - gap);
    M larger = gt(r, V(0.0f));
    V below = select(larger, t, s) - select(larger, V(top_t), V(top_s));
    V p_max = exp(below) * select(larger, V(inverse_t), V(inverse_s));
    V x = minus_abs(r);
    return {larger, gap, x, p_max, decay(x)};
  }
};

// Final logit of one id and the slope there; NaN for an id that does not exist. The row is final.
struct Label {
  int64_t id;  // -1: none
  float logit, slope;

  Label(const bd_model& model, const float* row, int64_t y, int64_t cols)
      : id(y >= 0 && y < cols ? y : -1), logit(id < 0 ? __builtin_nanf("") : row[id]), slope(1.0f) {
    float u = logit * slope_rate(model);
    slope = (1.0f - u) * (1.0f + u);
  }
};

// log(sum) + (top - logit): relative to the row's maximum, logits of 1e4 cost no digits
inline double surprise(const Statistics& all, float logit) {
  return ::log(all.sum) + (static_cast<double>(all.top) - static_cast<double>(logit));
}

template <bool GRADIENT>
inline void bidirectional_kl_row(const BidirectionalKl& job, int64_t row) {
  float *s_row = row_of(job.student, row), *t_row = row_of(job.teacher, row);
  float* g_row = GRADIENT ? job.gradient.data + row * job.gradient.stride : nullptr;
  int64_t rows = job.size.rows, cols = job.size.cols;
  PairStatistics all = pair_statistics(job.student, job.teacher, s_row, t_row, cols);
  Compare compare(all);
  float mean_gap = static_cast<float>(all.gap / all.s.sum);
  Label label(job.student, s_row, job.cross_entropy == 0.0f ? -1 : job.target[row], cols);
  float rate = slope_rate(job.student);
  // a weight of 0 switches a part off even where r is infinite
  M reversed = ne(V(job.reverse), V(0.0f));
  V mean = where(reversed, V(mean_gap));

  double forward_kl = 0.0, reverse_kl = 0.0;
  blocks(cols, [&](int64_t begin, int64_t end) {
    Sum forward_sum, reverse_sum;
    auto add = [&](int64_t v, auto lanes) {
      V s = load(s_row + v, lanes);
      Comparison both = compare(s, load(t_row + v, lanes));
      // p_max R is the term of the mean over the larger side, p_max S that over the smaller;
      // 0 * inf: an id without probability adds nothing
      V p = both.p_max;
      V over_larger = where(ne(p, V(0.0f)), p * both.decayed.remainder);
      V over_smaller = p * both.decayed.square;
      forward_sum.add(select(both.teacher_larger, over_larger, over_smaller));
      reverse_sum.add(select(both.teacher_larger, over_smaller, over_larger));
      if constexpr (GRADIENT) {
        V gap = p * both.decayed.less;  // -|p_t - p_s|
        gap = select(both.teacher_larger, gap, V(0.0f) - gap);
        V p_s = both.p_student();
        // mean_r - r, without the rounding that made them from their gaps
        V pull = where(ne(p_s, V(0.0f)) & reversed, both.gap) - mean;
        pull = fma(V(job.reverse), pull, V(job.cross_entropy));
        V gradient = fma(p_s, pull, V(job.forward) * gap);
        if (rate != 0.0f) gradient = gradient * slope(s, rate);
        store(gradient, g_row + v, lanes);
      }
    };
    sweep(begin, end, add, forward_sum, reverse_sum);
    forward_kl += forward_sum.total();
    reverse_kl += reverse_sum.total();
  });
  if (GRADIENT && label.id >= 0) g_row[label.id] -= job.cross_entropy * label.slope;

  double loss = 0.0;
  if (job.forward != 0.0f) loss += static_cast<double>(job.forward) * forward_kl;
  if (job.reverse != 0.0f) loss += static_cast<double>(job.reverse) * reverse_kl;
  if (job.cross_entropy != 0.0f) {
    loss += static_cast<double>(job.cross_entropy) * surprise(all.s, label.logit);
  }
  job.out[row] = static_cast<float>(loss);
  job.out[rows + row] = all.s.lse();
  job.out[2 * rows + row] = all.t.lse();
  job.out[3 * rows + row] = static_cast<float>(forward_kl);
  job.out[4 * rows + row] = static_cast<float>(reverse_kl);
}

inline void bidirectional_kl(const BidirectionalKl& job, int64_t row) {
  if (job.gradient.data == nullptr) return bidirectional_kl_row<false>(job, row);
  bidirectional_kl_row<true>(job, row);
}

// With F = log(m / p_s) the gradient is (1 - beta) p_s (sum_u p_su F_u - F). The sweep that sums
// leaves p_s and F where gradient and teacher are, and the last one only multiplies: a third of its
// time, were it to compute them again.
template <bool GRADIENT>
inline void jsd_row(const Jsd& job, int64_t row) {
  float *s_row = row_of(job.student, row), *t_row = row_of(job.teacher, row);
  float* g_row = GRADIENT ? job.gradient.data + row * job.gradient.stride : nullptr;
  int64_t rows = job.size.rows, cols = job.size.cols;
  PairStatistics all = pair_statistics(job.student, job.teacher, s_row, t_row, cols);
  Compare compare(all);
  float rate = slope_rate(job.student);
  V beta(job.beta), one_less(job.one_less), both_shares(job.beta * job.one_less);

  double loss = 0.0, total_p = 0.0, total_F = 0.0;
  blocks(cols, [&](int64_t begin, int64_t end) {
    Sum loss_sum, p_sum, F_sum;
    auto add = [&](int64_t v, auto lanes) {
      V s = load(s_row + v, lanes);
      Comparison both = compare(s, load(t_row + v, lanes));
      auto [e, less, remainder, square] = both.decayed;
      V x = both.x;
      // c is the share in m of the smaller of p_s and p_t: m = p_max ((1 - c) + c e)
      V c = select(both.teacher_larger, one_less, beta);
      V rest = select(both.teacher_larger, beta, one_less);
      Log1p log_m = log1p(c * less, fma(c, e, rest));  // log(m / p_max)
      // c e (x - log m) - (1 - c) log m, and the same with c (1 - c) x taken out of both parts,
      // which leaves nothing of order x to cancel
      V low = max(V(EXP_LOWEST), x);
      V term = fma(c * e, low - log_m.value, V(0.0f) - rest * log_m.value);
      V w = log_m.below - c * remainder;
      V tiny = fma(both_shares * x, less, fma(w, c * less, w));
      term = both.p_max * select(gt(x, V(-0.25f)), tiny, term);
      loss_sum.add(term);
      V p_s = both.p_student();
      // 0 * inf: an id without probability adds nothing
      V F = select(both.teacher_larger, log_m.value - x, log_m.value);
      F = where(ne(p_s, V(0.0f)), F);
      F_sum.add(p_s * F);
      p_sum.add(p_s);
      if constexpr (GRADIENT) {
        if (rate != 0.0f) p_s = p_s * slope(s, rate);
        store(p_s, g_row + v, lanes);
        store(F, t_row + v, lanes);
      }
    };
    sweep(begin, end, add, loss_sum, p_sum, F_sum);
    loss += loss_sum.total();
    total_F += F_sum.total();
    total_p += p_sum.total();
  });
  job.out[row] = static_cast<float>(loss);
  job.out[rows + row] = all.s.lse();
  job.out[2 * rows + row] = all.t.lse();
  if constexpr (GRADIENT) {
    // not 1 but 1 + 1e-7, which shows where all F are nearly equal
    V mean(static_cast<float>(total_F / total_p));
    sweep(0, cols, [&](int64_t v, auto lanes) {
      V p_s = load(g_row + v, lanes), F = load(t_row + v, lanes);
      store(one_less * p_s * (mean - F), g_row + v, lanes);
    });
  }
}

inline void jsd(const Jsd& job, int64_t row) {
  if (job.gradient.data == nullptr) return jsd_row<false>(job, row);
  jsd_row<true>(job, row);
}

inline double row_sum(const float* row, int64_t cols) {
  double all = 0.0;
  blocks(cols, [&](int64_t begin, int64_t end) {
    Sum total;
    sweep(begin, end, [&](int64_t v, auto lanes) { total.add(load(row + v, lanes, 0.0f)); }, total);
    all += total.total();
  });
  return all;
}

// Two sweeps: statistics of s and the sum of q, which every entry of the gradient p sum_u q_u - q
// needs; then loss and gradient. 20 bytes an id with a gradient, 16 without: s and q read twice,
// the gradient written once.
template <bool GRADIENT>
inline void kl_to_probs_row(const KlToProbs& job, int64_t row) {
  float* s_row = row_of(job.student, row);
  const float* q_row = row_of(job.probs, row);
  float* g_row = GRADIENT ? job.gradient.data + row * job.gradient.stride : nullptr;
  int64_t cols = job.size.cols;
  Statistics all = row_statistics(job.student, s_row, cols);
  double mass = row_sum(q_row, cols);
  mass += 0.0 * mass;  // an infinite one is NaN, of all ids and not of one
  V top(all.top), log_sum(static_cast<float>(::log(all.sum))), eps(job.eps);
  V p_factor(static_cast<float>(mass / all.sum));
  float rate = slope_rate(job.student);

  // 0, or the NaN of a row whose q are all 0
  double loss = 0.0 * (mass + static_cast<double>(all.inverse()));
  blocks(cols, [&](int64_t begin, int64_t end) {
    Sum loss_sum;
    auto add = [&](int64_t v, auto lanes) {
      V s = load(s_row + v, lanes), q = load(q_row + v, lanes, 0.0f);
      V below = s - top;
      V log_ratio = log(max(q, eps)) - (below - log_sum);
      // 0 * inf: an id without probability adds nothing
      loss_sum.add(where(ne(q, V(0.0f)), q * log_ratio));
      if constexpr (GRADIENT) {
        V gradient = fma(exp(below), p_factor, V(0.0f) - q);
        if (rate != 0.0f) gradient = gradient * slope(s, rate);
        store(gradient, g_row + v, lanes);
      }
    };
    sweep(begin, end, add, loss_sum);
    loss += loss_sum.total();
  });
  job.out[row] = static_cast<float>(loss);
  job.out[job.size.rows + row] = all.lse();
}

inline void kl_to_probs(const KlToProbs& job, int64_t row) {
  if (job.gradient.data == nullptr) return kl_to_probs_row<false>(job, row);
  kl_to_probs_row<true>(job, row);
}

// exp(s - base) * factor * slope over a row
inline void write_softmax(const float* row, float* gradient, int64_t cols, float base, float factor,
                          float rate) {
  sweep(0, cols, [&](int64_t v, auto lanes) {
    V s = load(row + v, lanes);
    V value = exp(s - V(base)) * V(factor);
    // an id that is ruled out has s = -inf, and 0 * inf would be NaN
    if (rate != 0.0f) value = value * where(ne(value, V(0.0f)), slope(s, rate));
    store(value, gradient + v, lanes);
  });
}

inline void cross_entropy(const CrossEntropy& job, int64_t row) {
  float* s_row = row_of(job.student, row);
  Statistics all = row_statistics(job.student, s_row, job.size.cols);
  Label label(job.student, s_row, job.target[row], job.size.cols);
  job.out[row] = static_cast<float>(surprise(all, label.logit));
  job.out[job.size.rows + row] = all.lse();
  if (job.gradient.data == nullptr) return;
  float* g_row = job.gradient.data + row * job.gradient.stride;
  write_softmax(s_row, g_row, job.size.cols, all.top, all.inverse(), slope_rate(job.student));
  if (label.id >= 0) g_row[label.id] -= label.slope;
}

inline void log_sum_exp(const LogSumExp& job, int64_t row) {
  job.out[row] = row_statistics(job.model, row_of(job.model, row), job.size.cols).lse();
}

inline void softmax_gradient(const SoftmaxGradient& job, int64_t row) {
  float *s_row = row_of(job.model, row), *g_row = job.gradient.data + row * job.gradient.stride;
  finish(job.model, s_row, 0, job.size.cols);
  if (job.base[row] == -INF) {  // exp(-inf - -inf) would be NaN
    sweep(0, job.size.cols, [&](int64_t v, auto lanes) { store(V(0.0f), g_row + v, lanes); });
    return;
  }
  write_softmax(s_row, g_row, job.size.cols, job.base[row], job.factor[row], job.slope_rate);
}

inline void transform(const Transform& job, int64_t row) {
  finish(job.model, row_of(job.model, row), 0, job.size.cols);
}

// Of V ids in random order about k log(V / k) are among the k largest so far: a compare a vector
// finds them, and `Selection` keeps the best.
inline void top_ids(const TopIds& job, int64_t row) {
  float* s_row = row_of(job.model, row);
  int64_t cols = job.size.cols;
  if (job.k == 0) return;
  Selection best(job.ids + row * job.k, job.k);
  blocks(cols, [&](int64_t begin, int64_t end) {
    finish(job.model, s_row, begin, end);
    int64_t v = begin;
    for (; v < end && !best.is_full(); ++v) best.add(s_row[v], v);
    sweep(v, end, [&](int64_t at, auto lanes) {
      // NaN is above every floor. Equal to it is too late: the id is higher
      V s = load(s_row + at, lanes), floor(best.floor());
      unsigned hits = bits(!lt(s, floor) & ne(s, floor));
      for (; hits != 0; hits &= hits - 1) {
        int64_t id = at + __builtin_ctz(hits);
        if (id < end) best.add(s_row[id], id);
      }
    });
  });
  best.finish();
}

template <class Function>
inline void map(const float* x, int64_t n, float* out, Function function) {
  sweep(0, n,
        [&](int64_t v, auto lanes) { store(function(load(x + v, lanes, 0.0f)), out + v, lanes); });
}

inline bool same(const char* a, const char* b) {
  while (*a != '\0' && *a == *b) ++a, ++b;
  return *a == *b;
}

inline int elementary(const char* f, const float* x, int64_t n, float* out) {
  if (same(f, "exp")) {
    map(x, n, out, [](V a) { return exp(a); });
  } else if (same(f, "expm1")) {
    map(x, n, out, [](V a) { return decay(a).less; });
  } else if (same(f, "exp_remainder")) {
    map(x, n, out, [](V a) { return decay(a).remainder; });
  } else if (same(f, "log1p")) {
    map(x, n, out, [](V a) { return log1p(a, V(1.0f) + a).value; });
  } else if (same(f, "log")) {
    map(x, n, out, [](V a) { return log(a); });
  } else if (same(f, "tanh")) {
    map(x, n, out, [](V a) { return tanh(a); });
  } else {
    return BD_BAD_NAME;
  }
  return BD_OK;
}

constexpr Kernels TABLE = {bidirectional_kl, jsd,     kl_to_probs, cross_entropy, log_sum_exp,
                           softmax_gradient, top_ids, transform,   elementary};

}  // namespace

#endif  // BIDISTILL_ROWS_HPP
