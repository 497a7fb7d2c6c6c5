// Chooses the next token of each row of logits, as `sample.rs` does on the CPU: what a grammar allows,
// temperature, min_p, top_k, top_p, then a draw by (seed, position) that walks from the most likely token on.
//
// Shapes: logits f32 [rows of the batch, vocab_size], of which block i takes row rows_of[i] (or i); allowed
// u32 [masks, ceil(vocab_size / 32)], of which it takes mask_of[i], none where that is negative. Out:
// token_ids u32 [rows], and errors u32 [rows]: 0, or 1 where no token is left, or 2 and the id of the lowest
// that is NaN or infinity. With an error, token id 0 is written, which later kernels can take; rows to skip
// are left as they are.
//
// Grid: a block a row. Sums are of integers (row_search.cuh), so neither the batch nor the order of threads
// matters.
//
// Bytes: 4 a logit and pass: one pass for greedy rows, three for nearly all others, all but the first from
// L2. A vocabulary of 151,936 is 600 KB. By estimate, not measured: a block has 32 KB in flight, so it reads
// some 60 GB/s and a pass takes 10 us; the exponentials and atomics of the second take as much again, more
// where the distribution is flat, so a draw takes about 50 us. With a row for every multiprocessor, memory
// bounds the first pass.
#include "row_search.cuh"

namespace {

// Of a row. `margin` is how far below the highest logit candidates may be; min_p is in it.
struct RowSampling {
  uint64_t seed;
  uint32_t position;
  uint32_t top_k;  // 0 keeps all
  float temperature, margin, top_p;
  uint32_t kind;
};
constexpr uint32_t kSkip = 0, kGreedy = 1;  // others draw

struct SampleParams {
  const float* logits;
  const uint32_t* rows_of;  // [rows], or null
  const RowSampling* sampling;
  const uint32_t* allowed;
  const int32_t* mask_of;  // [rows], or null: no row has a mask
  uint32_t* token_ids;
  uint32_t* errors;
  uint32_t vocab_size;
};

__device__ __forceinline__ uint64_t split_mix(uint64_t seed) {
  uint64_t z = seed + 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// The product's upper and lower half.
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, uint64_t& high, uint64_t& low) {
  const uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  const uint64_t other = a0 * b1 + (uint32_t)middle;
  low = other << 32 | (uint32_t)(a0 * b0);
  high = a1 * b1 + (middle >> 32) + (other >> 32);
}

// The smallest integer that is at least `share` of the sum; `share` is above zero and below one.
__device__ __forceinline__ uint64_t share_of(float share, uint64_t sum) {
  const uint32_t bits = __float_as_uint(share), exponent = bits >> 23;
  const uint32_t mantissa = exponent ? (bits & 0x7fffffu) | 0x800000u : bits;
  const uint32_t shift = 150 - (exponent ? exponent : 1);  // share = mantissa / 2^shift; at least 24
  uint64_t high, low;
  multiply(mantissa, sum, high, low);
  if (shift >= 96)  // the product is below 2^87
    return 1;
  if (shift >= 64) {
    const uint64_t rest = high & ((1ull << (shift - 64)) - 1);
    return (high >> (shift - 64)) + ((rest | low) != 0);
  }
  const uint64_t rest = low & ((1ull << shift) - 1);
  return (high << (64 - shift) | low >> shift) + (rest != 0);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) sample(const __grid_constant__ SampleParams p) {
  DYN_SHARED(Shared, shared);
  const RowSampling sampling = p.sampling[blockIdx.x];
  if (sampling.kind == kSkip)
    return;
  const size_t row_index = p.rows_of ? p.rows_of[blockIdx.x] : blockIdx.x;
  const int32_t mask = p.mask_of ? p.mask_of[blockIdx.x] : -1;
  const size_t mask_words = (p.vocab_size + 31) / 32;
  const Row row = {p.logits + row_index * p.vocab_size, mask < 0 ? nullptr : p.allowed + mask * mask_words,
                   p.vocab_size};
  const Highest highest = find_highest(row, *shared);
  const uint32_t error = highest.bad != ~0u ? 2 + highest.bad : highest.is_none;
  if (error || sampling.kind == kGreedy) {
    if (threadIdx.x == 0) {
      p.token_ids[blockIdx.x] = error ? 0 : highest.id;
      p.errors[blockIdx.x] = error;
    }
    return;
  }
  Search search(row, make_scale(highest.logit, sampling.temperature, sampling.margin), *shared);
  Sum total = search.total();
  uint64_t kept = total.weight;
  const bool has_top_k = sampling.top_k > 0 && sampling.top_k < total.count;
  // One loop, so that the search is compiled once: the last token that top_k keeps, then the last that top_p
  // keeps of those, then the draw.
  Found found;
  for (int step = has_top_k ? 0 : 1; step < 3; step++) {
    uint64_t target;
    if (step == 0) {
      target = sampling.top_k - 1;
    } else if (step == 1) {
      if (sampling.top_p >= 1)
        continue;
      target = share_of(sampling.top_p, kept) - 1;
    } else {
      uint64_t high, low;
      multiply(split_mix(split_mix(sampling.seed) ^ sampling.position) >> 11, kept, high, low);
      target = high << 11 | low >> 53;
    }
    found = search.find(target, step == 0);
    kept = found.through.weight;
  }
  if (threadIdx.x == 0) {
    p.token_ids[blockIdx.x] = id_of(found.place);
    p.errors[blockIdx.x] = 0;
  }
}
EMU_KERNEL(sample)
