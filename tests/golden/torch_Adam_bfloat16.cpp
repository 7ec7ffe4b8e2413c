// Adam
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 14 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (-lr / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s1 = T(row.slot(launch, 1));              // mom
  const T s2 = T(row.slot(launch, 2));              // (1 - mom)
  const T s3 = T(row.slot(launch, 3));              // sqr_mom
  const T s4 = T(row.slot(launch, 4));              // (1 - sqr_mom)
  const T s5 = T(row.slot(launch, 5));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s6 = T(row.slot(launch, 6));              // eps
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  bfloat16* __restrict sqr_avg = row.buffer<bfloat16>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad_avg, i);
    const T v4 = v2 * s1;                             // average_grad
    const T v6 = load<T>(grad, i);
    const T v7 = s2 * v6;                             // average_grad
    const T v8 = v4 + v7;                             // average_grad
    const T v9 = s0 * v8;                             // adam_step
    const T v10 = load<T>(sqr_avg, i);
    const T v12 = v10 * s3;                           // average_sqr_grad
    const T v14 = s4 * v6;                            // average_sqr_grad
    const T v15 = v14 * v6;                           // average_sqr_grad
    const T v16 = v12 + v15;                          // average_sqr_grad
    const T v18 = v16 / s5;                           // adam_step
    const T v19 = ::sqrt(v18);                        // adam_step
    const T v21 = v19 + s6;                           // adam_step
    const T v22 = v9 / v21;                           // adam_step
    const T v23 = v0 + v22;                           // adam_step
    store(param, i, v23);
    store(grad_avg, i, v8);
    store(sqr_avg, i, v16);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)
