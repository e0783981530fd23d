// The C interface of the native library: what Python calls through ctypes, declared once.
//
// `__init__.py` beside this file declares the same for Python; a test compares the two. Pointers to
// tensors are to their first value; null stands for a tensor that is absent. All per-channel
// vectors are contiguous. Nothing here is linked against torch or Python.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Increased with every change of this file.
#define SYNCBN_INTERFACE 4

#define SYNCBN_EXPORT __attribute__((visibility("default")))

// A tensor of n·c·s values: n samples of c channels of s positions, contiguous, or, with
// channels_last, n·s rows of c values.
typedef struct syncbn_layout {
  int64_t n, c, s;
  int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int32_t channels_last;
  int32_t threads;  // at most so many are used; results do not depend on it
} syncbn_layout;

// y = (x - mean)·invstd·weight + bias, and max(y, 0) with relu.
typedef struct syncbn_normalization {
  const double* statistics;  // 2c + 1: count of the whole batch, means, 1/sqrt(variance + eps)
  const void* weight;
  const void* bias;
  int32_t parameters_in_float64;  // weight and bias are both float64; else both float32
  int32_t relu;
} syncbn_normalization;

// Memory that all ranks of one host have mapped, and which of them calls.
typedef struct syncbn_channel {
  void* base;
  int64_t capacity;  // values in a slot
  int32_t world;
  int32_t rank;
} syncbn_channel;

SYNCBN_EXPORT int32_t syncbn_interface(void);

// Limits the instructions: 0 for what every machine has, 1 for AVX2, 2 for AVX-512. Returns what is
// used then. For tests, before anything is computed.
SYNCBN_EXPORT int32_t syncbn_limit_level(int32_t level);

// Writes the moments of x, 2c + 1 values: count, means, M2. An empty tensor has zeros.
SYNCBN_EXPORT void syncbn_local_moments(const syncbn_layout* layout, const void* x,
                                        double* moments);

// Writes what ranks add up, `to_summable` of syncbn/moments.py: 2c + 1 values. A null shift is 0.
SYNCBN_EXPORT void syncbn_pack_moments(const double* moments, int64_t c, const double* shift,
                                       double* vector);

// Writes the moments of a sum of such vectors, `from_summable` of syncbn/moments.py.
SYNCBN_EXPORT void syncbn_unpack_moments(const double* vector, int64_t c, const double* shift,
                                         double* moments);

// Sets the shift to the means of a sum of such vectors, those that are finite, if there is a sample.
// The sum is about the shift itself, or, not about_shift, about 0; its first 1 + c values are read.
SYNCBN_EXPORT void syncbn_move_shift(const double* vector, int64_t c, int32_t about_shift,
                                     double* shift);

// Adds to a rank's count what `add_fingerprint` of syncbn/comm/fingerprint.py does.
SYNCBN_EXPORT void syncbn_add_fingerprint(const double* shift, int64_t size, int32_t rank,
                                          int32_t world, double* count);

// Writes the statistics of a normalization.
SYNCBN_EXPORT void syncbn_statistics(const double* moments, int64_t c, double eps,
                                     double* statistics);

// Moves running statistics towards a batch's moments; a momentum below 0 stands for the plain
// average over all batches. A batch without samples changes nothing.
SYNCBN_EXPORT void syncbn_update_running(const double* moments, int64_t c, double momentum,
                                         float* running_mean, float* running_var,
                                         int64_t* num_batches_tracked);

// Writes y, to which the residual is added before the ReLU.
SYNCBN_EXPORT void syncbn_normalize(const syncbn_layout* layout, const void* x,
                                    const void* residual,
                                    const syncbn_normalization* normalization, void* y);

// Writes Σdy and Σdy·x̂, 2c values; with relu, of those dy whose y, without a residual, is above 0.
// Where dweight and dbias are not null, writes the same to them, rounded to float32.
SYNCBN_EXPORT void syncbn_backward_reduce(const syncbn_layout* layout, const void* dy,
                                          const void* x,
                                          const syncbn_normalization* normalization, double* sums,
                                          float* dweight, float* dbias);

// Writes dx = weight·invstd·(dy - Σdy/count - x̂·Σdy·x̂/count), of the sums over all ranks.
SYNCBN_EXPORT void syncbn_backward_input(const syncbn_layout* layout, const void* dy,
                                         const void* x,
                                         const syncbn_normalization* normalization,
                                         const double* sums, void* dx);

// Bytes of memory, all zero, that a channel needs.
SYNCBN_EXPORT int64_t syncbn_channel_size(int32_t world, int64_t capacity);

// Posts this rank's n <= capacity values for a round, a part of a vector of `whole` values, and
// collects.
SYNCBN_EXPORT int32_t syncbn_channel_sum(const syncbn_channel* channel, uint32_t round,
                                         const double* values, double* sum, int64_t n,
                                         int64_t whole, int32_t spins, int64_t timeout_us);

// Waits for all ranks' posts of a round and adds them up. Returns -1 when done; the number of a
// rank that has not posted in time or gave up, whereupon it can be called again; or -2 - r if rank
// r posted a vector of another size.
SYNCBN_EXPORT int32_t syncbn_channel_collect(const syncbn_channel* channel, uint32_t round,
                                             double* sum, int64_t n, int64_t whole, int32_t spins,
                                             int64_t timeout_us);

// Lets the others know that this rank posts no more.
SYNCBN_EXPORT void syncbn_channel_give_up(const syncbn_channel* channel);

// Returns whether rank r gave up.
SYNCBN_EXPORT int32_t syncbn_channel_gave_up(const syncbn_channel* channel, int32_t r);

#ifdef __cplusplus
}
#endif
