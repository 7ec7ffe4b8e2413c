// The compiled stages of launches.
#pragma once

#include "parallel.h"

#include <cstdint>
#include <vector>

namespace fusedopt {

// A compiled stage: rows [begin, end) of what `launch` describes. It cannot throw.
using Stage = void (*)(const void* launch, int64_t begin, int64_t end);

// A launch: the stages' addresses, what they read, and for each of them the bounds of its ranges.
struct Stages {
  std::vector<uintptr_t> entries;
  uintptr_t launch;
  std::vector<std::vector<int64_t>> splits;

  // Without the GIL. A later stage reads what an earlier one reduced: the end of `parallel_for` is the barrier.
  void run() const {
    for (size_t k = 0; k < entries.size(); ++k) {
      const auto stage = reinterpret_cast<Stage>(entries[k]);
      const auto& split = splits[k];
      // Grain 1: the planner has already made each range worth a thread. One range, or a call from
      // inside another parallel region, runs right here.
      parallel_for(static_cast<int64_t>(split.size()) - 1, 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          stage(reinterpret_cast<const void*>(launch), split[t], split[t + 1]);
      });
    }
  }
};

} // namespace fusedopt
