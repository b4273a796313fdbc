"""Device functions that the dense kernels share: logits, accurate elementary functions, statistics.

A model reaches a device function as the tuple (row pointer, bias pointer, has_bias, inner, outer)
of `launch.TritonLogits.arguments`: s = outer * tanh(inner * (raw + bias)), or s = inner * (raw +
bias) where there is no soft-cap, written as outer = 0.

What a kernel may trust, from the PTX of Triton 3.6 and 3.9 (the same on both):

* `tl.exp(x)` is ex2.approx(x * log2 e): relative error 2^-22 of the instruction, plus |x| 2^-24 of
  the rounded product. A softmax entry is off by 1e-6 at s - max = -13. Its errors in p_s and p_t
  are independent, so p_t - p_s has no digit left where the models agree to 1e-6: small
  differences of logits go through `exp_remainder`, never through a difference of two exponentials.
* `tl.log` is the full libdevice logarithm, 1 ulp also near 1, with a branch in it: once a row.
  `log1p` below has no branch and is for elements.
* a / b is div.full.f32, 2 ulp.
* max.f32 drops a NaN. It comes back through exp(NaN - max) in the sum, hence in 1 / sum.

Polynomials are minimax fits in float64, rounded to float32; their errors were measured in float32
against 40 digits. Shapes: C rows of a chunk, V vocabulary.
"""

import triton
import triton.language as tl

# Start of a running maximum. Finite: after a first block that is all -inf, -inf - -inf = NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp_remainder(x):
    """(e^x - 1 - x) / x^2 for |x| <= 1, relative error 1.2e-7: e^x - 1 without cancellation."""
    y = 2.7625685561361024e-06 * x + 2.519373629183974e-05
    y = y * x + 0.00019843112386297435
    y = y * x + 0.0013887740205973387
    y = y * x + 0.00833333283662796
    y = y * x + 0.0416666679084301
    y = y * x + 0.1666666716337204
    return y * x + 0.5


@triton.jit
def log1p(x, u):
    """log(u) where u = 1 + x > 0 is rounded but x is not; relative error 2.1e-7 at any x.

    Also returns x - log1p(x), without cancellation, where u is in [sqrt(1/2), sqrt(2)).
    """
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^k m with m in [sqrt(1/2), sqrt(2)), whose bit pattern starts at 0x3f3504f3
    k = (bits - 0x3F3504F3) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    # near 1 the digits of x that u lost are all there is
    f = tl.where(k == 0, x, m - 1.0)
    y = 0.07408660650253296 * f - 0.11381197720766068
    y = y * f + 0.11495513468980789
    y = y * f - 0.12434142827987671
    y = y * f + 0.14267249405384064
    y = y * f - 0.1666756421327591
    y = y * f + 0.20000264048576355
    y = y * f - 0.2499999701976776
    y = y * f + 0.3333333134651184
    below = f * f * (0.5 - f * y)
    y = k * 0.6931471805599453 + (f - below)
    return tl.where(u == u, y, u), below  # the bits of a NaN would give a number


@triton.jit
def tanh(x):
    """Hyperbolic tangent, relative error 2.5e-7, and its slope 1 - tanh^2; also at +-inf."""
    square = x * x
    y = -0.006083428859710693 * square + 0.021024037152528763
    y = y * square - 0.05387246981263161
    y = y * square + 0.13333141803741455
    y = y * square - 0.3333333134651184
    small = x + x * square * y
    # from 0.625 on the subtraction costs less than the polynomial would; and of 1 - tanh^2 near
    # tanh = 1 nothing but rounding errors would be left
    below = 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    near = tl.abs(x) < 0.625
    value = tl.where(near, small, tl.where(x < 0, below - 1.0, 1.0 - below))
    return value, tl.where(near, 1.0 - small * small, below * (2.0 - below))


@triton.jit
def final_logits_and_slope(model, offs_v, V, SOFTCAP: tl.constexpr):
    """Final logits at the given ids, -inf beyond the vocabulary, and the slope of the soft-cap."""
    raw_ptr, bias_ptr, has_bias, inner, outer = model
    mask = offs_v < V
    z = tl.load(raw_ptr + offs_v, mask=mask, other=0.0)
    z += tl.load(bias_ptr + offs_v, mask=offs_v < V * has_bias, other=0.0)
    s = inner * z
    slope = 1.0
    if SOFTCAP:
        value, slope = tanh(s)
        slope = tl.where(outer == 0.0, 1.0, slope)
        s = tl.where(outer == 0.0, s, outer * value)
    return tl.where(mask, s, -float("inf")), slope


@triton.jit
def final_logits(model, offs_v, V, SOFTCAP: tl.constexpr):
    """Final logits alone."""
    s, _ = final_logits_and_slope(model, offs_v, V, SOFTCAP)
    return s


@triton.jit
def label_logit(model, y, V, SOFTCAP: tl.constexpr):
    """Final logit of one id; NaN for an id that does not exist."""
    inside = (y >= 0) & (y < V)
    one = tl.arange(0, 1)
    s = final_logits(model, tl.where(inside, y, 0) + one, V, SOFTCAP)
    return tl.sum(tl.where(inside, s, float("nan")), 0)


@triton.jit
def relative_gap(s, t, top_s, top_t):
    """(s - top_s) - (t - top_t), to an ulp of itself where both models nearly agree."""
    # s - t is exact there, s - top_s is not; but s - t near 300 has lost what s - top_s keeps
    apart = tl.abs(top_s - top_t) > 4.0
    base_s = tl.where(apart, top_s, 0.0)
    base_t = tl.where(apart, top_t, 0.0)
    return ((s - base_s) - (t - base_t)) - ((top_s - base_s) - (top_t - base_t))


@triton.jit
def log_ratio(s, t, top_s, top_t, log_sums):
    """Return r = log p_t - log p_s, `relative_gap`, whether |r| < 1, and (e^r - 1 - r) / r^2.

    log_sums is the log of the sums' quotient, student's over teacher's.
    """
    gap = relative_gap(s, t, top_s, top_t)
    # an id that both rule out is absent, r = 0; or NaN where the row is
    absent = tl.maximum(s, t) == -float("inf")
    r = log_sums - tl.where(absent, log_sums, gap)
    return r, gap, tl.abs(r) < 1.0, exp_remainder(r)


@triton.jit
def store_gradient(gradient_ptr, gradient, offs_v, V):
    """Store a block of the gradient, whose row may start where the row of fp32 logits starts.

    Block j then writes the bytes of its own logits (fp32) or, in 16 bits, those of the ids from
    j / 2 to (j + 1) / 2 blocks: of blocks before it, which nobody reads again, and for j = 0 its
    own. The barrier lets every thread finish its loads of the block before any thread stores.
    """
    tl.debug_barrier()
    tl.store(gradient_ptr + offs_v, gradient.to(gradient_ptr.dtype.element_ty), mask=offs_v < V)


@triton.jit
def row_statistics(model, V, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Sweep a row once: its maximum, and the sum of exp(s - maximum)."""
    offs_v = tl.arange(0, BLOCK_V)
    top = LOWEST
    sum_V = tl.zeros([BLOCK_V], tl.float32)  # a sum per lane, added up once at the end
    for start in range(0, V, BLOCK_V):
        s = final_logits(model, start + offs_v, V, SOFTCAP)
        new_top = tl.maximum(top, tl.max(s, 0))
        sum_V = sum_V * tl.exp(top - new_top) + tl.exp(s - new_top)
        top = new_top
    return top, tl.sum(sum_V, 0)


@triton.jit
def pair_statistics(student, teacher, V, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Sweep both rows once: maxima, sums of exponentials, E_s[(s - top_s) - (t - top_t)]."""
    offs_v = tl.arange(0, BLOCK_V)
    top_s = LOWEST
    top_t = LOWEST
    sum_s_V = tl.zeros([BLOCK_V], tl.float32)
    sum_t_V = tl.zeros([BLOCK_V], tl.float32)
    gap_V = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        s = final_logits(student, start + offs_v, V, SOFTCAP)
        t = final_logits(teacher, start + offs_v, V, SOFTCAP)
        new_top_s = tl.maximum(top_s, tl.max(s, 0))
        new_top_t = tl.maximum(top_t, tl.max(t, 0))
        e = tl.exp(s - new_top_s)
        shrink = tl.exp(top_s - new_top_s)
        # what is in the sum was relative to the old maxima. 0 * inf: an id without probability
        # adds nothing, now or after the maximum has grown
        gap_V -= ((new_top_s - top_s) - (new_top_t - top_t)) * sum_s_V
        gap_V = tl.where(shrink == 0.0, 0.0, gap_V * shrink)
        gap_V += tl.where(e == 0.0, 0.0, e * relative_gap(s, t, new_top_s, new_top_t))
        sum_s_V = sum_s_V * shrink + e
        sum_t_V = sum_t_V * tl.exp(top_t - new_top_t) + tl.exp(t - new_top_t)
        top_s = new_top_s
        top_t = new_top_t
    sum_s = tl.sum(sum_s_V, 0)
    return top_s, sum_s, top_t, tl.sum(sum_t_V, 0), tl.div_rn(tl.sum(gap_V, 0), sum_s)
