// ranger
using T = float;

// Stage 1 of 1: reads param, grad; writes param, grad_avg, slow, sqr_avg; 12 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // (-lr / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s2 = T(row.slot(launch, 2));              // mom
  const T s3 = T(row.slot(launch, 3));              // (1 - mom)
  const T s4 = T(row.slot(launch, 4));              // sqr_mom
  const T s5 = T(row.slot(launch, 5));              // (1 - sqr_mom)
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict slow = row.buffer<bfloat16>(3);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(4);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v5 = T(0.0);                              // average_grad
    const T v7 = v5 * s2;                             // average_grad
    const T v9 = load<T>(grad, i);
    const T v10 = s3 * v9;                            // average_grad
    const T v11 = v7 + v10;                           // average_grad
    const T v12 = s1 * v11;                           // radam_step
    const T v13 = v2 + v12;                           // radam_step
    const T v15 = v5 * s4;                            // average_sqr_grad
    const T v17 = s5 * v9;                            // average_sqr_grad
    const T v18 = v17 * v9;                           // average_sqr_grad
    const T v19 = v15 + v18;                          // average_sqr_grad
    store(param, i, v13);
    store(grad_avg, i, v11);
    store(slow, i, v0);
    store(sqr_avg, i, v19);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, slow, sqr_avg);
}
FUSEDOPT_STAGE(0)

// ranger
using T = float;

// Stage 1 of 1: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 14 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // (-lr / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s2 = T(row.slot(launch, 2));              // mom
  const T s3 = T(row.slot(launch, 3));              // (1 - mom)
  const T s4 = T(row.slot(launch, 4));              // sqr_mom
  const T s5 = T(row.slot(launch, 5));              // (1 - sqr_mom)
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v4 = load<T>(grad_avg, i);
    const T v6 = v4 * s2;                             // average_grad
    const T v8 = load<T>(grad, i);
    const T v9 = s3 * v8;                             // average_grad
    const T v10 = v6 + v9;                            // average_grad
    const T v11 = s1 * v10;                           // radam_step
    const T v12 = v2 + v11;                           // radam_step
    const T v13 = load<T>(sqr_avg, i);
    const T v15 = v13 * s4;                           // average_sqr_grad
    const T v17 = s5 * v8;                            // average_sqr_grad
    const T v18 = v17 * v8;                           // average_sqr_grad
    const T v19 = v15 + v18;                          // average_sqr_grad
    store(param, i, v12);
    store(grad_avg, i, v10);
    store(sqr_avg, i, v19);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)

// ranger
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads slow, param, grad_avg, grad, sqr_avg; writes param, grad_avg, slow, sqr_avg; 18 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // lookahead_alpha
  const T s1 = T(row.slot(launch, 1));              // (1 - (lr * wd))
  const T s2 = T(row.slot(launch, 2));              // ((-lr * ((((((((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))) - 4) * ((((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))) - 2)) * ((2 / (1 - sqr_mom)) - 1)) / (((((2 / (1 - sqr_mom)) - 1) - 4) * (((2 / (1 - sqr_mom)) - 1) - 2)) * (((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))))) ** 0.5)) / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s3 = T(row.slot(launch, 3));              // mom
  const T s4 = T(row.slot(launch, 4));              // (1 - mom)
  const T s5 = T(row.slot(launch, 5));              // sqr_mom
  const T s6 = T(row.slot(launch, 6));              // (1 - sqr_mom)
  const T s7 = T(row.slot(launch, 7));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s8 = T(row.slot(launch, 8));              // eps
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict slow = row.buffer<bfloat16>(3);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(4);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(slow, i);
    const T v2 = load<T>(param, i);
    const T v4 = v2 * s1;                             // weight_decay
    const T v6 = load<T>(grad_avg, i);
    const T v8 = v6 * s3;                             // average_grad
    const T v10 = load<T>(grad, i);
    const T v11 = s4 * v10;                           // average_grad
    const T v12 = v8 + v11;                           // average_grad
    const T v13 = s2 * v12;                           // radam_step
    const T v14 = load<T>(sqr_avg, i);
    const T v16 = v14 * s5;                           // average_sqr_grad
    const T v18 = s6 * v10;                           // average_sqr_grad
    const T v19 = v18 * v10;                          // average_sqr_grad
    const T v20 = v16 + v19;                          // average_sqr_grad
    const T v22 = v20 / s7;                           // radam_step
    const T v23 = ::sqrt(v22);                        // radam_step
    const T v25 = v23 + s8;                           // radam_step
    const T v26 = v13 / v25;                          // radam_step
    const T v27 = v4 + v26;                           // radam_step
    const T v28 = v27 - v0;                           // lookahead
    const T v29 = s0 * v28;                           // lookahead
    const T v30 = v0 + v29;                           // lookahead
    store(param, i, v30);
    store(grad_avg, i, v12);
    store(slow, i, v30);
    store(sqr_avg, i, v20);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, slow, sqr_avg);
}
FUSEDOPT_STAGE(0)

// ranger
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 14 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // ((-lr * ((((((((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))) - 4) * ((((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))) - 2)) * ((2 / (1 - sqr_mom)) - 1)) / (((((2 / (1 - sqr_mom)) - 1) - 4) * (((2 / (1 - sqr_mom)) - 1) - 2)) * (((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))))) ** 0.5)) / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s2 = T(row.slot(launch, 2));              // mom
  const T s3 = T(row.slot(launch, 3));              // (1 - mom)
  const T s4 = T(row.slot(launch, 4));              // sqr_mom
  const T s5 = T(row.slot(launch, 5));              // (1 - sqr_mom)
  const T s6 = T(row.slot(launch, 6));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s7 = T(row.slot(launch, 7));              // eps
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v4 = load<T>(grad_avg, i);
    const T v6 = v4 * s2;                             // average_grad
    const T v8 = load<T>(grad, i);
    const T v9 = s3 * v8;                             // average_grad
    const T v10 = v6 + v9;                            // average_grad
    const T v11 = s1 * v10;                           // radam_step
    const T v12 = load<T>(sqr_avg, i);
    const T v14 = v12 * s4;                           // average_sqr_grad
    const T v16 = s5 * v8;                            // average_sqr_grad
    const T v17 = v16 * v8;                           // average_sqr_grad
    const T v18 = v14 + v17;                          // average_sqr_grad
    const T v20 = v18 / s6;                           // radam_step
    const T v21 = ::sqrt(v20);                        // radam_step
    const T v23 = v21 + s7;                           // radam_step
    const T v24 = v11 / v23;                          // radam_step
    const T v25 = v2 + v24;                           // radam_step
    store(param, i, v25);
    store(grad_avg, i, v10);
    store(sqr_avg, i, v18);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)
