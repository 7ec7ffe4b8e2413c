// How chunks are shared among threads. fusedopt/backends/chunking.py has the same in Python, and a test compares them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fusedopt {

constexpr int64_t chunk_words = 3;    // row, first element, one past the last; with several axes there are more
constexpr int64_t chunk_cost = 64;    // what starting a chunk costs, in elements
constexpr int64_t grain_cost = 1 << 14; // below this cost a thread is not worth waking

// Bounds of the chunk ranges, one per thread, of nearly equal cost: by prefix sum, not by count.
inline std::vector<int64_t> splits(const int64_t* chunks, int64_t count, int64_t threads, int64_t words = chunk_words) {
  std::vector<int64_t> before(count); // the cost up to and with each chunk
  int64_t total = 0;
  for (int64_t c = 0; c < count; ++c)
    before[c] = total += chunks[c * words + 2] - chunks[c * words + 1] + chunk_cost;
  const int64_t parts = std::max<int64_t>(1, std::min(threads, total / grain_cost));
  std::vector<int64_t> out{0};
  for (int64_t t = 1; t < parts; ++t) {
    const double target = static_cast<double>(t) * (static_cast<double>(total) / static_cast<double>(parts));
    out.push_back(std::upper_bound(before.begin(), before.end(), target,
                                   [](double x, int64_t cost) { return x < static_cast<double>(cost); }) -
                  before.begin());
  }
  out.push_back(count);
  return out;
}

} // namespace fusedopt
