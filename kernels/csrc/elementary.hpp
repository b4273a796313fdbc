// Elementary functions over the vector type V of the including file (see rows.hpp for its
// contract).
//
// Polynomials are minimax fits in float64, rounded to float32. Errors are over all float32 of the
// range, measured by tests/kernels/native/test_elementary.py for each instruction set.

#ifndef BIDISTILL_ELEMENTARY_HPP
#define BIDISTILL_ELEMENTARY_HPP

namespace {

constexpr float LOG2_E = 1.44269504f;
// ln 2 in two parts; the first has 10 bits, so its product with a whole number below 2^14 is exact
// with and without fused multiply-add
constexpr float LN2_HIGH = 0.693359375f;
constexpr float LN2_LOW = -2.12194440e-4f;
// Added to |k| < 2^22 it leaves k in the low bits, rounded to a whole number, and plus the bias of
// an exponent
constexpr float ROUND = 12582912.0f + 127.0f;
// below it e^x < 2^-126: 0 here, in every instruction set
constexpr float EXP_LOWEST = -87.33654f;

// x = k ln 2 + f, |f| <= ln 2 / 2
struct Reduced {
  V biased;  // ROUND + k
  V k;
  V f;
};

inline Reduced reduce(V x) {
  V biased = fma(x, V(LOG2_E), V(ROUND));
  V k = biased - V(ROUND);
  V f = fnma(k, V(LN2_HIGH), x);
  return {biased, k, fnma(k, V(LN2_LOW), f)};
}

// e^x for x <= 88, within 1.25 ulp; 0 below EXP_LOWEST, NaN for NaN
inline V exp(V x) {
  auto [biased, k, f] = reduce(x);
  V y = fma(V(0.0013814561534672976f), f, V(0.00836873147636652f));
  y = fma(y, f, V(0.04166838899254799f));
  y = fma(y, f, V(0.1666652113199234f));
  y = fma(y, f, V(0.4999999403953552f));
  y = fma(y, f, V(1.0f));
  y = fma(y, f, V(1.0f));
  return where(!lt(x, V(EXP_LOWEST)), y * pow2(biased));
}

// What the losses need of e^x, x <= 0, without cancellation however small x is
struct Decay {
  V e;          // e^x, 0 below EXP_LOWEST
  V less;       // e^x - 1
  V remainder;  // e^x - 1 - x, infinite at -inf
  V square;     // (e^x) x - (e^x - 1), about x^2 / 2 near 0, 1 at -inf
};

inline Decay decay(V x) {
  V low = max(V(EXP_LOWEST), x);  // finite, or NaN
  auto [biased, k, f] = reduce(low);
  V y = fma(V(0.00019857811275869608f), f, V(0.0013933625305071473f));
  y = fma(y, f, V(0.008333360776305199f));
  y = fma(y, f, V(0.04166646674275398f));
  y = fma(y, f, V(0.1666666716337204f));
  y = fma(y, f, V(0.5f));
  V bend = f * f * y;  // e^f - 1 - f
  V p = f + bend;
  V scale = pow2(biased);
  V e = where(!lt(x, V(EXP_LOWEST)), fma(scale, p, scale));
  V less = fma(scale, p, scale - V(1.0f));
  M near = eq(k, V(0.0f));
  V remainder = select(near, bend, less - x);
  // x less - remainder is the same, and keeps its digits where e x and e - 1 are nearly equal
  V square = select(near, x * less - bend, e * low - less);
  return {e, less, remainder, square};
}

struct Log1p {
  V value;  // log(1 + x)
  V below;  // x - log(1 + x), without cancellation, for u in [sqrt(1/2), sqrt(2))
};

// log(u), u = 1 + x > 0 is rounded but x is not
inline Log1p log1p(V x, V u) {
  // u = 2^k m, m in [sqrt(1/2), sqrt(2))
  auto [k, m] = split_exponent(u);
  // near 1 the digits of x that u lost are all there is
  V f = select(eq(k, V(0.0f)), x, m - V(1.0f));
  V y = fma(V(0.07408660650253296f), f, V(-0.11381197720766068f));
  y = fma(y, f, V(0.11495513468980789f));
  y = fma(y, f, V(-0.12434142827987671f));
  y = fma(y, f, V(0.14267249405384064f));
  y = fma(y, f, V(-0.1666756421327591f));
  y = fma(y, f, V(0.20000264048576355f));
  y = fma(y, f, V(-0.2499999701976776f));
  y = fma(y, f, V(0.3333333134651184f));
  V below = f * f * (V(0.5f) - f * y);
  V value = fma(k, V(0.6931471805599453f), f - below);
  return {select(ne(u, u), u, value), below};  // the bits of a NaN would give a number
}

// log(u) for normal u > 0, within 2.75 ulp; from 0 to 2^-126 some number below -87
inline V log(V u) { return log1p(u - V(1.0f), u).value; }

inline V tanh(V x) {
  V square = x * x;
  V y = fma(V(-0.006083428859710693f), square, V(0.021024037152528763f));
  y = fma(y, square, V(-0.05387246981263161f));
  y = fma(y, square, V(0.13333141803741455f));
  y = fma(y, square, V(-0.3333333134651184f));
  V small = fma(x * square, y, x);
  // from 0.625 on the subtraction costs less than the polynomial would
  V e = exp(V(2.0f) * minus_abs(x));
  V large = (V(1.0f) - e) / (V(1.0f) + e);
  large = select(lt(x, V(0.0f)), V(0.0f) - large, large);
  return select(gt(minus_abs(x), V(-0.625f)), small, large);
}

}  // namespace

#endif  // BIDISTILL_ELEMENTARY_HPP
