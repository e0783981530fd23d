// What kernels.cpp offers for each level of instructions, and exports.cpp chooses from.
#pragma once

#include <cstdint>

namespace syncbn {

// Numbers that syncbn/_native/__init__.py passes for a tensor's dtype.
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor (n, c, s): rows of s values, or, with channels last, n·s rows of c values.
struct Shape {
  int64_t n, c, s;
  bool channels_last;
};

// What normalize and its gradient multiply and add, for each channel, in float32:
// y = (x − head)·scale + offset.
struct Affine {
  const float *head, *scale, *offset;
};

// A part of the work: channels [begin, end) of contiguous tensors, rows [begin, end) of others.
struct Range {
  int64_t begin, end;
};

struct Kernels {
  // Adds Σ(x − shift) to first and Σ(x − shift)² to second; both and shift have c values.
  void (*sums)(DType, const void* x, Shape, Range, const double* shift, double* first,
               double* second);
  // Adds Σdy to first and Σdy·(x − mean) to second; with relu, of those dy whose y is above 0.
  void (*gradient_sums)(DType, const void* dy, const void* x, Shape, Range, const double* mean,
                        const Affine* relu, double* first, double* second);
  // y = affine(x) + residual, then the larger of it and 0 with relu; residual may be null.
  void (*normalize)(DType, const void* x, const void* residual, void* y, Shape, Range, Affine,
                    bool relu);
  // dx = (x − head)·slope + dy·factor + constant, with dy as in gradient_sums.
  void (*gradient)(DType, const void* dy, const void* x, void* dx, Shape, Range,
                   const float* head, const float* slope, const float* factor,
                   const float* constant, const Affine* relu);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace syncbn
