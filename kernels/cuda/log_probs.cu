// Logarithms of probabilities: of tokens that are named, and of the most likely ones with their ids.
//
// Shapes: logits f32 [rows of the batch, vocab_size], of which block i takes row rows_of[i] (or i). Token ids
// u32 [indptr[rows]], those of block i from indptr[i] to indptr[i + 1]; one a row where indptr is null. Out:
// log_probs f32 beside the token ids; top_ids u32 and top_log_probs f32 [rows, num_top], most likely first,
// the lower id on ties, filled up with ~0 and minus infinity where fewer tokens are above minus infinity.
// Everything of a row with NaN, with infinity or without any such token is NaN, and so is an id beyond the
// vocabulary.
//
// Grid: a block a row. The sum of the softmax is of integers (row_search.cuh), so it is the same in any
// batch; errors are within 2e-6, relatively above one.
//
// Bytes: 4 a logit and pass, two passes and, for the most likely, a third.
#include "row_search.cuh"

namespace {

struct LogProbsParams {
  const float* logits;
  const uint32_t* rows_of;  // [rows], or null
  const uint32_t* indptr;   // [rows + 1], or null
  const uint32_t* token_ids;
  float* log_probs;
  uint32_t* top_ids;
  float* top_log_probs;
  uint32_t vocab_size, num_top;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    log_probs(const __grid_constant__ LogProbsParams p) {
  DYN_SHARED(Shared, shared);
  const size_t row_index = p.rows_of ? p.rows_of[blockIdx.x] : blockIdx.x;
  const Row row = {p.logits + row_index * p.vocab_size, nullptr, p.vocab_size};
  const uint32_t begin = p.indptr ? p.indptr[blockIdx.x] : blockIdx.x;
  const uint32_t end = p.indptr ? p.indptr[blockIdx.x + 1] : blockIdx.x + 1;
  uint32_t* top_ids = p.top_ids + (size_t)blockIdx.x * p.num_top;
  float* top_log_probs = p.top_log_probs + (size_t)blockIdx.x * p.num_top;
  const float nan = __uint_as_float(0x7fc00000u);
  const Highest highest = find_highest(row, *shared);
  if (highest.bad != ~0u || highest.is_none) {
    for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads)
      p.log_probs[i] = nan;
    for (uint32_t i = threadIdx.x; i < p.num_top; i += kThreads) {
      top_ids[i] = ~0u;
      top_log_probs[i] = nan;
    }
    return;
  }
  Search search(row, make_scale(highest.logit, 1, INFINITY), *shared);
  const Sum total = search.total();
  const float log_sum = logf((float)total.weight / (float)kOne);
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const uint32_t id = p.token_ids[i];
    p.log_probs[i] = id < p.vocab_size ? row.logits[id] - highest.logit - log_sum : nan;
  }
  for (uint32_t i = 0; i < p.num_top; i++) {
    float log_prob = -INFINITY;
    uint32_t id = ~0u;
    if (i < total.count) {
      const Found found = search.find(i, true);
      log_prob = logit_of((uint32_t)(found.place >> kIdBits)) - highest.logit - log_sum;
      id = id_of(found.place);
    }
    if (threadIdx.x == 0) {
      top_ids[i] = id;
      top_log_probs[i] = log_prob;
    }
  }
}
EMU_KERNEL(log_probs)
