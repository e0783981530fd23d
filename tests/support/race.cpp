// What scripts/dev/sanitize.py runs under ThreadSanitizer and on arm64: ranks as threads of one
// process, loops shared among threads, and results beside those of a plain loop in float64.
//
// race ROUNDS     exits with 0, or says what is wrong and exits with 1

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "syncbn.h"

namespace {

void require(bool holds, const char* what, double got = 0, double expected = 0) {
  if (holds) return;
  std::fprintf(stderr, "race: %s: got %.17g, expected %.17g\n", what, got, expected);
  std::_Exit(1);
}

using Random = std::mt19937;

double uniform(Random& random, double from, double to) {
  return from + (to - from) * (static_cast<double>(random()) / 4294967296.0);
}

// --- the channel ---

constexpr int32_t kWorld = 4;
constexpr int64_t kCapacity = 67;

// Memory as ranks have it: mapped, all zero.
void* new_memory() {
  const auto size = static_cast<size_t>(syncbn_channel_size(kWorld, kCapacity));
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  require(base != MAP_FAILED, "mmap failed");
  return base;
}

syncbn_channel channel_of(void* base, int32_t rank) { return {base, kCapacity, kWorld, rank}; }

// In steps of one, slots in turns, as Python counts; but numbers start again at 0 on the way, which
// they do not reach in a test's time unless the first two steps are big ones.
uint32_t number(int i) { return i == 0 ? 0x7fffffffu : 0xffffffefu + static_cast<uint32_t>(i); }

void be_rank(void* base, int32_t me, int rounds, int32_t spins) {
  const syncbn_channel channel = channel_of(base, me);
  Random random(static_cast<uint32_t>(me));
  std::vector<double> values(kCapacity), sum(kCapacity);
  for (int i = 0; i < rounds; ++i) {
    const int64_t n = i * 31 % (kCapacity + 1), whole = n + 1000;
    // Small whole numbers, which add up exactly.
    for (int64_t j = 0; j < n; ++j) values[j] = static_cast<double>((me + 1) * (i + j));
    const uint32_t chance = random() % 32;
    if (chance == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    if (chance < 8) std::this_thread::yield();
    // Some time-outs are over before the others come.
    const int64_t timeout_us = chance % 2 ? 50 : 50000;
    int32_t state = syncbn_channel_sum(&channel, number(i), values.data(), sum.data(), n, whole,
                                       spins, timeout_us);
    while (state >= 0)
      state = syncbn_channel_collect(&channel, number(i), sum.data(), n, whole, spins, timeout_us);
    require(state == -1, "state of a round", state, -1);
    for (int64_t j = 0; j < n; ++j) {
      const double expected = static_cast<double>(kWorld * (kWorld + 1) / 2 * (i + j));
      require(sum[j] == expected, "sum over the ranks", sum[j], expected);
    }
  }
}

void check_channels(int rounds) {
  std::vector<std::thread> ranks;
  for (int32_t spins : {0, 1000}) {  // at once, a channel each
    void* base = new_memory();
    for (int32_t r = 0; r < kWorld; ++r) ranks.emplace_back(be_rank, base, r, rounds, spins);
  }
  for (std::thread& rank : ranks) rank.join();
}

// The others must see it, whether they sleep already or come later.
void check_giving_up(int times) {
  for (int i = 0; i < times; ++i) {
    void* base = new_memory();
    std::vector<std::thread> ranks;
    for (int32_t r = 1; r < kWorld; ++r)
      ranks.emplace_back([=] {
        const syncbn_channel channel = channel_of(base, r);
        const double value = 1.0;
        double sum;
        int32_t state = syncbn_channel_sum(&channel, 1, &value, &sum, 1, 1, i % 2 * 1000, 10000);
        while (!syncbn_channel_gave_up(&channel, 0)) {
          require(state == 0, "the rank that is missing", state, 0);
          state = syncbn_channel_collect(&channel, 1, &sum, 1, 1, 0, 10000);
        }
        require(!syncbn_channel_gave_up(&channel, r), "one that did not give up");
      });
    std::this_thread::sleep_for(std::chrono::microseconds(i % 10 * 100));
    const syncbn_channel channel = channel_of(base, 0);
    syncbn_channel_give_up(&channel);
    for (std::thread& rank : ranks) rank.join();
  }
}

// --- the kernels ---

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

size_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// Half of the distance between 1 and the next larger value.
double epsilon(DType dtype) {
  return std::ldexp(1.0, dtype == kFloat32 ? -24 : dtype == kBFloat16 ? -8 : -11);
}

double half_value(DType dtype, uint16_t bits) {
  const int digits = dtype == kBFloat16 ? 7 : 10, bias = dtype == kBFloat16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  double value;
  if (exponent == 2 * bias + 1)
    value = fraction ? std::numeric_limits<double>::quiet_NaN()
                     : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    value = std::ldexp(fraction, 1 - bias - digits);
  else
    value = std::ldexp(fraction + (1 << digits), exponent - bias - digits);
  return bits & 0x8000 ? -value : value;
}

using Values = std::vector<double>;
using Bytes = std::vector<char>;

struct Tensor {
  DType dtype;
  Bytes bytes;

  Tensor(DType dtype, int64_t size) : dtype(dtype), bytes(size * size_of(dtype)) {}

  const void* data() const { return bytes.data(); }

  double operator[](int64_t i) const {
    float value;
    uint16_t bits;
    std::memcpy(&bits, bytes.data() + i * size_of(dtype), 2);
    if (dtype != kFloat32) return half_value(dtype, bits);
    std::memcpy(&value, bytes.data() + i * 4, 4);
    return static_cast<double>(value);
  }

  // Below 4; of half precision, any value from 2^-7 on and its negative.
  void draw(int64_t i, Random& random) {
    const float value = static_cast<float>(uniform(random, -4, 4));
    const uint32_t magnitude = dtype == kBFloat16 ? (120u << 7) + random() % (9u << 7)
                                                  : (8u << 10) + random() % (9u << 10);
    const uint16_t bits = static_cast<uint16_t>(magnitude | (random() & 0x8000u));
    char* to = bytes.data() + i * size_of(dtype);
    dtype == kFloat32 ? std::memcpy(to, &value, 4) : std::memcpy(to, &bits, 2);
  }
};

// Vectors of first one value for each channel, then another.
struct Results {
  Values moments, sums;
  std::vector<float> rounded;
  Bytes y, dx;

  bool operator==(const Results& o) const {
    return moments == o.moments && sums == o.sums && rounded == o.rounded && y == o.y &&
           dx == o.dx;
  }
};

struct Case {
  DType dtype;
  int64_t n, c, s;
  bool channels_last, relu, fused;  // with weight, bias and residual
  Tensor x, dy, residual;
  Values statistics;
  std::vector<float> weight, bias;

  Case(DType dtype, int64_t n, int64_t c, int64_t s, bool channels_last, bool relu, bool fused)
      : dtype(dtype), n(n), c(c), s(s), channels_last(channels_last), relu(relu), fused(fused),
        x(dtype, n * c * s), dy(x), residual(x), statistics(2 * c + 1), weight(c), bias(c) {
    Random random(static_cast<uint32_t>(dtype));
    statistics[0] = static_cast<double>(n * s);
    for (int64_t j = 0; j < c; ++j) {
      statistics[1 + j] = uniform(random, -1, 1);
      statistics[1 + c + j] = uniform(random, 0.5, 2);
      weight[j] = static_cast<float>(uniform(random, -2, 2));
      bias[j] = static_cast<float>(uniform(random, -1, 1));
    }
    for (int64_t i = 0; i < n * c * s; ++i) {
      dy.draw(i, random);
      residual.draw(i, random);
      // So far from 0 that no rounding decides what the ReLU lets through.
      do x.draw(i, random);
      while (std::abs(affine(i)) < 1e-3);
    }
  }

  int64_t channel(int64_t i) const { return channels_last ? i % c : i / s % c; }
  double mean(int64_t j) const { return statistics[1 + j]; }
  double invstd(int64_t j) const { return statistics[1 + c + j]; }
  double xhat(int64_t i) const { return (x[i] - mean(channel(i))) * invstd(channel(i)); }
  double weight_at(int64_t j) const { return fused ? static_cast<double>(weight[j]) : 1.0; }
  double bias_at(int64_t j) const { return fused ? static_cast<double>(bias[j]) : 0.0; }
  double affine(int64_t i) const {
    return xhat(i) * weight_at(channel(i)) + bias_at(channel(i));
  }
  double gated(int64_t i) const { return relu && affine(i) < 0 ? 0.0 : dy[i]; }

  Results compute(int32_t threads) const {
    Results to{Values(2 * c + 1), Values(2 * c), std::vector<float>(2 * c), Bytes(x.bytes.size()),
               Bytes(x.bytes.size())};
    const syncbn_layout layout{n, c, s, dtype, channels_last, threads};
    const syncbn_normalization by{statistics.data(), fused ? weight.data() : nullptr,
                                  fused ? bias.data() : nullptr, 0, relu};
    syncbn_local_moments(&layout, x.data(), to.moments.data());
    syncbn_normalize(&layout, x.data(), fused ? residual.data() : nullptr, &by, to.y.data());
    syncbn_backward_reduce(&layout, dy.data(), x.data(), &by, to.sums.data(), to.rounded.data() + c,
                           to.rounded.data());
    syncbn_backward_input(&layout, dy.data(), x.data(), &by, to.sums.data(), to.dx.data());
    return to;
  }

  void check(const Results& got) const {
    const double count = static_cast<double>(n * s);
    Values m(c), m2(c), sum_dy(c), sum_dy_xhat(c);
    for (int64_t i = 0; i < n * c * s; ++i) {
      m[channel(i)] += x[i] / count;
      sum_dy[channel(i)] += gated(i);
      sum_dy_xhat[channel(i)] += gated(i) * xhat(i);
    }
    for (int64_t i = 0; i < n * c * s; ++i) {
      const double deviation = x[i] - m[channel(i)];
      m2[channel(i)] += deviation * deviation;
    }
    // Values are below 4 and x̂ below 10, so that these are generous roundings of float32's.
    const double sums = 1e-6 * count;
    near("count", got.moments[0], count, 0);
    for (int64_t j = 0; j < c; ++j) {
      near("mean", got.moments[1 + j], m[j], 1e-6);
      near("m2", got.moments[1 + c + j], m2[j], sums);
      near("Σdy", got.sums[j], sum_dy[j], sums);
      near("Σdy·x̂", got.sums[c + j], sum_dy_xhat[j], 10 * sums);
      near("Σdy in float32", static_cast<double>(got.rounded[j]), sum_dy[j], sums);
      near("Σdy·x̂ in float32", static_cast<double>(got.rounded[c + j]), sum_dy_xhat[j],
           10 * sums);
    }
    Tensor y(x), dx(x);
    y.bytes = got.y;
    dx.bytes = got.dx;
    for (int64_t i = 0; i < n * c * s; ++i) {
      const int64_t j = channel(i);
      double expected = affine(i) + (fused ? residual[i] : 0.0);
      if (relu && expected < 0) expected = 0.0;
      near("y", y[i], expected, 1e-5 + epsilon(dtype) * std::abs(expected));
      expected = weight_at(j) * invstd(j) *
                 (gated(i) - sum_dy[j] / count - xhat(i) * sum_dy_xhat[j] / count);
      near("dx", dx[i], expected, 1e-5 + epsilon(dtype) * std::abs(expected));
    }
  }

  void near(const char* what, double got, double expected, double tolerance) const {
    if (std::abs(got - expected) <= tolerance) return;  // and not for NaN
    std::fprintf(stderr, "dtype %d, channels last %d, relu %d, fused %d\n", dtype, channels_last,
                 relu, fused);
    require(false, what, got, expected);
  }
};

// Every value, subnormal, infinite or none, comes through as it is.
void check_every_half() {
  for (DType dtype : {kBFloat16, kFloat16}) {
    Tensor x(dtype, 65536), y(x);
    for (uint32_t i = 0; i < 65536; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i);
      std::memcpy(x.bytes.data() + 2 * i, &bits, 2);
    }
    const double statistics[3] = {65536.0, 0.0, 1.0};
    const syncbn_layout layout{1, 1, 65536, dtype, 0, 1};
    const syncbn_normalization by{statistics, nullptr, nullptr, 0, 0};
    syncbn_normalize(&layout, x.data(), nullptr, &by, y.bytes.data());
    for (int64_t i = 0; i < 65536; ++i)
      require(y[i] == x[i] || (std::isnan(y[i]) && std::isnan(x[i])), "value read and written",
              y[i], x[i]);
  }
}

// Loop(case) for every combination, of tensors of one size.
template <typename LoopT>
void every_case(int64_t n, int64_t c, int64_t s, const LoopT& loop) {
  for (DType dtype : {kFloat32, kBFloat16, kFloat16})
    for (int kind = 0; kind < 8; ++kind)
      loop(Case(dtype, n, c, s, kind & 1, kind & 2, kind & 4));
}

void check_kernels() {
  for (int32_t level : {0, 1, 2}) {
    syncbn_limit_level(level);
    check_every_half();
    // Rows and channels that no vector's width divides.
    every_case(3, 29, 37, [](const Case& of) { of.check(of.compute(1)); });
  }
}

// Two threads at once, each of which wants several more for its loops.
void check_sharing() {
  every_case(4, 40, 1029, [](const Case& of) {
    const Results alone = of.compute(1);
    of.check(alone);
    const auto repeat = [&] {
      for (int32_t i = 0; i < 6; ++i)
        require(of.compute(2 + i % 3) == alone, "results depend on the number of threads");
    };
    std::thread other(repeat);
    repeat();
    other.join();
  });
}

void announce(const char* part) {
  std::printf("  %s\n", part);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 1000;
  alarm(900);  // ends the process where a round that is lost is waited for
  announce("two channels of four ranks");
  check_channels(rounds);
  announce("a rank that gives up");
  check_giving_up(50);
  announce("kernels beside plain loops");
  check_kernels();
  announce("kernels by several threads, from two at once");
  check_sharing();
}
