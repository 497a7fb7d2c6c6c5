// A row of logits as the list of its tokens from the most likely one on, without sorting it: finds the token
// at a rank, or the one on which a sum of weights falls.
//
// A token's place is its logit, as an integer in the order of f32, and its id: equal logits come by ascending
// id, and no two places are equal. A weight is 2^42 exp((logit - highest) / temperature), rounded to an
// integer, so a sum is the same in any order of threads. It is computed by fused multiply-adds alone, whose
// result IEEE fixes: fast exponentials differ between devices, these bits do not. Weights err by 2^-22
// relatively and 2^-43 of the highest, so who adds exact ones finds another token only where the target lies
// within that of a border.
//
// The candidates are binned by the distance from the highest logit. Then the bins before the wanted one, or
// it alone, are listed in shared memory and sorted; a bin that does not fit is binned again by place. Each of
// these is a pass over the row, which comes from L2 after the first: typically there are two after the one
// for the highest.
#pragma once
#include "types.cuh"

namespace {

constexpr int kThreads = 512;
constexpr int kBins = 2 * kThreads;
constexpr int kMaxListed = 4 * kThreads;
constexpr int kIdBits = 20;  // so no sum of 2^20 weights of up to 2^42 overflows
constexpr uint32_t kLastId = (1u << kIdBits) - 1;
constexpr uint64_t kOne = 1ull << 42;

struct Row {
  const float* logits;
  const uint32_t* allowed;  // a bit a token; null allows all
  uint32_t vocab_size;
};

// Sums over tokens.
struct Sum {
  uint64_t weight;
  uint32_t count;
};

__device__ __forceinline__ uint64_t amount(const Sum& sum, bool by_count) {
  return by_count ? sum.count : sum.weight;
}

// Of tokens by bin; after `scan_bins` of all bins up to each.
struct Histogram {
  uint64_t weights[kBins];
  uint32_t counts[kBins];
};

struct Listed {
  uint64_t places[kMaxListed];
  uint64_t weights[kMaxListed];  // of all up to each
};

struct Shared {
  Histogram bins;
  union {
    Histogram finer;
    Listed listed;
  };
  Sum parts[kThreads / 32];
  uint64_t best[kThreads / 32];
  uint32_t bad[kThreads / 32];
  uint32_t picked, num_listed;
};
static_assert(sizeof(Shared) == 45512, "ops/sample.rs says so too");

// Shows every logit of the row with its id to one thread; ids of a thread ascend.
template <class F>
__device__ __forceinline__ void for_each(const Row& row, F show) {
  constexpr int kLoads = 4;
  auto show_one = [&](uint32_t id, float logit) {
    const bool is_allowed = !row.allowed || (row.allowed[id / 32] >> id % 32 & 1);
    show(id, is_allowed ? logit : -INFINITY);
  };
  // Rows begin anywhere where the vocabulary is odd; 16 bytes are loaded at once from the first multiple on.
  const uint32_t misaligned = (uint32_t)((uintptr_t)row.logits / sizeof(float)) & 3;
  const uint32_t head = min(row.vocab_size, (4 - misaligned) & 3);
  const uint32_t num_vectors = (row.vocab_size - head) / 4;
  const float4* vectors = (const float4*)(row.logits + head);
  if (threadIdx.x < head)
    show_one(threadIdx.x, row.logits[threadIdx.x]);
  for (uint32_t i = threadIdx.x; i < num_vectors; i += kThreads * kLoads) {
    float4 loaded[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; j++)
      if (i + j * kThreads < num_vectors)
        loaded[j] = vectors[i + j * kThreads];
#pragma unroll
    for (int j = 0; j < kLoads; j++)
      if (i + j * kThreads < num_vectors) {
        const uint32_t id = head + (i + j * kThreads) * 4;
        show_one(id, loaded[j].x);
        show_one(id + 1, loaded[j].y);
        show_one(id + 2, loaded[j].z);
        show_one(id + 3, loaded[j].w);
      }
  }
  const uint32_t id = head + num_vectors * 4 + threadIdx.x;
  if (id < row.vocab_size)
    show_one(id, row.logits[id]);
}

// Integers in the order of f32, -0 before 0.
__device__ __forceinline__ uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// More likely tokens have larger places. No candidate's place is zero.
__device__ __forceinline__ uint64_t place_of(float logit, uint32_t id) {
  return (uint64_t)key_of(logit) << kIdBits | (kLastId - id);
}
__device__ __forceinline__ uint32_t id_of(uint64_t place) {
  return kLastId - ((uint32_t)place & kLastId);
}

struct Highest {
  float logit;
  uint32_t id;   // the lowest on ties
  bool is_none;  // nothing is above minus infinity
  uint32_t bad;  // the lowest id that is NaN or infinity, or ~0
};

// The same in every thread.
__device__ Highest find_highest(const Row& row, Shared& shared) {
  float best = -INFINITY;
  uint32_t best_id = 0, bad = ~0u;
  for_each(row, [&](uint32_t id, float logit) {
    if (logit > best) {
      best = logit;
      best_id = id;
    }
    if (!(logit < INFINITY))
      bad = min(bad, id);
  });
  // Zeros of both signs are a tie.
  uint64_t place = best > -INFINITY ? place_of(best == 0 ? 0.0f : best, best_id) : 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    place = max(place, __shfl_xor_sync(~0u, place, offset));
    bad = min(bad, __shfl_xor_sync(~0u, bad, offset));
  }
  if (threadIdx.x % 32 == 0) {
    shared.best[threadIdx.x / 32] = place;
    shared.bad[threadIdx.x / 32] = bad;
  }
  __syncthreads();
  for (int i = 0; i < kThreads / 32; i++) {
    place = max(place, shared.best[i]);
    bad = min(bad, shared.bad[i]);
  }
  return {logit_of((uint32_t)(place >> kIdBits)), id_of(place), place == 0, bad};
}

// What makes weights and bins of logits.
struct Scale {
  float highest, cut, temperature, reciprocal, bins_per_logit;
};

// Candidates are at most `margin` below the highest.
__device__ __forceinline__ Scale make_scale(float highest, float temperature, float margin) {
  // Beyond 12 temperatures a token weighs less than 2^-17 of the highest: those are one bin, which a thread
  // sums up by itself, so that the bulk of a vocabulary costs no atomics.
  const float binned = fminf(margin, 12 * temperature);
  const float bins_per_logit = fminf((kBins - 1) / binned, 3e38f);
  return {highest, highest - margin, temperature, 1.0f / temperature, bins_per_logit};
}

__device__ __forceinline__ uint64_t weight_of(float logit, const Scale& scale) {
  const float distance = scale.highest - logit;
  if (distance == 0)
    return kOne;
  // The quotient, correctly rounded (Markstein).
  const float quotient = distance * scale.reciprocal;
  const float x = fmaf(fmaf(-quotient, scale.temperature, distance), scale.reciprocal, quotient);
  if (!(x < 32))
    return 0;
  // exp(-x) = 2^-n 2^-f with f in [-1/2, 1/2]: adding 1.5 * 2^23 leaves n in the lowest bits.
  const float shifted = fmaf(x, kLog2E, 12582912.0f);
  const uint32_t n = __float_as_uint(shifted) - 0x4b400000u;
  const float f = fmaf(x, 1.92596303e-8f, fmaf(x, kLog2E, -(shifted - 12582912.0f)));
  float power = 0.000154531634f;
  power = fmaf(power, f, -0.00133908633f);
  power = fmaf(power, f, 0.00961808302f);
  power = fmaf(power, f, -0.0555035695f);
  power = fmaf(power, f, 0.240226507f);
  power = fmaf(power, f, -0.693147182f);
  power = fmaf(power, f, 1.0f);
  const uint32_t bits = __float_as_uint(power);
  const uint64_t mantissa = (uint64_t)((bits & 0x7fffffu) | 0x800000u) << 20;  // 2^43 for one
  return ((mantissa >> (n + 127 - (bits >> 23))) + 1) >> 1;
}

// Never smaller for a lower logit; kBins for what is no candidate.
__device__ __forceinline__ uint32_t bin_of(float logit, const Scale& scale) {
  if (!(logit >= scale.cut) || logit == -INFINITY)
    return kBins;
  const float bin = (scale.highest - logit) * scale.bins_per_logit;
  return bin < kBins - 1 ? (uint32_t)bin : kBins - 1;
}

// The smallest key whose bin is at most `bin`.
__device__ uint32_t lowest_key(uint32_t bin, const Scale& scale) {
  uint32_t low = key_of(-INFINITY), high = key_of(scale.highest);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (bin_of(logit_of(middle), scale) <= bin)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Integers, so the order does not matter; two halves, since shared memory adds 32 bits in one instruction.
__device__ __forceinline__ void add(uint64_t* sum, uint64_t weight) {
  uint32_t* halves = (uint32_t*)sum;
  const uint32_t low = (uint32_t)weight;
  const uint32_t before = atomicAdd(halves, low);
  const uint32_t high = (uint32_t)(weight >> 32) + (before + low < before);
  if (high)
    atomicAdd(halves + 1, high);
}

// The sum over the threads before this one. All have met since the scan before.
__device__ Sum scan(const Sum& own, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sum sum = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t weight = __shfl_sync(~0u, sum.weight, lane - offset);
    const uint32_t count = __shfl_sync(~0u, sum.count, lane - offset);
    if (lane >= offset) {
      sum.weight += weight;
      sum.count += count;
    }
  }
  if (lane == 31)
    shared.parts[warp] = sum;
  __syncthreads();
  Sum before = {sum.weight - own.weight, sum.count - own.count};
  for (int i = 0; i < warp; i++) {
    before.weight += shared.parts[i].weight;
    before.count += shared.parts[i].count;
  }
  return before;
}

__device__ __forceinline__ void clear_bins(Histogram& bins) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    bins.weights[i] = 0;
    bins.counts[i] = 0;
  }
  __syncthreads();
}

// Makes of every bin the sum of all up to it, and `before`.
__device__ void scan_bins(Histogram& bins, const Sum& before, Shared& shared) {
  __syncthreads();
  const int first = threadIdx.x * 2;
  const Sum pair = {bins.weights[first] + bins.weights[first + 1],
                    bins.counts[first] + bins.counts[first + 1]};
  const Sum sum = scan(pair, shared);
  const uint64_t weight = before.weight + sum.weight;
  const uint32_t count = before.count + sum.count;
  bins.weights[first] += weight;
  bins.counts[first] += count;
  bins.weights[first + 1] = weight + pair.weight;
  bins.counts[first + 1] = count + pair.count;
  __syncthreads();
}

// The bin up to which the sum is the first above `target`, the same in every thread.
__device__ uint32_t pick_bin(const Histogram& bins, const Sum& before, uint64_t target, bool by_count,
                             Shared& shared) {
  for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) {
    const Sum low = i ? Sum{bins.weights[i - 1], bins.counts[i - 1]} : before;
    if (amount(low, by_count) <= target && target < amount({bins.weights[i], bins.counts[i]}, by_count))
      shared.picked = i;
  }
  __syncthreads();
  return shared.picked;  // all meet before something else is picked
}

// Sorts from the largest to the smallest; `len` is a power of two.
__device__ void sort_descending(uint64_t* values, uint32_t len) {
  for (uint32_t size = 2; size <= len; size *= 2)
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < len / 2; i += kThreads) {
        const uint32_t low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t x = values[low], y = values[high];
        if ((x < y) == !(low & size)) {
          values[low] = y;
          values[high] = x;
        }
      }
    }
  __syncthreads();
}

struct Found {
  uint64_t place;
  Sum through;  // all up to it, and it
};

class Search {
 public:
  __device__ Search(const Row& row, const Scale& scale, Shared& shared)
      : row_(row), scale_(scale), shared_(shared), listed_before_{0, 0}, listed_through_{0, 0} {
    clear_bins(shared.bins);
    Sum last = {0, 0};
    for_each(row, [&](uint32_t, float logit) {
      const uint32_t bin = bin_of(logit, scale_);
      if (bin >= kBins)
        return;
      const uint64_t weight = weight_of(logit, scale_);
      if (bin == kBins - 1) {
        last.weight += weight;
        last.count++;
      } else {
        add(&shared_.bins.weights[bin], weight);
        atomicAdd(&shared_.bins.counts[bin], 1u);
      }
    });
    if (last.count) {
      add(&shared.bins.weights[kBins - 1], last.weight);
      atomicAdd(&shared.bins.counts[kBins - 1], last.count);
    }
    scan_bins(shared.bins, {0, 0}, shared);
  }

  // All candidates.
  __device__ Sum total() const { return {shared_.bins.weights[kBins - 1], shared_.bins.counts[kBins - 1]}; }

  // The first token up to which the sum is above `target`, which is below the total; the same in every
  // thread.
  __device__ Found find(uint64_t target, bool by_count) {
    if (target < amount(listed_before_, by_count) || target >= amount(listed_through_, by_count))
      list_around(target, by_count);
    const uint32_t len = listed_through_.count - listed_before_.count;
    for (uint32_t i = threadIdx.x; i < len; i += kThreads) {
      const Sum before = {i ? shared_.listed.weights[i - 1] : listed_before_.weight,
                          listed_before_.count + i};
      const Sum through = {shared_.listed.weights[i], before.count + 1};
      if (amount(before, by_count) <= target && target < amount(through, by_count))
        shared_.picked = i;
    }
    __syncthreads();
    const uint32_t i = shared_.picked;
    __syncthreads();
    return {shared_.listed.places[i], {shared_.listed.weights[i], listed_before_.count + i + 1}};
  }

 private:
  // Lists tokens among which is the one of the target.
  __device__ void list_around(uint64_t target, bool by_count) {
    const Histogram& bins = shared_.bins;
    const uint32_t bin = pick_bin(bins, {0, 0}, target, by_count, shared_);
    Sum before = {0, 0}, through = {bins.weights[bin], bins.counts[bin]};
    uint32_t high_key = key_of(scale_.highest);
    if (through.count > kMaxListed && bin > 0) {
      before = {bins.weights[bin - 1], bins.counts[bin - 1]};
      high_key = lowest_key(bin - 1, scale_) - 1;
    }
    uint64_t low = (uint64_t)lowest_key(bin, scale_) << kIdBits;
    uint64_t high = (uint64_t)high_key << kIdBits | kLastId;
    while (through.count - before.count > kMaxListed)
      narrow(target, by_count, low, high, before, through);
    list(low, high, before, through);
  }

  // Bins the places from `low` to `high`, of which there are those after `before` and up to `through`, and
  // goes on with one bin. It ends, since a bin holds a single place at last.
  __device__ void narrow(uint64_t target, bool by_count, uint64_t& low, uint64_t& high, Sum& before,
                         Sum& through) {
    uint32_t shift = 0;
    while ((high - low) >> shift >= kBins)
      shift++;
    Histogram& bins = shared_.finer;
    clear_bins(bins);
    for_each(row_, [&](uint32_t id, float logit) {
      const uint64_t place = place_of(logit, id);
      if (place < low || place > high)
        return;
      const uint32_t bin = (uint32_t)((high - place) >> shift);
      add(&bins.weights[bin], weight_of(logit, scale_));
      atomicAdd(&bins.counts[bin], 1u);
    });
    scan_bins(bins, before, shared_);
    const uint32_t bin = pick_bin(bins, before, target, by_count, shared_);
    if (bin > 0)
      before = {bins.weights[bin - 1], bins.counts[bin - 1]};
    through = {bins.weights[bin], bins.counts[bin]};
    const uint64_t end = high - ((uint64_t)bin << shift);
    low = max(low, end - (((uint64_t)1 << shift) - 1));
    high = end;
    __syncthreads();  // the bins are read
  }

  __device__ void list(uint64_t low, uint64_t high, const Sum& before, const Sum& through) {
    Listed& listed = shared_.listed;
    const uint32_t len = through.count - before.count;
    uint32_t padded = 1;
    while (padded < len)
      padded *= 2;
    for (uint32_t i = len + threadIdx.x; i < padded; i += kThreads)
      listed.places[i] = 0;
    if (threadIdx.x == 0)
      shared_.num_listed = 0;
    __syncthreads();
    for_each(row_, [&](uint32_t id, float logit) {
      const uint64_t place = place_of(logit, id);
      if (place >= low && place <= high) {
        const uint32_t i = atomicAdd(&shared_.num_listed, 1u);
        if (i < len)
          listed.places[i] = place;
      }
    });
    sort_descending(listed.places, padded);
    constexpr uint32_t kEach = kMaxListed / kThreads;
    uint64_t weights[kEach];
    Sum own = {0, 0};
#pragma unroll
    for (uint32_t j = 0; j < kEach; j++) {
      const uint32_t i = threadIdx.x * kEach + j;
      if (i < len)
        own.weight += weight_of(logit_of((uint32_t)(listed.places[i] >> kIdBits)), scale_);
      weights[j] = own.weight;
    }
    const uint64_t first = before.weight + scan(own, shared_).weight;
#pragma unroll
    for (uint32_t j = 0; j < kEach; j++) {
      const uint32_t i = threadIdx.x * kEach + j;
      if (i < len)
        listed.weights[i] = first + weights[j];
    }
    listed_before_ = before;
    listed_through_ = through;
    __syncthreads();
  }

  const Row row_;
  const Scale scale_;
  Shared& shared_;
  Sum listed_before_, listed_through_;  // of what is listed: what comes before it, and all up to its end
};

}  // namespace
