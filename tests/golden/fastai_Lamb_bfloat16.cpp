// Lamb
using T = float;
FUSEDOPT_FUNCTION(sqrt)
FUSEDOPT_REDUCTION(mean_, 0.0, a + b)

// Stage 1 of 2: reads param, grad_avg, grad, sqr_avg; reduces; 8 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // mom
  const T s2 = T(row.slot(launch, 2));              // (1 - mom)
  const T s3 = T(row.slot(launch, 3));              // (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom))
  const T s4 = T(row.slot(launch, 4));              // sqr_mom
  const T s5 = T(row.slot(launch, 5));              // (1 - sqr_mom)
  const T s6 = T(row.slot(launch, 6));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s7 = T(row.slot(launch, 7));              // eps
  const bfloat16* __restrict param = row.buffer<const bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  const bfloat16* __restrict grad_avg = row.buffer<const bfloat16>(2);
  const bfloat16* __restrict sqr_avg = row.buffer<const bfloat16>(3);
  Lanes<mean_> acc0;
  Lanes<mean_> acc1;
  const auto element = [&](int64_t i, int lane) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v3 = load<T>(grad_avg, i);
    const T v5 = v3 * s1;                             // average_grad
    const T v7 = load<T>(grad, i);
    const T v8 = s2 * v7;                             // average_grad
    const T v9 = v5 + v8;                             // average_grad
    const T v11 = v9 / s3;                            // lamb_step
    const T v12 = load<T>(sqr_avg, i);
    const T v14 = v12 * s4;                           // average_sqr_grad
    const T v16 = s5 * v7;                            // average_sqr_grad
    const T v17 = v16 * v7;                           // average_sqr_grad
    const T v18 = v14 + v17;                          // average_sqr_grad
    const T v20 = v18 / s6;                           // lamb_step
    const T v21 = ::sqrt(v20);                        // lamb_step
    const T v23 = v21 + s7;                           // lamb_step
    const T v24 = v11 / v23;                          // lamb_step
    const T v25 = v2 * v2;                            // lamb_step
    const T v31 = v24 * v24;                          // lamb_step
    acc0.add(lane, v25);
    acc1.add(lane, v31);
  };
  for_lanes(begin, end, element, param, grad, grad_avg, sqr_avg);
  partial[0] = acc0.total();
  partial[1] = acc1.total();
}
FUSEDOPT_STAGE(0)

// Stage 2 of 2: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 14 bytes per element.
static void stage_1([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // mom
  const T s2 = T(row.slot(launch, 2));              // (1 - mom)
  const T s3 = T(row.slot(launch, 3));              // (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom))
  const T s4 = T(row.slot(launch, 4));              // sqr_mom
  const T s5 = T(row.slot(launch, 5));              // (1 - sqr_mom)
  const T s6 = T(row.slot(launch, 6));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s7 = T(row.slot(launch, 7));              // eps
  const T r0 = T(combine<mean_>(launch, row, 0) / double(row.numel()));  // lamb_step
  const T v27 = ::sqrt(r0);                         // lamb_step
  const T s8 = T(row.slot(launch, 8));              // a number
  const bool v29 = (v27 == s8);                     // lamb_step
  const T s9 = T(row.slot(launch, 9));              // (lr * 1.0)
  const T r1 = T(combine<mean_>(launch, row, 1) / double(row.numel()));  // lamb_step
  const T v33 = ::sqrt(r1);                         // lamb_step
  const T s10 = T(row.slot(launch, 10));            // a number
  const bool v35 = (v33 == s10);                    // lamb_step
  const T v36 = v27 / v33;                          // lamb_step
  const T s11 = T(row.slot(launch, 11));            // a number
  const T v38 = minimum(v36, s11);                  // lamb_step
  const T s12 = T(row.slot(launch, 12));            // lr
  const T v40 = v38 * s12;                          // lamb_step
  const T v41 = (v35 ? s9 : v40);                   // lamb_step
  const T v42 = (v29 ? s9 : v41);                   // lamb_step
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v3 = load<T>(grad_avg, i);
    const T v5 = v3 * s1;                             // average_grad
    const T v7 = load<T>(grad, i);
    const T v8 = s2 * v7;                             // average_grad
    const T v9 = v5 + v8;                             // average_grad
    const T v11 = v9 / s3;                            // lamb_step
    const T v12 = load<T>(sqr_avg, i);
    const T v14 = v12 * s4;                           // average_sqr_grad
    const T v16 = s5 * v7;                            // average_sqr_grad
    const T v17 = v16 * v7;                           // average_sqr_grad
    const T v18 = v14 + v17;                          // average_sqr_grad
    const T v20 = v18 / s6;                           // lamb_step
    const T v21 = ::sqrt(v20);                        // lamb_step
    const T v23 = v21 + s7;                           // lamb_step
    const T v24 = v11 / v23;                          // lamb_step
    const T v43 = v24 * v42;                          // lamb_step
    const T v44 = v2 - v43;                           // lamb_step
    store(param, i, v44);
    store(grad_avg, i, v9);
    store(sqr_avg, i, v18);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(1)
