// The threads that CPU launches run on: those of the OpenMP runtime that torch has loaded, and no others.
//
// What at::parallel_for does, but for the pragma: compiled by clang that would start the threads of LLVM's runtime
// while torch's own answers how many there are and which one is asking, and every thread would do all the work. Nor are
// OpenMP's headers needed. GOMP_parallel is what GCC makes of the pragma, and LLVM's and Intel's runtimes have it too.

#pragma once

#include <ATen/Parallel.h>

#include <pthread.h>

#include <algorithm>
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

// f(first, last) over ascending parts of [0, count), which together are all of it, `grain` or more in each but the last.
// `f` must not throw.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= std::max<int64_t>(grain, 1) || forked() || at::get_num_threads() < 2 || at::in_parallel_region()) {
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
}

} // namespace fusedopt
