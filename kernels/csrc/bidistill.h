// C interface of the native kernels: raw pointers, int64 sizes, no exceptions, no global state.
//
// A function returns 0, or BD_BAD_SIZE when a size is negative. It reads and writes only what its
// arguments describe; the caller keeps the memory alive.

#ifndef BIDISTILL_H
#define BIDISTILL_H

#include <stdint.h>

#define BD_API extern "C" __attribute__((visibility("default")))

#define BD_BAD_SIZE 1

// Version of the library, the same as that of the Python package it was built with.
BD_API const char* bd_version(void);

// out[n] = log sum_v exp(x[n * stride + v]), natural logarithm, for n < rows and v < cols.
// Sums in double. A row of -inf, or of no columns, gives -inf; +inf gives +inf; a NaN gives NaN.
// Reads 2 * rows * cols floats, writes rows.
BD_API int bd_logsumexp_f32(const float* x, int64_t rows, int64_t cols, int64_t stride, float* out);

#endif  // BIDISTILL_H
