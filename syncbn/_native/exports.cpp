// The C interface: chooses the level of instructions once, prepares each channel's coefficients in
// float64, and shares the loops among threads. Results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace syncbn {
namespace {

const Kernels& choose(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && level >= 2) return kAvx512;
  if (avx2 && level >= 1) return kAvx2;
#endif
  (void)level;
  return kBaseline;
}

const Kernels* chosen = &choose(2);

// A thread is woken for at least this many values: waking costs a few microseconds.
constexpr int64_t kValuesPerThread = 32768;
// Fixed, and not a number of threads, so that sums are added up in one order on every machine.
constexpr int64_t kRowBlocks = 32;

int useful_threads(Shape shape, int threads) {
  const int64_t most = shape.n * shape.c * shape.s / kValuesPerThread;
  return static_cast<int>(std::clamp<int64_t>(most, 1, std::max(threads, 1)));
}

int64_t part(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

// Calls loop(range) so that the ranges cover the tensor.
template <typename LoopT>
void elementwise(Shape shape, int threads, const LoopT& loop) {
  const int64_t total = shape.channels_last ? shape.n * shape.s : shape.c;
  if (shape.n * shape.c * shape.s == 0) return;
  const int used = useful_threads(shape, threads);
  if (used == 1) return loop(Range{0, total});
  const int64_t parts = std::min<int64_t>(total, 4 * used);
  parallel_for(parts, used, [&](int64_t i) {
    loop(Range{part(total, parts, i), part(total, parts, i + 1)});
  });
}

// Calls loop(range, first, second) so that the ranges cover the tensor, and adds up the c values
// of first and of second.
template <typename LoopT>
void reduce(Shape shape, int threads, double* first, double* second, const LoopT& loop) {
  std::fill_n(first, shape.c, 0.0);
  std::fill_n(second, shape.c, 0.0);
  if (shape.n * shape.c * shape.s == 0) return;
  if (!shape.channels_last) {  // a channel belongs to one task as a whole
    return elementwise(shape, threads, [&](Range range) { loop(range, first, second); });
  }
  const int64_t rows = shape.n * shape.s;
  const int64_t blocks =
      std::clamp<int64_t>(rows * shape.c / kValuesPerThread, 1, std::min(kRowBlocks, rows + 1));
  if (blocks == 1) return loop(Range{0, rows}, first, second);
  std::vector<double> partial(2 * shape.c * blocks, 0.0);
  parallel_for(blocks, useful_threads(shape, threads), [&](int64_t i) {
    double* mine = partial.data() + 2 * shape.c * i;
    loop(Range{part(rows, blocks, i), part(rows, blocks, i + 1)}, mine, mine + shape.c);
  });
  for (int64_t i = 0; i < blocks; ++i) {
    const double* theirs = partial.data() + 2 * shape.c * i;
    for (int64_t c = 0; c < shape.c; ++c) {
      first[c] += theirs[c];
      second[c] += theirs[shape.c + c];
    }
  }
}

// γ and β, float32 or float64 both; null for none.
struct Parameters {
  const void *weight, *bias;
  bool in_float64;

  double weight_at(int64_t c) const { return weight ? at(weight, c) : 1.0; }
  double bias_at(int64_t c) const { return bias ? at(bias, c) : 0.0; }

 private:
  double at(const void* values, int64_t c) const {
    return in_float64 ? static_cast<const double*>(values)[c]
                      : static_cast<double>(static_cast<const float*>(values)[c]);
  }
};

// y = (x − mean)·invstd·weight + bias, with the mean in two parts: head is what float32 can hold.
struct Coefficients {
  std::vector<float> values;
  Affine affine;

  Coefficients(int64_t channels, const double* mean, const double* invstd, Parameters by)
      : values(3 * channels) {
    float *head = values.data(), *scale = head + channels, *offset = scale + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = invstd[c] * by.weight_at(c);
      head[c] = static_cast<float>(mean[c]);
      scale[c] = static_cast<float>(factor);
      const double rest = mean[c] - static_cast<double>(head[c]);
      offset[c] = static_cast<float>(by.bias_at(c) - rest * factor);
    }
    affine = {head, scale, offset};
  }
};

// The first value of each channel: near enough to the mean as a rule.
void first_values(DType dtype, const void* x, Shape shape, double* shift) {
  const int64_t size = dtype == kFloat32 ? 4 : 2;
  const int64_t stride = size * (shape.channels_last ? 1 : shape.s);
  std::vector<char> row(shape.c * size);
  for (int64_t c = 0; c < shape.c; ++c)
    std::memcpy(row.data() + c * size, static_cast<const char*>(x) + c * stride, size);
  // A row of one value each, summed about 0.
  std::vector<double> zero(shape.c, 0.0), square(shape.c);
  std::fill_n(shift, shape.c, 0.0);
  chosen->sums(dtype, row.data(), {1, shape.c, 1, true}, {0, 1}, zero.data(), shift, square.data());
}

// Totals of counts lie below; syncbn/moments.py says what is above.
constexpr double kCountLimit = 1099511627776.0;  // 2^40

// What add_fingerprint() of syncbn/moments.py adds to the count; the same bits, because one rank
// may compute with PyTorch operations.
double fingerprint(const double* shift, int64_t c, int32_t rank, int32_t world) {
  int bits = 13;
  for (int32_t rest = world - 1; rest > 0; rest >>= 1) --bits;
  if (bits <= 0) return 0.0;
  uint64_t mixed = 0;
  for (int64_t i = 0; i < c; ++i) {
    int64_t word;
    std::memcpy(&word, shift + i, sizeof word);
    mixed += static_cast<uint64_t>(word ^ (word >> 32)) * static_cast<uint64_t>(2 * i + 1);
  }
  mixed *= 0x9e3779b97f4a7c15u;  // 2^64 divided by the golden ratio
  const double share = (rank == 0 ? world - 1 : -1) * kCountLimit;
  return share * static_cast<double>(mixed >> (64 - bits));
}

// Tells batches apart: any changed bit of any value changes it. In four lanes, because each step
// waits for the one before.
uint64_t digest(const double* values, int64_t n) {
  uint64_t lanes[4] = {1, 2, 3, 4};
  for (int64_t i = 0; i < n; ++i) {
    uint64_t word;
    std::memcpy(&word, values + i, sizeof word);
    uint64_t& lane = lanes[i % 4];
    lane = (lane ^ word) * 0x9e3779b97f4a7c15u;
    lane ^= lane >> 32;
  }
  uint64_t all = 0;
  for (uint64_t lane : lanes) all = (all ^ lane) * 0x9e3779b97f4a7c15u;
  return all;
}

}  // namespace
}  // namespace syncbn

using syncbn::Affine;
using syncbn::Coefficients;
using syncbn::DType;
using syncbn::Parameters;
using syncbn::Range;
using syncbn::Shape;

#pragma GCC visibility push(default)
extern "C" {

// Counted up with every change of this interface; syncbn/_native/__init__.py asks for its own.
int32_t syncbn_interface() { return 3; }

// Limits the instructions: 0 for what every machine has, 1 for AVX2, 2 for AVX-512. Returns what is
// used then. For tests, before anything is computed.
int32_t syncbn_limit_level(int32_t level) {
  syncbn::chosen = &syncbn::choose(level);
#if defined(__x86_64__)
  if (syncbn::chosen == &syncbn::kAvx512) return 2;
  if (syncbn::chosen == &syncbn::kAvx2) return 1;
#endif
  return 0;
}

// mean and m2 of each channel, c values each; 0 for an empty tensor.
void syncbn_local_moments(int32_t dtype, const void* x, int64_t n, int64_t c, int64_t s,
                          int32_t channels_last, int32_t threads, double* mean, double* m2) {
  const Shape shape{n, c, s, channels_last != 0};
  const DType type = static_cast<DType>(dtype);
  const int64_t count = n * s;
  if (count * c == 0) {
    std::fill_n(mean, c, 0.0);
    std::fill_n(m2, c, 0.0);
    return;
  }
  std::vector<double> shift(c), first(c), second(c);
  syncbn::first_values(type, x, shape, shift.data());
  for (bool again = true, repeated = false; again; repeated = true) {
    again = false;
    syncbn::reduce(shape, threads, first.data(), second.data(),
                   [&](Range range, double* a, double* b) {
                     syncbn::chosen->sums(type, x, shape, range, shift.data(), a, b);
                   });
    for (int64_t i = 0; i < c; ++i) {
      const double offset = first[i] / static_cast<double>(count);
      const double lost = first[i] * offset;
      m2[i] = second[i] - lost;
      mean[i] = shift[i] + offset;
      if (m2[i] < 0.0) m2[i] = 0.0;  // and NaN stays
      // Where the first value lay far off, the subtraction above cost digits: once more, about the
      // mean. Below a thousand times the variance, float64 has thirteen digits left.
      if (!repeated && lost > 1e3 * m2[i]) {
        shift[i] = mean[i];
        again = true;
      }
    }
  }
}

// This rank's moments, made ready to be added up over the ranks: 2c + 1 values, those of
// to_summable() and add_fingerprint() in syncbn/moments.py; shift may be null, for 0. In a world of
// one, the moments as they are: count, mean, m2. Returns a digest of the moments.
uint64_t syncbn_summable_moments(int32_t dtype, const void* x, int64_t n, int64_t c, int64_t s,
                                 int32_t channels_last, int32_t threads, const double* shift,
                                 int32_t rank, int32_t world, double* vector) {
  double *first = vector + 1, *second = first + c;
  vector[0] = static_cast<double>(n * s);
  syncbn_local_moments(dtype, x, n, c, s, channels_last, threads, first, second);
  const uint64_t digest = syncbn::digest(vector, 2 * c + 1);
  if (world <= 1) return digest;
  const double count = vector[0];
  for (int64_t i = 0; i < c; ++i) {
    const double offset = first[i] - (shift ? shift[i] : 0.0);
    first[i] = count * offset;
    second[i] += first[i] * offset;
  }
  if (shift) vector[0] += syncbn::fingerprint(shift, c, rank, world);
  return digest;
}

// From the sum of all ranks' vectors, or, not summed, from one rank's moments: to count, mean and
// m2, in place, and to statistics, mean and 1/sqrt(variance + eps). A shift is then moved to the
// mean, where there is one. Returns the count, and has changed nothing where it is none.
double syncbn_global_moments(double* vector, int32_t summed, double* shift, int64_t c, double eps,
                             double* statistics) {
  const double count = vector[0], at_least_one = std::max(count, 1.0);
  if (!(count >= 0.0 && count < syncbn::kCountLimit)) return count;
  double *first = vector + 1, *second = first + c, *invstd = statistics + c;
  if (summed) {
    for (int64_t i = 0; i < c; ++i) {
      const double offset = first[i] / at_least_one;
      const double m2 = second[i] - first[i] * offset;
      second[i] = m2 < 0.0 ? 0.0 : m2;  // and NaN stays
      first[i] = shift && count > 0.0 ? offset + shift[i] : offset;
    }
    if (shift && count > 0.0)
      for (int64_t i = 0; i < c; ++i)
        if (std::isfinite(first[i])) shift[i] = first[i];
  }
  for (int64_t i = 0; i < c; ++i) {
    statistics[i] = first[i];
    invstd[i] = 1.0 / std::sqrt(second[i] / at_least_one + eps);
  }
  return count;
}

// Moves running statistics towards those of a batch, count, mean and m2; momentum below 0 for the
// plain average over all batches. A batch without samples changes nothing.
void syncbn_track(const double* moments, int64_t c, double momentum, float* running_mean,
                  float* running_var, int64_t* batches) {
  const double count = moments[0];
  const double *mean = moments + 1, *m2 = mean + c;
  if (!(count > 0.0)) return;
  ++*batches;
  if (momentum < 0.0) momentum = 1.0 / static_cast<double>(*batches);
  const double keep = 1.0 - momentum, freedom = std::max(count - 1.0, 1.0);
  for (int64_t i = 0; i < c; ++i) {
    running_mean[i] = static_cast<float>(running_mean[i] * keep + mean[i] * momentum);
    running_var[i] = static_cast<float>(running_var[i] * keep + m2[i] / freedom * momentum);
  }
}

// Null weight, bias, residual for none.
void syncbn_normalize(int32_t dtype, const void* x, const void* residual, void* y, int64_t n,
                      int64_t c, int64_t s, int32_t channels_last, int32_t threads,
                      const double* mean, const double* invstd, const void* weight,
                      const void* bias, int32_t in_float64, int32_t relu) {
  const Shape shape{n, c, s, channels_last != 0};
  const Parameters parameters{weight, bias, in_float64 != 0};
  const Coefficients by(c, mean, invstd, parameters);
  syncbn::elementwise(shape, threads, [&](Range range) {
    syncbn::chosen->normalize(static_cast<DType>(dtype), x, residual, y, shape, range, by.affine,
                              relu != 0);
  });
}

// Σdy and Σdy·x̂ of each channel, c values each; and the same rounded to float32, where not null.
void syncbn_backward_reduce(int32_t dtype, const void* dy, const void* x, int64_t n, int64_t c,
                            int64_t s, int32_t channels_last, int32_t threads, const double* mean,
                            const double* invstd, const void* weight, const void* bias,
                            int32_t in_float64, int32_t relu, double* sum_dy, double* sum_dy_xhat,
                            float* rounded_dy, float* rounded_dy_xhat) {
  const Shape shape{n, c, s, channels_last != 0};
  const Parameters parameters{weight, bias, in_float64 != 0};
  const Coefficients by(c, mean, invstd, parameters);
  const Affine* gate = relu ? &by.affine : nullptr;
  syncbn::reduce(shape, threads, sum_dy, sum_dy_xhat, [&](Range range, double* a, double* b) {
    syncbn::chosen->gradient_sums(static_cast<DType>(dtype), dy, x, shape, range, mean, gate, a, b);
  });
  for (int64_t i = 0; i < c; ++i) sum_dy_xhat[i] *= invstd[i];
  if (rounded_dy) std::copy_n(sum_dy, c, rounded_dy);
  if (rounded_dy_xhat) std::copy_n(sum_dy_xhat, c, rounded_dy_xhat);
}

// dx = weight·invstd·(dy − sum_dy/count − x̂·sum_dy_xhat/count), with a count of at least 1.
void syncbn_backward_input(int32_t dtype, const void* dy, const void* x, void* dx, int64_t n,
                           int64_t c, int64_t s, int32_t channels_last, int32_t threads,
                           const double* mean, const double* invstd, const void* weight,
                           const void* bias, int32_t in_float64, int32_t relu,
                           const double* sum_dy, const double* sum_dy_xhat, double count) {
  const Shape shape{n, c, s, channels_last != 0};
  const Parameters parameters{weight, bias, in_float64 != 0};
  const Coefficients by(c, mean, invstd, parameters);
  const Affine* gate = relu ? &by.affine : nullptr;
  std::vector<float> values(3 * c);
  float *slope = values.data(), *factor = slope + c, *constant = factor + c;
  count = std::max(count, 1.0);
  for (int64_t i = 0; i < c; ++i) {
    const double scale = invstd[i] * parameters.weight_at(i);
    // x̂·Σdy·x̂/count = (x − mean)·steepness
    const double steepness = invstd[i] * (sum_dy_xhat[i] / count);
    const double rest = mean[i] - static_cast<double>(by.affine.head[i]);
    slope[i] = static_cast<float>(-scale * steepness);
    factor[i] = static_cast<float>(scale);
    constant[i] = static_cast<float>(scale * (rest * steepness - sum_dy[i] / count));
  }
  syncbn::elementwise(shape, threads, [&](Range range) {
    syncbn::chosen->gradient(static_cast<DType>(dtype), dy, x, dx, shape, range, by.affine.head,
                             slope, factor, constant, gate);
  });
}

}  // extern "C"
#pragma GCC visibility pop
