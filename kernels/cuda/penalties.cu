// Takes the logits of tokens that were used before down, in place: repetition, presence and frequency
// penalties.
//
// Shapes: logits f32 [rows of the batch, vocab_size], of which block i takes row rows_of[i] (or i); penalties
// [rows]; uses [indptr[rows]], those of block i from indptr[i] to indptr[i + 1], none twice. A use with a
// count of zero is in the prompt alone. Ids beyond the vocabulary are passed over.
//
// Grid: a block a row. Bytes: 16 a use, of which 8 are anywhere in the row, in sectors of 32; bound by
// latency.
#include "types.cuh"

namespace {

constexpr int kThreads = 256;

struct RowPenalties {
  float repetition, presence, frequency;
};

struct TokenUse {
  uint32_t token_id, num_in_answer;
};

struct PenaltiesParams {
  float* logits;
  const uint32_t* rows_of;  // [rows], or null
  const RowPenalties* penalties;
  const uint32_t* indptr;
  const TokenUse* uses;
  uint32_t vocab_size;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) penalties(const __grid_constant__ PenaltiesParams p) {
  const size_t row = p.rows_of ? p.rows_of[blockIdx.x] : blockIdx.x;
  float* logits = p.logits + row * p.vocab_size;
  const RowPenalties penalties = p.penalties[blockIdx.x];
  const uint32_t end = p.indptr[blockIdx.x + 1];
  for (uint32_t i = p.indptr[blockIdx.x] + threadIdx.x; i < end; i += kThreads) {
    const TokenUse use = p.uses[i];
    if (use.token_id >= p.vocab_size)
      continue;
    const float logit = logits[use.token_id];
    const float repeated = logit > 0 ? logit / penalties.repetition : logit * penalties.repetition;
    // Fused here and on the CPU, so that the bits are the same.
    const float less = fmaf(-penalties.frequency, (float)use.num_in_answer, repeated);
    logits[use.token_id] = less - (use.num_in_answer > 0 ? penalties.presence : 0.0f);
  }
}
EMU_KERNEL(penalties)
