#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace syncbn {
namespace {

// One loop: workers that come late to it find no task left.
struct Loop {
  const std::function<void(int64_t)>* task;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> finished{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      (*task)(i);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

class Pool {
 public:
  void run(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
    const auto loop = std::make_shared<Loop>();
    loop->task = &task;
    loop->tasks = tasks;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        const int number = static_cast<int>(workers_.size());
        workers_.emplace_back([this, number] { serve(number); });
        workers_.back().detach();  // the process may end at any time; a worker then just ends too
      }
      loop_ = loop;
      wanted_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    loop->work();
    // The tasks that are left are being worked on: a few microseconds.
    while (loop->finished.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
  }

 private:
  void serve(int number) {
    uint64_t seen = 0;
    for (;;) {
      std::shared_ptr<Loop> loop;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (number >= wanted_) continue;
        loop = loop_;
      }
      loop->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::shared_ptr<Loop> loop_;
  int wanted_ = 0;
  uint64_t generation_ = 0;
};

std::mutex turn;
// Never destroyed: detached workers wait in it until the process ends.
Pool* pool = nullptr;
pid_t owner = 0;

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  std::unique_lock<std::mutex> lock(turn, std::defer_lock);
  if (threads <= 1 || tasks <= 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  if (owner != getpid()) {  // threads do not survive a fork
    pool = new Pool;
    owner = getpid();
  }
  pool->run(tasks, threads, task);
}

}  // namespace syncbn
