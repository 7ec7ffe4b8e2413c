// The threads that CPU launches run on: those of the OpenMP runtime that torch has loaded, and no others.
//
// What at::parallel_for does, but for the pragma: compiled by clang that would start the threads of LLVM's runtime
// while torch's own answers how many there are and which one is asking, and every thread would do all the work. Nor are
// OpenMP's headers needed. GOMP_parallel is what GCC makes of the pragma, and LLVM's and Intel's runtimes have it too.

#pragma once

#include <ATen/Parallel.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace fusedopt {

// Whether this process is a forked child. It has inherited the thread pool of OpenMP and none of its threads, so that a
// parallel region would wait for ever.
inline bool& forked() {
  static bool value = false;
  return value;
}
inline const int forks_are_watched = pthread_atfork(nullptr, nullptr, [] { forked() = true; });

// Whether other work keeps the cores busy, as data loaders do. The threads of a region wait for one another, and one
// that has no core gets one when somebody's time slice is over: milliseconds, for a region of microseconds. So regions
// that are short on one thread stay on one for a while when one of them has taken that long, and for ever longer while
// this goes on.
class Contention {
 public:
  static constexpr int64_t slice = 1'000'000, shortest = 16 * slice, longest = 1024 * slice; // nanoseconds

  static int64_t now() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

  bool lasts(int64_t now) const { return now < until_.load(std::memory_order_relaxed); }

  // A region has ended that was to take less than a slice.
  void note(int64_t begin, int64_t end) {
    const int64_t before = pause_.load(std::memory_order_relaxed);
    const bool late = end - begin > 2 * slice;
    const int64_t pause = late ? std::clamp(2 * before, shortest, longest) : before / 2;
    pause_.store(pause, std::memory_order_relaxed);
    if (late)
      until_.store(end + pause, std::memory_order_relaxed);
  }

 private:
  std::atomic<int64_t> until_ = 0, pause_ = 0;
};
inline Contention contention;

// f(first, last) over ascending parts of [0, count), which together are all of it, `grain` or more in each but the last.
// `f` must not throw. cost: about how many nanoseconds one thread takes for all of it
template <class F>
void parallel_for(int64_t count, int64_t grain, int64_t cost, const F& f) {
  bool alone = count <= std::max<int64_t>(grain, 1) || forked() || at::get_num_threads() < 2 || at::in_parallel_region();
  const bool is_short = !alone && cost < Contention::slice;
  const int64_t begin = is_short ? Contention::now() : 0;
  alone |= is_short && contention.lasts(begin);
  if (alone) {
    if (count > 0)
      f(int64_t{0}, count);
    return;
  }
  struct Work {
    const F& f;
    int64_t count, grain;
  } work{f, count, grain};
  const auto part = [](void* data) {
    const auto& work = *static_cast<const Work*>(data);
    const int64_t threads = omp_get_num_threads();
    const int64_t size = std::max((work.count + threads - 1) / threads, work.grain);
    const int64_t first = omp_get_thread_num() * size;
    if (first < work.count)
      work.f(first, std::min(first + size, work.count));
  };
  GOMP_parallel(part, &work, 0, 0); // 0 threads: as many as torch.set_num_threads has said
  if (is_short)
    contention.note(begin, Contention::now());
}

} // namespace fusedopt
