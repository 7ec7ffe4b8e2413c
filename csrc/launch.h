// A launch on the CPU: the tables that compiled stages walk, of which rows can be switched off and on.
#pragma once

#include "chunks.h"
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace fusedopt {

// A row of a table is a tensor: these words, then a pointer per buffer.
namespace word {
enum : int64_t { numel, set, first_chunk, chunks, head };
}

// What a compiled stage is handed; kernels/cpu.cpp declares the same.
struct Tables {
  const int64_t* rows;
  const int64_t* chunks;
  double* partials;     // chunks x reductions
  const double* slots;  // scalar sets x slots
  int64_t row_words, n_slots, n_reductions;
  double* results;
  int64_t chunk_words;
};

// A compiled stage: items [begin, end) of what the tables describe. It cannot throw.
using Stage = void (*)(const void* tables, int64_t begin, int64_t end);

// What was run in this process: for those who count or time launches.
struct Meter {
  std::atomic<int64_t> stages = 0, nanoseconds = 0;
};
inline Meter meter;

// A stretch of time in which stages run.
class Metered {
 public:
  explicit Metered(size_t stages) { meter.stages += static_cast<int64_t>(stages); }
  Metered(const Metered&) = delete;
  ~Metered() {
    meter.nanoseconds += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Without the GIL. A later stage reads what an earlier one reduced: the end of `parallel_for` is the barrier.
// cost: about how many nanoseconds one thread takes for all of it.
inline void run_stage(uintptr_t entry, const void* tables, const std::vector<int64_t>& bounds, int64_t cost) {
  const auto stage = reinterpret_cast<Stage>(entry);
  // Grain 1: each range was made worth a thread. One range, or a call from inside another parallel region, runs here.
  parallel_for(static_cast<int64_t>(bounds.size()) - 1, 1, cost, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      stage(tables, bounds[t], bounds[t + 1]);
  });
}

// The launch of one kernel. `rows` and `all_chunks` are tables in the caller's memory, as fusedopt/backends/base.py makes them.
class Launch {
 public:
  // before: for each stage what is done once per row before it; 0: nothing
  Launch(std::vector<uintptr_t> stages, std::vector<uintptr_t> before, uintptr_t scalars, uintptr_t rows, int64_t n_rows,
         int64_t row_words, uintptr_t chunks, int64_t n_chunks, int64_t chunk_words, int64_t n_slots,
         int64_t n_reductions, int64_t n_results)
      : stages_(std::move(stages)), before_(std::move(before)), scalars_(scalars),
        rows_(reinterpret_cast<int64_t*>(rows)), n_rows_(n_rows),
        all_chunks_(reinterpret_cast<const int64_t*>(chunks)), n_chunks_(n_chunks), results_(n_results),
        tables_{rows_, nullptr, nullptr, nullptr, row_words, n_slots, n_reductions, results_.data(), chunk_words} {
    for (int64_t r = 0; r < n_rows_; ++r)
      numel_.push_back(row(r)[word::numel]);
  }

  int64_t size() const { return n_rows_; }
  int64_t slots() const { return tables_.n_slots; }
  int64_t* row(int64_t r) const { return rows_ + r * tables_.row_words; }
  int64_t numel(int64_t r) const { return numel_[r]; }

  // Switch rows on or off, on(r), for this many threads. Nothing happens where all of it is as it was.
  template <class On>
  void select(int64_t threads, const On& on) {
    bool same = threads == threads_;
    on_.resize(n_rows_, 2);
    for (int64_t r = 0; r < n_rows_; ++r) {
      const uint8_t now = on(r);
      same &= now == on_[r];
      on_[r] = now;
    }
    if (same)
      return;
    threads_ = threads;
    chunks_.clear();
    int64_t r = 0;
    const auto begin = [&](int64_t row_of_chunk) { // rows in order, those without chunks too
      for (; r <= row_of_chunk && r < n_rows_; ++r) {
        row(r)[word::numel] = on_[r] ? numel_[r] : 0;
        row(r)[word::first_chunk] = static_cast<int64_t>(chunks_.size()) / tables_.chunk_words;
        row(r)[word::chunks] = 0;
      }
    };
    for (int64_t c = 0; c < n_chunks_; ++c) {
      const int64_t* chunk = all_chunks_ + c * tables_.chunk_words;
      begin(chunk[0]);
      if (on_[chunk[0]]) {
        chunks_.insert(chunks_.end(), chunk, chunk + tables_.chunk_words);
        ++row(chunk[0])[word::chunks];
      }
    }
    begin(n_rows_);
    const auto count = static_cast<int64_t>(chunks_.size()) / tables_.chunk_words;
    partials_.resize(count * tables_.n_reductions);
    bounds_ = splits(chunks_.data(), count, threads, tables_.chunk_words);
    cost_ = 0;
    for (int64_t c = 0; c < count; ++c)
      cost_ += chunks_[c * tables_.chunk_words + 2] - chunks_[c * tables_.chunk_words + 1] + chunk_cost;
    std::vector<int64_t> whole; // rows as if each were a chunk
    for (int64_t row_of = 0; row_of < n_rows_; ++row_of)
      whole.insert(whole.end(), {row_of, 0, row(row_of)[word::numel]});
    by_row_ = splits(whole.data(), n_rows_, has_between() ? threads : 1);
    tables_.chunks = chunks_.data();
    tables_.partials = partials_.data();
  }

  // sets x slots doubles to be filled before `run`.
  double* make_slots(size_t sets) {
    slots_.resize(sets * tables_.n_slots);
    tables_.slots = slots_.data();
    return slots_.data();
  }

  // Those of another launch, with the same rows.
  void share_slots(const Launch& other) { tables_.slots = other.tables_.slots; }

  // Whether what is done once per row goes over more than a few numbers.
  bool has_between() const { return tables_.chunk_words > chunk_words || !results_.empty(); }

  void run() const {
    if (!chunks_.empty()) {
      const auto extra = std::count_if(before_.begin(), before_.end(), [](uintptr_t f) { return f != 0; });
      const Metered metered(stages_.size() + extra + (scalars_ != 0));
      for (size_t k = 0; k < stages_.size(); ++k) {
        if (before_[k] != 0)
          run_stage(before_[k], &tables_, by_row_, cost_);
        run_stage(stages_[k], &tables_, bounds_, cost_);
      }
      if (scalars_ != 0)
        run_stage(scalars_, &tables_, by_row_, cost_);
    }
  }

 private:
  std::vector<uintptr_t> stages_, before_;
  uintptr_t scalars_; // of what there is one number of per row; 0: nothing
  int64_t* rows_;
  int64_t n_rows_;
  const int64_t* all_chunks_;
  int64_t n_chunks_;
  std::vector<double> results_;
  Tables tables_;
  std::vector<int64_t> numel_, chunks_, bounds_, by_row_;
  std::vector<uint8_t> on_;
  std::vector<double> partials_, slots_;
  int64_t threads_ = 0, cost_ = 0;
};

} // namespace fusedopt
