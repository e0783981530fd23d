// The loops over activations. Compiled once for each level of instructions, with SYNCBN_LEVEL the
// name of the table to define; plain loops, which the compiler vectorises for the level.
//
// Everything lives in an unnamed namespace, and nothing of the standard library is instantiated:
// of an inline function that two levels share, the linker would keep one for both.

#include "kernels.h"

namespace syncbn {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(float value) { return value; }

inline float load(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// Exact, subnormals, infinities and NaN included, in integer operations that every level has.
inline float load(Float16 value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23);
  const uint32_t special = magnitude + (224u << 23);
  // A subnormal is given the leading 1 of 2^-14, which is then taken away again.
  const uint32_t small = to_bits(from_bits(magnitude + (113u << 23)) - from_bits(113u << 23));
  const uint32_t finite = exponent == 0 ? small : normal;
  const uint32_t result = exponent == 0x0f800000u ? special : finite;
  return from_bits(result | uint32_t{value.bits & 0x8000u} << 16);
}

inline void store(float value, float* to) { *to = value; }

// To the nearest, ties to even.
inline void store(float value, BFloat16* to) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(float value, Float16* to) {
  const uint32_t bits = to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 1/2 aligns a subnormal's digits with the last ones of the sum, which rounds them.
  const uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < (113u << 23) ? small : normal;
  const uint32_t result = magnitude >= (143u << 23) ? special : finite;
  to->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

inline float affine(float x, float head, float scale, float offset) {
  return (x - head) * scale + offset;
}

// NaN passes, as in torch.relu and its gradient.
inline float rectified(float value) { return value <= 0.0f ? 0.0f : value; }
inline float gated(float dy, float y) { return y <= 0.0f ? 0.0f : dy; }

template <typename T>
void sums(const T* x, Shape shape, Range range, const double* shift, double* first,
          double* second) {
  const int64_t channels = shape.c, length = shape.s;
  if (!shape.channels_last) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      const double center = shift[c];
      double a = 0.0, b = 0.0;
      for (int64_t n = 0; n < shape.n; ++n) {
        const T* row = x + (n * channels + c) * length;
#pragma omp simd reduction(+ : a, b)
        for (int64_t i = 0; i < length; ++i) {
          const double d = static_cast<double>(load(row[i])) - center;
          a += d;
          b += d * d;
        }
      }
      first[c] += a;
      second[c] += b;
    }
    return;
  }
  int64_t r = range.begin;
  for (; r + 4 <= range.end; r += 4) {  // four rows at once, to load and store the sums less often
    const T* row = x + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double d0 = static_cast<double>(load(row[c])) - shift[c];
      const double d1 = static_cast<double>(load(row[c + channels])) - shift[c];
      const double d2 = static_cast<double>(load(row[c + 2 * channels])) - shift[c];
      const double d3 = static_cast<double>(load(row[c + 3 * channels])) - shift[c];
      first[c] += (d0 + d1) + (d2 + d3);
      second[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    }
  }
  for (; r < range.end; ++r) {
    const T* row = x + r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double d = static_cast<double>(load(row[c])) - shift[c];
      first[c] += d;
      second[c] += d * d;
    }
  }
}

template <typename T, bool kRelu>
void gradient_sums(const T* dy, const T* x, Shape shape, Range range, const double* mean,
                   const Affine* relu, double* first, double* second) {
  const int64_t channels = shape.c, length = shape.s;
  if (!shape.channels_last) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      const double center = mean[c];
      const float head = kRelu ? relu->head[c] : 0.0f;
      const float scale = kRelu ? relu->scale[c] : 0.0f;
      const float offset = kRelu ? relu->offset[c] : 0.0f;
      double a = 0.0, b = 0.0;
      for (int64_t n = 0; n < shape.n; ++n) {
        const int64_t start = (n * channels + c) * length;
        const T *x_row = x + start, *dy_row = dy + start;
#pragma omp simd reduction(+ : a, b)
        for (int64_t i = 0; i < length; ++i) {
          const float value = load(x_row[i]);
          float g = load(dy_row[i]);
          if (kRelu) g = gated(g, affine(value, head, scale, offset));
          a += static_cast<double>(g);
          b += static_cast<double>(g) * (static_cast<double>(value) - center);
        }
      }
      first[c] += a;
      second[c] += b;
    }
    return;
  }
  const auto term = [=](int64_t at, int64_t c, double* a, double* b) {
    const float value = load(x[at + c]);
    float g = load(dy[at + c]);
    if (kRelu) g = gated(g, affine(value, relu->head[c], relu->scale[c], relu->offset[c]));
    *a = static_cast<double>(g);
    *b = *a * (static_cast<double>(value) - mean[c]);
  };
  int64_t r = range.begin;
  for (; r + 2 <= range.end; r += 2) {
    const int64_t at = r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      double a0, b0, a1, b1;
      term(at, c, &a0, &b0);
      term(at + channels, c, &a1, &b1);
      first[c] += a0 + a1;
      second[c] += b0 + b1;
    }
  }
  for (; r < range.end; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      double a, b;
      term(r * channels, c, &a, &b);
      first[c] += a;
      second[c] += b;
    }
  }
}

template <typename T, bool kRelu, bool kResidual>
void normalize(const T* x, const T* residual, T* __restrict y, Shape shape, Range range,
               Affine by) {
  const int64_t channels = shape.c, length = shape.s;
  const auto value = [=](int64_t at, float head, float scale, float offset) {
    float v = affine(load(x[at]), head, scale, offset);
    if (kResidual) v += load(residual[at]);
    return kRelu ? rectified(v) : v;
  };
  if (!shape.channels_last) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      const float head = by.head[c], scale = by.scale[c], offset = by.offset[c];
      for (int64_t n = 0; n < shape.n; ++n) {
        const int64_t start = (n * channels + c) * length;
#pragma omp simd
        for (int64_t i = start; i < start + length; ++i) store(value(i, head, scale, offset), y + i);
      }
    }
    return;
  }
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t start = r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      store(value(start + c, by.head[c], by.scale[c], by.offset[c]), y + start + c);
  }
}

template <typename T, bool kRelu>
void gradient(const T* dy, const T* x, T* __restrict dx, Shape shape, Range range,
              const float* head, const float* slope, const float* factor, const float* constant,
              const Affine* relu) {
  const int64_t channels = shape.c, length = shape.s;
  const auto value = [=](int64_t at, int64_t c) {
    const float v = load(x[at]);
    float g = load(dy[at]);
    if (kRelu) g = gated(g, affine(v, relu->head[c], relu->scale[c], relu->offset[c]));
    return g * factor[c] + ((v - head[c]) * slope[c] + constant[c]);
  };
  if (!shape.channels_last) {
    for (int64_t c = range.begin; c < range.end; ++c) {
      for (int64_t n = 0; n < shape.n; ++n) {
        const int64_t start = (n * channels + c) * length;
#pragma omp simd
        for (int64_t i = start; i < start + length; ++i) store(value(i, c), dx + i);
      }
    }
    return;
  }
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t start = r * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(value(start + c, c), dx + start + c);
  }
}

// From here on, each table entry finds the dtype's loop.

void any_sums(DType dtype, const void* x, Shape shape, Range range, const double* shift,
              double* first, double* second) {
  const auto run = [&](auto* typed) { sums(typed, shape, range, shift, first, second); };
  if (dtype == kFloat32) run(static_cast<const float*>(x));
  if (dtype == kBFloat16) run(static_cast<const BFloat16*>(x));
  if (dtype == kFloat16) run(static_cast<const Float16*>(x));
}

template <typename T>
void typed_gradient_sums(const void* dy, const void* x, Shape shape, Range range,
                         const double* mean, const Affine* relu, double* first, double* second) {
  const auto run = relu ? gradient_sums<T, true> : gradient_sums<T, false>;
  run(static_cast<const T*>(dy), static_cast<const T*>(x), shape, range, mean, relu, first,
      second);
}

void any_gradient_sums(DType dtype, const void* dy, const void* x, Shape shape, Range range,
                       const double* mean, const Affine* relu, double* first, double* second) {
  const auto run = dtype == kFloat32    ? typed_gradient_sums<float>
                   : dtype == kBFloat16 ? typed_gradient_sums<BFloat16>
                                        : typed_gradient_sums<Float16>;
  run(dy, x, shape, range, mean, relu, first, second);
}

template <typename T>
void typed_normalize(const void* x, const void* residual, void* y, Shape shape, Range range,
                     Affine by, bool relu) {
  const auto run = residual ? (relu ? normalize<T, true, true> : normalize<T, false, true>)
                            : (relu ? normalize<T, true, false> : normalize<T, false, false>);
  run(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<T*>(y), shape, range,
      by);
}

void any_normalize(DType dtype, const void* x, const void* residual, void* y, Shape shape,
                   Range range, Affine by, bool relu) {
  const auto run = dtype == kFloat32    ? typed_normalize<float>
                   : dtype == kBFloat16 ? typed_normalize<BFloat16>
                                        : typed_normalize<Float16>;
  run(x, residual, y, shape, range, by, relu);
}

template <typename T>
void typed_gradient(const void* dy, const void* x, void* dx, Shape shape, Range range,
                    const float* head, const float* slope, const float* factor,
                    const float* constant, const Affine* relu) {
  const auto run = relu ? gradient<T, true> : gradient<T, false>;
  run(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), shape, range,
      head, slope, factor, constant, relu);
}

void any_gradient(DType dtype, const void* dy, const void* x, void* dx, Shape shape, Range range,
                  const float* head, const float* slope, const float* factor,
                  const float* constant, const Affine* relu) {
  const auto run = dtype == kFloat32    ? typed_gradient<float>
                   : dtype == kBFloat16 ? typed_gradient<BFloat16>
                                        : typed_gradient<Float16>;
  run(dy, x, dx, shape, range, head, slope, factor, constant, relu);
}

}  // namespace

const Kernels SYNCBN_LEVEL = {any_sums, any_gradient_sums, any_normalize, any_gradient};

}  // namespace syncbn
