// Adding up a vector over the processes of one host, in memory that all of them have mapped.
//
// Every rank has two slots, used in turns, and a number that says how many rounds it has posted.
// In a round, a rank writes its values into the slot of that round, raises its number, waits until
// all numbers are as high, and adds the slots up in the order of the ranks, so that all get the
// same bits. Two slots are enough: who has raised its number to k + 1 has read all slots of round
// k - 1, which round k + 1 overwrites.

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

#include "syncbn.h"

namespace {

constexpr int64_t kLine = 128;  // two cache lines, which some processors fetch together

// All zero at first, as new memory is.
struct alignas(kLine) Rank {
  std::atomic<uint32_t> round;    // rounds posted
  std::atomic<uint32_t> waiters;  // processes that sleep until round changes
  std::atomic<uint32_t> gave_up;  // not 0 once this rank will post no more
  int64_t size[2];                // of the whole vector, in values, by slot
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "must work between processes");
static_assert(sizeof(std::atomic<uint32_t>) == 4, "the kernel waits on 32 bits");

int64_t slot_bytes(int64_t capacity) { return (capacity * 8 + kLine - 1) / kLine * kLine; }

Rank& rank_of(const syncbn_channel& channel, int32_t r) {
  return static_cast<Rank*>(channel.base)[r];
}

double* slot_of(const syncbn_channel& channel, int32_t r, uint32_t round) {
  char* slots = static_cast<char*>(channel.base) + channel.world * int64_t{sizeof(Rank)};
  return reinterpret_cast<double*>(slots + (2 * r + round % 2) * slot_bytes(channel.capacity));
}

uint32_t* word(std::atomic<uint32_t>& number) { return reinterpret_cast<uint32_t*>(&number); }

bool arrived(Rank& rank, uint32_t round) {
  // The difference, because numbers start again at 0 after 2^32 rounds.
  return static_cast<int32_t>(rank.round.load(std::memory_order_acquire) - round) >= 0;
}

int64_t now_us() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1000000 + time.tv_nsec / 1000;
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Returns whether the rank arrived: looks, then lets other processes run, then sleeps. While it
// looks it lets them run now and then too: the rank may have been put on this very core.
bool wait_for(Rank& rank, uint32_t round, int32_t spins, int64_t until_us) {
  for (int32_t i = 0; i < spins; ++i) {
    if (arrived(rank, round)) return true;
    if (i % 64 != 63) {
      pause_briefly();
      continue;
    }
    sched_yield();  // which takes long where many processes want this core
    if (now_us() >= until_us) return arrived(rank, round);
  }
  for (int32_t i = 0; i < 32; ++i) {
    if (arrived(rank, round)) return true;
    sched_yield();
    if (now_us() >= until_us) return arrived(rank, round);
  }
  for (;;) {
    const uint32_t seen = rank.round.load(std::memory_order_acquire);
    if (static_cast<int32_t>(seen - round) >= 0) return true;
    const int64_t left_us = until_us - now_us();
    if (left_us <= 0 || rank.gave_up.load(std::memory_order_acquire)) return false;
    const timespec timeout{left_us / 1000000, left_us % 1000000 * 1000};
    // First waiters, then round; the poster writes first round, then reads waiters: one of the two
    // sees the other.
    rank.waiters.fetch_add(1, std::memory_order_seq_cst);
    if (rank.round.load(std::memory_order_seq_cst) == seen)
      syscall(SYS_futex, word(rank.round), FUTEX_WAIT, seen, &timeout, nullptr, 0);
    rank.waiters.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void wake(Rank& rank) {
  if (rank.waiters.load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, word(rank.round), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

int64_t syncbn_channel_size(int32_t world, int64_t capacity) {
  return world * (int64_t{sizeof(Rank)} + 2 * slot_bytes(capacity));
}

int32_t syncbn_channel_collect(const syncbn_channel* channel, uint32_t round, double* sum,
                               int64_t n, int64_t whole, int32_t spins, int64_t timeout_us) {
  int64_t until_us = -1;
  for (int32_t r = 0; r < channel->world; ++r) {
    Rank& rank = rank_of(*channel, r);
    if (r == channel->rank || arrived(rank, round)) continue;
    if (until_us < 0) until_us = now_us() + timeout_us;
    if (!wait_for(rank, round, spins, until_us)) return r;
  }
  for (int32_t r = 0; r < channel->world; ++r)
    if (rank_of(*channel, r).size[round % 2] != whole) return -2 - r;
  std::copy_n(slot_of(*channel, 0, round), n, sum);
  for (int32_t r = 1; r < channel->world; ++r) {
    const double* values = slot_of(*channel, r, round);
    for (int64_t i = 0; i < n; ++i) sum[i] += values[i];
  }
  return -1;
}

int32_t syncbn_channel_sum(const syncbn_channel* channel, uint32_t round, const double* values,
                           double* sum, int64_t n, int64_t whole, int32_t spins,
                           int64_t timeout_us) {
  Rank& mine = rank_of(*channel, channel->rank);
  std::copy_n(values, n, slot_of(*channel, channel->rank, round));
  mine.size[round % 2] = whole;
  mine.round.store(round, std::memory_order_seq_cst);
  wake(mine);
  return syncbn_channel_collect(channel, round, sum, n, whole, spins, timeout_us);
}

void syncbn_channel_give_up(const syncbn_channel* channel) {
  Rank& mine = rank_of(*channel, channel->rank);
  mine.gave_up.store(1, std::memory_order_seq_cst);
  syscall(SYS_futex, word(mine.round), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int32_t syncbn_channel_gave_up(const syncbn_channel* channel, int32_t r) {
  return static_cast<int32_t>(
      rank_of(*channel, r).gave_up.load(std::memory_order_acquire));
}
