// Takes the logits of tokens that were used before down, in place: repetition, presence and frequency
// penalties.
//
// Shapes: logits f32 [rows of the batch, vocab_size], of which block i takes row rows_of[i] (or i); penalties
// [rows]; uses [indptr[rows]], those of block i from indptr[i] to indptr[i + 1], none twice. A use with a
// count of zero is in the prompt alone. Ids beyond the vocabulary are passed over. Where newest_from[i] is
// not -1, sampled[newest_from[i]] was used once more: the step before has sampled it, the host has not seen
// it. The uses of such a row are in the order of their ids.
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
  const int32_t* newest_from;  // [rows]
  const uint32_t* sampled;
  uint32_t vocab_size;
};

__device__ __forceinline__ void take_down(const PenaltiesParams& p, const RowPenalties& penalties,
                                          float* logits, uint32_t token_id, uint32_t num_in_answer) {
  if (token_id >= p.vocab_size)
    return;
  const float logit = logits[token_id];
  const float repeated = logit > 0 ? logit / penalties.repetition : logit * penalties.repetition;
  // Fused here and on the CPU, so that the bits are the same.
  const float less = fmaf(-penalties.frequency, (float)num_in_answer, repeated);
  logits[token_id] = less - (num_in_answer > 0 ? penalties.presence : 0.0f);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) penalties(const __grid_constant__ PenaltiesParams p) {
  const size_t row = p.rows_of ? p.rows_of[blockIdx.x] : blockIdx.x;
  float* logits = p.logits + row * p.vocab_size;
  const RowPenalties penalties = p.penalties[blockIdx.x];
  const uint32_t first = p.indptr[blockIdx.x], end = p.indptr[blockIdx.x + 1];
  const int32_t from = p.newest_from[blockIdx.x];
  const uint32_t newest = from < 0 ? 0 : p.sampled[from];
  for (uint32_t i = first + threadIdx.x; i < end; i += kThreads) {
    const TokenUse use = p.uses[i];
    take_down(p, penalties, logits, use.token_id,
              use.num_in_answer + (from >= 0 && use.token_id == newest ? 1 : 0));
  }
  if (from < 0 || threadIdx.x > 0)
    return;
  // Used for the first time: it is not in the list.
  uint32_t low = first, high = end;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (p.uses[middle].token_id < newest)
      low = middle + 1;
    else
      high = middle;
  }
  if (low == end || p.uses[low].token_id != newest)
    take_down(p, penalties, logits, newest, 1);
}
EMU_KERNEL(penalties)
