// What the machine can do: AdamW, SGD with momentum and Adagrad as one writes them by hand, for float32 and nothing else.
//
// No callbacks, no tables of types, no checks. A row is a tensor's pointers (parameter, gradient, state). A piece is
// part of a row; `bounds` says which pieces are whose, so that every thread gets the same number of elements.
#include <cmath>
#include <cstdint>

struct Piece {
  int64_t row, begin, end;
};

// decay = 1 - lr * weight_decay; scale = lr / (1 - beta1^t); root = 1 / sqrt(1 - beta2^t)
struct AdamW {
  float decay, beta1, beta1_rest, beta2, beta2_rest, root, eps, scale;
};

static void adamw_piece(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                        int64_t begin, int64_t end, const AdamW s) {
  for (int64_t i = begin; i < end; ++i) {
    const float gradient = g[i];
    m[i] = s.beta1 * m[i] + s.beta1_rest * gradient;
    v[i] = s.beta2 * v[i] + s.beta2_rest * gradient * gradient;
    p[i] = p[i] * s.decay - s.scale * m[i] / (std::sqrt(v[i]) * s.root + s.eps);
  }
}

static void momentum_piece(float* __restrict p, const float* __restrict g, float* __restrict m, int64_t begin,
                           int64_t end, const float lr, const float momentum) {
  for (int64_t i = begin; i < end; ++i) {
    m[i] = momentum * m[i] + g[i];
    p[i] = p[i] - lr * m[i];
  }
}

static void adagrad_piece(float* __restrict p, const float* __restrict g, float* __restrict v, int64_t begin,
                          int64_t end, const float lr, const float eps) {
  for (int64_t i = begin; i < end; ++i) {
    v[i] = v[i] + g[i] * g[i];
    p[i] = p[i] - lr * g[i] / (std::sqrt(v[i]) + eps);
  }
}

extern "C" void adamw(float* const* rows, const Piece* pieces, const int64_t* bounds, int64_t threads,
                      const float* scalars) {
  const AdamW s{scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], scalars[6], scalars[7]};
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t t = 0; t < threads; ++t)
    for (int64_t k = bounds[t]; k < bounds[t + 1]; ++k) {
      float* const* row = rows + pieces[k].row * 4;
      adamw_piece(row[0], row[1], row[2], row[3], pieces[k].begin, pieces[k].end, s);
    }
}

extern "C" void momentum(float* const* rows, const Piece* pieces, const int64_t* bounds, int64_t threads,
                         const float* scalars) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t t = 0; t < threads; ++t)
    for (int64_t k = bounds[t]; k < bounds[t + 1]; ++k) {
      float* const* row = rows + pieces[k].row * 4;
      momentum_piece(row[0], row[1], row[2], pieces[k].begin, pieces[k].end, scalars[0], scalars[1]);
    }
}

extern "C" void adagrad(float* const* rows, const Piece* pieces, const int64_t* bounds, int64_t threads,
                        const float* scalars) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t t = 0; t < threads; ++t)
    for (int64_t k = bounds[t]; k < bounds[t + 1]; ++k) {
      float* const* row = rows + pieces[k].row * 4;
      adagrad_piece(row[0], row[1], row[2], pieces[k].begin, pieces[k].end, scalars[0], scalars[1]);
    }
}
