// The loops over activations. Compiled once for each level of instructions, with SYNCBN_LEVEL the
// name of the table to define, in the vectors of GCC and Clang as wide as the level's.
//
// Everything lives in an unnamed namespace, and nothing of the standard library is instantiated:
// of an inline function that two levels share, the linker would keep one for both.

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace syncbn {
namespace {

// Floats in a register; a sum, in doubles, takes half as many at once.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kHalf = kWidth / 2;
#if defined(__F16C__)
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
// A single value is no vector of one: the operators, and ?:, work on both.
template <typename T>
struct VectorOf<T, 1> {
  typedef T type;
};
template <int kCount>
using Floats = typename VectorOf<float, kCount>::type;
template <int kCount>
using Doubles = typename VectorOf<double, kCount>::type;
template <int kCount>
using Words = typename VectorOf<uint32_t, kCount>::type;
template <int kCount>
using Halves = typename VectorOf<uint16_t, kCount>::type;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename ToT, typename FromT>
inline ToT bit_cast(FromT from) {
  static_assert(sizeof(ToT) == sizeof(FromT), "the same bits");
  ToT to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
inline T read(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
inline void write(T value, void* to) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Conversions by the processor's own instruction, for which GCC 12's __builtin_convertvector, the
// way of every other processor, takes several. With maskz and a full mask, because the plain
// AVX-512 forms make GCC 12 warn of an uninitialized variable of theirs.
template <int kCount>
inline Doubles<kCount> to_double(Floats<kCount> from) {
  if constexpr (kCount == 1)
    return static_cast<double>(from);
#if defined(__AVX512F__)
  else if constexpr (kCount == 8)
    return bit_cast<Doubles<8>>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(from)));
#endif
#if defined(__AVX2__)
  else if constexpr (kCount == 4)
    return bit_cast<Doubles<4>>(_mm256_cvtps_pd(bit_cast<__m128>(from)));
#endif
  else
    return __builtin_convertvector(from, Doubles<kCount>);
}

template <int kCount>
inline Words<kCount> to_words(const void* from) {
  if constexpr (kCount == 1)
    return read<uint16_t>(from);
#if defined(__AVX512F__)
  else if constexpr (kCount == 16)
    return bit_cast<Words<16>>(_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(from)));
#endif
#if defined(__AVX2__)
  else if constexpr (kCount == 8)
    return bit_cast<Words<8>>(_mm256_cvtepu16_epi32(read<__m128i>(from)));
  else if constexpr (kCount == 4)
    return bit_cast<Words<4>>(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(read<int64_t>(from))));
#endif
  else
    return __builtin_convertvector(read<Halves<kCount>>(from), Words<kCount>);
}

template <int kCount>
inline void write_halves(Words<kCount> from, void* to) {
  if constexpr (kCount == 1)
    write(static_cast<uint16_t>(from), to);
#if defined(__AVX512F__)
  else if constexpr (kCount == 16)
    write(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(from)), to);
#endif
#if defined(__AVX2__)
  else if constexpr (kCount == 4)
    write(_mm_cvtsi128_si64(_mm_packus_epi32(bit_cast<__m128i>(from), __m128i{})), to);
  else if constexpr (kCount == 8) {
    const __m256i lanes = bit_cast<__m256i>(from);
    write(_mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1)), to);
  }
#endif
  else
    write(__builtin_convertvector(from, Halves<kCount>), to);
}

template <int kCount>
inline Floats<kCount> load(const float* from) {
  return read<Floats<kCount>>(from);
}

template <int kCount>
inline Floats<kCount> load(const BFloat16* from) {
  return bit_cast<Floats<kCount>>(to_words<kCount>(from) << 16);
}

// Exact, subnormals, infinities and NaN included, in integer operations that every level has.
template <int kCount>
inline Floats<kCount> widened(Words<kCount> half) {
  using F = Floats<kCount>;
  using W = Words<kCount>;
  const W magnitude = (half & 0x7fffu) << 13;
  const W exponent = magnitude & 0x0f800000u;
  const W normal = magnitude + (112u << 23);
  const W special = magnitude + (224u << 23);
  // A subnormal is given the leading 1 of 2^-14, which is then taken away again.
  const W small = bit_cast<W>(bit_cast<F>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23));
  const W finite = exponent == 0u ? small : normal;
  const W result = exponent == 0x0f800000u ? special : finite;
  return bit_cast<F>(result | (half & 0x8000u) << 16);
}

// To the nearest, ties to even.
template <int kCount>
inline Words<kCount> narrowed(Floats<kCount> value) {
  using F = Floats<kCount>;
  using W = Words<kCount>;
  const W bits = bit_cast<W>(value);
  const W magnitude = bits & 0x7fffffffu;
  // Adding 1/2 aligns a subnormal's digits with the last ones of the sum, which rounds them.
  const W small = bit_cast<W>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const W normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const W special = magnitude > 0x7f800000u ? W{} + 0x7e00u : W{} + 0x7c00u;
  const W finite = magnitude < (113u << 23) ? small : normal;
  const W result = magnitude >= (143u << 23) ? special : finite;
  return result | ((bits >> 16) & 0x8000u);
}

template <int kCount>
inline Floats<kCount> load(const Float16* from) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16)
    return bit_cast<Floats<16>>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from)));
#endif
#if defined(__F16C__)
  if constexpr (kCount == 8) return bit_cast<Floats<8>>(_mm256_cvtph_ps(read<__m128i>(from)));
  if constexpr (kCount == 4)
    return bit_cast<Floats<4>>(_mm_cvtph_ps(_mm_cvtsi64_si128(read<int64_t>(from))));
#endif
  return widened<kCount>(to_words<kCount>(from));
}

template <int kCount>
inline void store(Floats<kCount> value, float* to) {
  write(value, to);
}

// To the nearest, ties to even.
template <int kCount>
inline void store(Floats<kCount> value, BFloat16* to) {
  using W = Words<kCount>;
  const W bits = bit_cast<W>(value);
  const W rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const W result = (bits & 0x7fffffffu) > 0x7f800000u ? W{} + 0x7fc0u : rounded;
  write_halves<kCount>(result, to);
}

template <int kCount>
inline void store(Floats<kCount> value, Float16* to) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16)
    return write(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), kNearest), to);
#endif
#if defined(__F16C__)
  if constexpr (kCount == 8)
    return write(_mm256_cvtps_ph(bit_cast<__m256>(value), kNearest), to);
  if constexpr (kCount == 4)
    return write(_mm_cvtsi128_si64(_mm_cvtps_ph(bit_cast<__m128>(value), kNearest)), to);
#endif
  write_halves<kCount>(narrowed<kCount>(value), to);
}

// NaN passes, as in torch.relu and its gradient.
template <typename F>
inline F rectified(F value) {
  return value <= 0.0f ? F{} : value;
}
template <typename F>
inline F gated(F dy, F y) {
  return y <= 0.0f ? F{} : dy;
}

// Calls loop(Count<k>, i) for k values from i on, until all of [begin, end) are done.
template <typename LoopT>
inline void in_blocks(int64_t begin, int64_t end, const LoopT& loop) {
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) loop(Count<kWidth>{}, i);
  if constexpr (kWidth > 4)
    for (; i + 4 <= end; i += 4) loop(Count<4>{}, i);
  for (; i < end; ++i) loop(Count<1>{}, i);
}

// As in_blocks, for sums: half as many values, which are as many doubles as a register has.
template <typename LoopT>
inline void in_halves(int64_t begin, int64_t end, const LoopT& loop) {
  int64_t i = begin;
  for (; i + kHalf <= end; i += kHalf) loop(Count<kHalf>{}, i);
  for (; i < end; ++i) loop(Count<1>{}, i);
}

// What k values add to each of two sums.
template <int kCount>
struct Terms {
  Doubles<kCount> a, b;

  inline Terms operator+(Terms other) const { return {a + other.a, b + other.b}; }
};

// Adds up the two sums of rows, one channel's after the other's.
struct Sums {
  Terms<kHalf> lanes{};
  Terms<1> rest{};

  // Adds term(Count<k>, i), the Terms of k values from i on, over the row [i, end). In four lanes
  // of their own, because an addition waits for the previous one to its lane.
  template <typename TermT>
  inline void add(int64_t i, int64_t end, const TermT& term) {
    const Count<kHalf> half;
    Terms<kHalf> lane0 = lanes, lane1{}, lane2{}, lane3{};
    for (; i + 4 * kHalf <= end; i += 4 * kHalf) {
      lane0 = lane0 + term(half, i);
      lane1 = lane1 + term(half, i + kHalf);
      lane2 = lane2 + term(half, i + 2 * kHalf);
      lane3 = lane3 + term(half, i + 3 * kHalf);
    }
    if (i + 2 * kHalf <= end) {
      lane0 = lane0 + term(half, i);
      lane1 = lane1 + term(half, i + kHalf);
      i += 2 * kHalf;
    }
    if (i + kHalf <= end) {
      lane2 = lane2 + term(half, i);
      i += kHalf;
    }
    lanes = (lane0 + lane1) + (lane2 + lane3);
    for (; i < end; ++i) rest = rest + term(Count<1>{}, i);
  }

  inline void add_to(double* first, double* second) const {
    Terms<1> sum = rest;
    for (int lane = 0; lane < kHalf; ++lane) sum = sum + Terms<1>{lanes.a[lane], lanes.b[lane]};
    *first += sum.a;
    *second += sum.b;
  }
};

// Adds term(Count<k>, i, of(c)) over contiguous channels c to first[c] and second[c]. In the order
// of memory, which the processor fetches ahead, with the sums of some channels at hand.
template <typename OfT, typename TermT>
inline void add_channels(Shape shape, Range channels, double* first, double* second, const OfT& of,
                         const TermT& term) {
  constexpr int64_t kAtHand = 64;
  for (int64_t begin = channels.begin; begin < channels.end; begin += kAtHand) {
    const int64_t end = begin + kAtHand < channels.end ? begin + kAtHand : channels.end;
    Sums sums[kAtHand];
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t c = begin; c < end; ++c) {
        const int64_t start = (n * shape.c + c) * shape.s;
        const auto constants = of(c);
        sums[c - begin].add(start, start + shape.s,
                            [&](auto count, int64_t i) { return term(count, i, constants); });
      }
    for (int64_t c = begin; c < end; ++c) sums[c - begin].add_to(first + c, second + c);
  }
}

// Adds term(Count<k>, row's start, c) of each row in turn to first[c] and second[c]; four rows at
// once, to load and store the sums less often.
template <typename TermT>
inline void add_rows(Shape shape, Range rows, double* first, double* second, const TermT& term) {
  const int64_t channels = shape.c;
  const auto add = [=](auto count, int64_t c, auto terms) {
    constexpr int kCount = decltype(count)::value;
    write(read<Doubles<kCount>>(first + c) + terms.a, first + c);
    write(read<Doubles<kCount>>(second + c) + terms.b, second + c);
  };
  int64_t start = rows.begin * channels;
  const int64_t end = rows.end * channels;
  for (; start + 4 * channels <= end; start += 4 * channels)
    in_halves(0, channels, [&](auto count, int64_t c) {
      add(count, c,
          (term(count, start, c) + term(count, start + channels, c)) +
              (term(count, start + 2 * channels, c) + term(count, start + 3 * channels, c)));
    });
  for (; start < end; start += channels)
    in_halves(0, channels, [&](auto count, int64_t c) { add(count, c, term(count, start, c)); });
}

template <typename T>
void sums(const T* x, Shape shape, Range range, const double* shift, double* first,
          double* second) {
  const auto term = [=](auto count, int64_t i, auto center) {
    constexpr int kCount = decltype(count)::value;
    const Doubles<kCount> d = to_double<kCount>(load<kCount>(x + i)) - center;
    return Terms<kCount>{d, d * d};
  };
  if (shape.channels_last) {
    return add_rows(shape, range, first, second, [=](auto count, int64_t start, int64_t c) {
      return term(count, start + c, read<Doubles<decltype(count)::value>>(shift + c));
    });
  }
  add_channels(shape, range, first, second, [=](int64_t c) { return shift[c]; }, term);
}

// What the elementwise loops need of a channel, or, loaded for k channels, of each of them.
template <typename F>
struct AffineOf {
  F head, scale, offset;

  template <typename X>
  inline X operator()(X x) const {
    return (x - head) * scale + offset;
  }
};

template <int kCount>
inline AffineOf<Floats<kCount>> at(const Affine& affine, int64_t c) {
  return {load<kCount>(affine.head + c), load<kCount>(affine.scale + c),
          load<kCount>(affine.offset + c)};
}

// What gradient_sums needs of k channels.
template <int kCount>
struct CenterOf {
  Doubles<kCount> center;
  AffineOf<Floats<kCount>> gate;
};

template <typename T, bool kRelu>
void gradient_sums(const T* dy, const T* x, Shape shape, Range range, const double* mean,
                   const Affine* relu, double* first, double* second) {
  const auto term = [=](auto count, int64_t i, const auto& of) {
    constexpr int kCount = decltype(count)::value;
    const Floats<kCount> value = load<kCount>(x + i);
    Floats<kCount> g = load<kCount>(dy + i);
    if constexpr (kRelu) g = gated(g, of.gate(value));
    const Doubles<kCount> wide = to_double<kCount>(g);
    return Terms<kCount>{wide, wide * (to_double<kCount>(value) - of.center)};
  };
  const auto of = [=](auto count, int64_t c) {
    constexpr int kCount = decltype(count)::value;
    CenterOf<kCount> center{read<Doubles<kCount>>(mean + c), {}};
    if constexpr (kRelu) center.gate = at<kCount>(*relu, c);
    return center;
  };
  if (shape.channels_last) {
    return add_rows(shape, range, first, second, [=](auto count, int64_t start, int64_t c) {
      return term(count, start + c, of(count, c));
    });
  }
  add_channels(
      shape, range, first, second, [=](int64_t c) { return of(Count<1>{}, c); }, term);
}

// Values in a block of rows, several pages.
constexpr int64_t kBlock = 16384;

// Calls loop(Count<k>, i, coefficients) for k values from i on. prepare(Count<k>, c) gives the
// coefficients of k channels from c on. Backwards, because a loop that has just summed the same
// tensors left their ends in the cache.
template <typename PrepareT, typename LoopT>
inline void elementwise(Shape shape, Range range, const PrepareT& prepare, const LoopT& loop) {
  if (shape.channels_last) {
    // Rows in their order within a block, for the processor fetches ahead in that direction; four
    // at once, to load the coefficients less often.
    const int64_t channels = shape.c, block = kBlock / channels + 4;
    for (int64_t end = range.end; end > range.begin; end -= block) {
      int64_t r = end - block > range.begin ? end - block : range.begin;
      for (; r + 4 <= end; r += 4)
        in_blocks(0, channels, [&](auto count, int64_t c) {
          const auto coefficients = prepare(count, c);
          for (int64_t row = r; row < r + 4; ++row) loop(count, row * channels + c, coefficients);
        });
      for (; r < end; ++r)
        in_blocks(0, channels, [&](auto count, int64_t c) {
          loop(count, r * channels + c, prepare(count, c));
        });
    }
    return;
  }
  for (int64_t n = shape.n - 1; n >= 0; --n) {
    for (int64_t c = range.end - 1; c >= range.begin; --c) {
      const auto coefficients = prepare(Count<1>{}, c);
      const int64_t start = (n * shape.c + c) * shape.s;
      in_blocks(start, start + shape.s,
                [&](auto count, int64_t i) { loop(count, i, coefficients); });
    }
  }
}

template <typename T, bool kRelu, bool kResidual>
void normalize(const T* x, const T* residual, T* y, Shape shape, Range range, Affine by) {
  elementwise(
      shape, range, [&](auto count, int64_t c) { return at<decltype(count)::value>(by, c); },
      [=](auto count, int64_t i, const auto& affine) {
        constexpr int kCount = decltype(count)::value;
        Floats<kCount> value = affine(load<kCount>(x + i));
        if constexpr (kResidual) value += load<kCount>(residual + i);
        if constexpr (kRelu) value = rectified(value);
        store<kCount>(value, y + i);
      });
}

template <typename F>
struct GradientOf {
  F head, slope, factor, constant;
  AffineOf<F> gate;
};

template <typename T, bool kRelu>
void gradient(const T* dy, const T* x, T* dx, Shape shape, Range range, const float* head,
              const float* slope, const float* factor, const float* constant,
              const Affine* relu) {
  const auto prepare = [=](auto count, int64_t c) {
    constexpr int kCount = decltype(count)::value;
    GradientOf<Floats<kCount>> of{load<kCount>(head + c),     load<kCount>(slope + c),
                                  load<kCount>(factor + c),   load<kCount>(constant + c),
                                  AffineOf<Floats<kCount>>{}};
    if constexpr (kRelu) of.gate = at<kCount>(*relu, c);
    return of;
  };
  elementwise(shape, range, prepare, [=](auto count, int64_t i, const auto& of) {
    constexpr int kCount = decltype(count)::value;
    const Floats<kCount> value = load<kCount>(x + i);
    Floats<kCount> g = load<kCount>(dy + i);
    if constexpr (kRelu) g = gated(g, of.gate(value));
    store<kCount>(g * of.factor + ((value - of.head) * of.slope + of.constant), dx + i);
  });
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
