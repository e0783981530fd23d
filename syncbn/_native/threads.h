// Sharing a loop among threads that stay for the next one.
#pragma once

#include <cstdint>
#include <functional>

namespace syncbn {

// Calls task(0) to task(tasks - 1), each once, on up to that many threads, and returns when all are
// done. Which thread takes which task is open: a task's result must not depend on it. Another
// thread's loop in progress makes this one run on the calling thread alone.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

}  // namespace syncbn
