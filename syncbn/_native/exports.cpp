// Implements syncbn.h for one replica: chooses the level of instructions once, prepares each
// channel's coefficients in float64, and shares the loops among threads. Results do not depend on
// the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "syncbn.h"
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

// Totals of counts lie below; syncbn/comm/fingerprint.py says what is above.
constexpr double kCountLimit = 1099511627776.0;  // 2^40

Shape shape_of(const syncbn_layout& layout) {
  return {layout.n, layout.c, layout.s, layout.channels_last != 0};
}

DType dtype_of(const syncbn_layout& layout) { return static_cast<DType>(layout.dtype); }

// What the loops need of a normalization, and whether they gate by its ReLU.
struct Prepared {
  Parameters parameters;
  const double *mean, *invstd;
  double count;
  Coefficients by;
  const Affine* gate;

  Prepared(const syncbn_normalization& of, int64_t channels)
      : parameters{of.weight, of.bias, of.parameters_in_float64 != 0},
        mean(of.statistics + 1),
        invstd(mean + channels),
        count(std::max(of.statistics[0], 1.0)),
        by(channels, mean, invstd, parameters),
        gate(of.relu ? &by.affine : nullptr) {}
  Prepared(const Prepared&) = delete;  // gate points into it
  Prepared& operator=(const Prepared&) = delete;
};

}  // namespace
}  // namespace syncbn

using syncbn::Prepared;
using syncbn::Range;
using syncbn::Shape;

int32_t syncbn_interface() { return SYNCBN_INTERFACE; }

int32_t syncbn_limit_level(int32_t level) {
  syncbn::chosen = &syncbn::choose(level);
#if defined(__x86_64__)
  if (syncbn::chosen == &syncbn::kAvx512) return 2;
  if (syncbn::chosen == &syncbn::kAvx2) return 1;
#endif
  return 0;
}

void syncbn_local_moments(const syncbn_layout* layout, const void* x, double* moments) {
  const Shape shape = syncbn::shape_of(*layout);
  const syncbn::DType type = syncbn::dtype_of(*layout);
  const int64_t c = shape.c, count = shape.n * shape.s;
  double *mean = moments + 1, *m2 = mean + c;
  moments[0] = static_cast<double>(count);
  if (count * c == 0) {
    std::fill_n(mean, 2 * c, 0.0);
    return;
  }
  std::vector<double> values(3 * c);
  double *shift = values.data(), *first = shift + c, *second = first + c;
  syncbn::first_values(type, x, shape, shift);
  for (bool again = true, repeated = false; again; repeated = true) {
    again = false;
    syncbn::reduce(shape, layout->threads, first, second, [&](Range range, double* a, double* b) {
      syncbn::chosen->sums(type, x, shape, range, shift, a, b);
    });
    for (int64_t i = 0; i < c; ++i) {
      const double offset = first[i] / static_cast<double>(count);
      const double lost = first[i] * offset;
      m2[i] = second[i] - lost;
      mean[i] = shift[i] + offset;
      if (m2[i] < 0.0) m2[i] = 0.0;  // and NaN stays
      // If the first value lay far off, the subtraction above cost digits: once more, about the
      // mean. Below a thousand times the variance, float64 has thirteen digits left.
      if (!repeated && lost > 1e3 * m2[i]) {
        shift[i] = mean[i];
        again = true;
      }
    }
  }
}

void syncbn_pack_moments(const double* moments, int64_t c, const double* shift, double* vector) {
  const double count = moments[0], *mean = moments + 1, *m2 = mean + c;
  double *first = vector + 1, *second = first + c;
  vector[0] = count;
  for (int64_t i = 0; i < c; ++i) {
    const double offset = mean[i] - (shift ? shift[i] : 0.0);
    first[i] = count * offset;
    second[i] = m2[i] + first[i] * offset;
  }
}

void syncbn_unpack_moments(const double* vector, int64_t c, const double* shift, double* moments) {
  const double count = vector[0], at_least_one = std::max(count, 1.0);
  const double *first = vector + 1, *second = first + c;
  double *mean = moments + 1, *m2 = mean + c;
  moments[0] = count;
  for (int64_t i = 0; i < c; ++i) {
    const double offset = first[i] / at_least_one;
    const double squares = second[i] - first[i] * offset;
    mean[i] = shift && count > 0.0 ? offset + shift[i] : offset;
    m2[i] = squares < 0.0 ? 0.0 : squares;  // and NaN stays
  }
}

void syncbn_move_shift(const double* vector, int64_t c, int32_t about_shift, double* shift) {
  const double count = vector[0];
  if (!(count > 0.0)) return;
  for (int64_t i = 0; i < c; ++i) {
    const double offset = vector[1 + i] / std::max(count, 1.0);
    const double mean = about_shift ? offset + shift[i] : offset;
    if (std::isfinite(mean)) shift[i] = mean;
  }
}

void syncbn_add_fingerprint(const double* shift, int64_t size, int32_t rank, int32_t world,
                            double* count) {
  int bits = 13;
  for (int32_t rest = world - 1; rest > 0; rest >>= 1) --bits;
  if (bits <= 0) return;
  uint64_t mixed = 0;
  for (int64_t i = 0; i < size; ++i) {
    int64_t word;
    std::memcpy(&word, shift + i, sizeof word);
    mixed += static_cast<uint64_t>(word ^ (word >> 32)) * static_cast<uint64_t>(2 * i + 1);
  }
  mixed *= 0x9e3779b97f4a7c15u;  // 2^64 divided by the golden ratio
  const double share = (rank == 0 ? world - 1 : -1) * syncbn::kCountLimit;
  *count += share * static_cast<double>(mixed >> (64 - bits));
}

void syncbn_statistics(const double* moments, int64_t c, double eps, double* statistics) {
  const double at_least_one = std::max(moments[0], 1.0);
  const double* m2 = moments + 1 + c;
  std::copy_n(moments, 1 + c, statistics);
  for (int64_t i = 0; i < c; ++i)
    statistics[1 + c + i] = 1.0 / std::sqrt(m2[i] / at_least_one + eps);
}

void syncbn_update_running(const double* moments, int64_t c, double momentum, float* running_mean,
                           float* running_var, int64_t* num_batches_tracked) {
  const double count = moments[0];
  const double *mean = moments + 1, *m2 = mean + c;
  if (!(count > 0.0)) return;
  ++*num_batches_tracked;
  if (momentum < 0.0) momentum = 1.0 / static_cast<double>(*num_batches_tracked);
  const double keep = 1.0 - momentum, freedom = std::max(count - 1.0, 1.0);
  for (int64_t i = 0; i < c; ++i) {
    running_mean[i] = static_cast<float>(running_mean[i] * keep + mean[i] * momentum);
    running_var[i] = static_cast<float>(running_var[i] * keep + m2[i] / freedom * momentum);
  }
}

void syncbn_normalize(const syncbn_layout* layout, const void* x, const void* residual,
                      const syncbn_normalization* normalization, void* y) {
  const Shape shape = syncbn::shape_of(*layout);
  const Prepared of(*normalization, shape.c);
  syncbn::elementwise(shape, layout->threads, [&](Range range) {
    syncbn::chosen->normalize(syncbn::dtype_of(*layout), x, residual, y, shape, range, of.by.affine,
                              normalization->relu != 0);
  });
}

void syncbn_backward_reduce(const syncbn_layout* layout, const void* dy, const void* x,
                            const syncbn_normalization* normalization, double* sums,
                            float* dweight, float* dbias) {
  const Shape shape = syncbn::shape_of(*layout);
  const Prepared of(*normalization, shape.c);
  double* sum_dy_xhat = sums + shape.c;
  syncbn::reduce(shape, layout->threads, sums, sum_dy_xhat, [&](Range range, double* a, double* b) {
    syncbn::chosen->gradient_sums(syncbn::dtype_of(*layout), dy, x, shape, range, of.mean, of.gate,
                                  a, b);
  });
  for (int64_t i = 0; i < shape.c; ++i) sum_dy_xhat[i] *= of.invstd[i];
  if (dweight) std::copy_n(sum_dy_xhat, shape.c, dweight);
  if (dbias) std::copy_n(sums, shape.c, dbias);
}

void syncbn_backward_input(const syncbn_layout* layout, const void* dy, const void* x,
                           const syncbn_normalization* normalization, const double* sums,
                           void* dx) {
  const Shape shape = syncbn::shape_of(*layout);
  const Prepared of(*normalization, shape.c);
  const int64_t c = shape.c;
  const double *sum_dy = sums, *sum_dy_xhat = sums + c;
  std::vector<float> values(3 * c);
  float *slope = values.data(), *factor = slope + c, *constant = factor + c;
  for (int64_t i = 0; i < c; ++i) {
    const double scale = of.invstd[i] * of.parameters.weight_at(i);
    // x̂·Σdy·x̂/count = (x − mean)·steepness
    const double steepness = of.invstd[i] * (sum_dy_xhat[i] / of.count);
    const double rest = of.mean[i] - static_cast<double>(of.by.affine.head[i]);
    slope[i] = static_cast<float>(-scale * steepness);
    factor[i] = static_cast<float>(scale);
    constant[i] = static_cast<float>(scale * (rest * steepness - sum_dy[i] / of.count));
  }
  syncbn::elementwise(shape, layout->threads, [&](Range range) {
    syncbn::chosen->gradient(syncbn::dtype_of(*layout), dy, x, dx, shape, range, of.by.affine.head,
                             slope, factor, constant, of.gate);
  });
}
