// Adadelta
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, sqr_delta, sqr_avg, grad; writes param, sqr_avg, sqr_delta; 14 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // -lr
  const T s1 = T(row.slot(launch, 1));              // eps
  const T s2 = T(row.slot(launch, 2));              // sqr_mom
  const T s3 = T(row.slot(launch, 3));              // (1 - sqr_mom)
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict sqr_delta = row.buffer<bfloat16>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(sqr_delta, i);
    const T v4 = v2 + s1;                             // adadelta_step
    const T v5 = ::sqrt(v4);                          // adadelta_step
    const T v6 = load<T>(sqr_avg, i);
    const T v8 = v6 * s2;                             // average_sqr_grad
    const T v10 = load<T>(grad, i);
    const T v11 = s3 * v10;                           // average_sqr_grad
    const T v12 = v11 * v10;                          // average_sqr_grad
    const T v13 = v8 + v12;                           // average_sqr_grad
    const T v14 = v13 + s1;                           // adadelta_step
    const T v15 = ::sqrt(v14);                        // adadelta_step
    const T v16 = v5 / v15;                           // adadelta_step
    const T v17 = v16 * v10;                          // adadelta_step
    const T v18 = s0 * v17;                           // adadelta_step
    const T v19 = v0 + v18;                           // adadelta_step
    const T v20 = v2 * s2;                            // adadelta_step
    const T v21 = s3 * v17;                           // adadelta_step
    const T v22 = v21 * v17;                          // adadelta_step
    const T v23 = v20 + v22;                          // adadelta_step
    store(param, i, v19);
    store(sqr_avg, i, v13);
    store(sqr_delta, i, v23);
  };
  for_blocks(begin, end, element, param, grad, sqr_avg, sqr_delta);
}
FUSEDOPT_STAGE(0)
