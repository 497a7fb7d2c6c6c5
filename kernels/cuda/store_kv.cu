// From queries, keys and values of a step to what attention reads: biases added, heads normalized, queries
// and keys rotated, keys and values written to their slots.
//
// Shapes: qkv T [rows, num_heads + 2 * num_kv_heads, stride], bias f32 [the same without rows] or null,
// q_norm and k_norm f32 [head_dim] or null, rope f32 [positions, 2, head_dim / 2] (cosines, then sines),
// positions u32 [rows], slots i32 [rows] (-1: a row of padding, not stored), queries T [rows, num_heads,
// stride], kv [page, 2, num_kv_heads, page_size, stride] in T or e4m3; T is bf16 or f16. `stride` is the head
// dimension of the attention kernel: what it has beyond `head_dim` is zero. Grid: a warp a head, 8 to a
// block. Bytes: 2 read and 2 written a number; bound by memory.
#include "types.cuh"

namespace {

constexpr int kWarps = 8;

template <class T>
struct StoreKvParams {
  const T* qkv;
  const float *bias, *q_norm, *k_norm, *rope;
  const uint32_t* positions;
  const int32_t* slots;
  T* queries;
  void* kv;
  uint32_t num_rows, num_heads, num_kv_heads, head_dim, stride, page_size;
  float epsilon;
  uint32_t kv_is_e4m3;
};

struct Two {
  float x, y;
};

template <class T>
__device__ __forceinline__ Two load_two(const T* from, const float* bias, uint32_t i) {
  const uint32_t pair = *(const uint32_t*)(from + i);
  Two v = {lo_of<T>(pair), hi_of<T>(pair)};
  if (bias) {
    v.x += bias[i];
    v.y += bias[i + 1];
  }
  return v;
}

template <class T>
__device__ __forceinline__ void store_two(void* to, bool is_e4m3, uint32_t i, Two v) {
  if (is_e4m3)
    *(uint16_t*)((e4m3*)to + i) = to_e4m3(v.x).bits | to_e4m3(v.y).bits << 8;
  else
    *(uint32_t*)((T*)to + i) = pack<T>(v.x, v.y);
}

template <class T>
__device__ __forceinline__ void store_kv(const StoreKvParams<T>& p) {
  const uint32_t num_all = p.num_heads + 2 * p.num_kv_heads, lane = threadIdx.x % 32;
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= p.num_rows * num_all)
    return;
  const uint32_t row = index / num_all, head = index % num_all;
  const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;
  const int32_t slot = p.slots[row];
  if (!is_query && slot < 0)
    return;
  const T* from = p.qkv + (size_t)index * p.stride;
  const float* bias = p.bias ? p.bias + (size_t)head * p.stride : nullptr;
  void* to;
  if (is_query) {
    to = p.queries + ((size_t)row * p.num_heads + head) * p.stride;
  } else {
    const uint32_t kv_head = (head - p.num_heads) % p.num_kv_heads;
    const size_t page = (uint32_t)slot / p.page_size, offset = (uint32_t)slot % p.page_size;
    const size_t at = (((page * 2 + is_value) * p.num_kv_heads + kv_head) * p.page_size + offset) * p.stride;
    to = p.kv_is_e4m3 ? (void*)((e4m3*)p.kv + at) : (void*)((T*)p.kv + at);
  }
  const bool is_e4m3 = !is_query && p.kv_is_e4m3;
  const uint32_t half = p.head_dim / 2;
  if (is_value) {
    for (uint32_t i = lane * 2; i < p.stride; i += 64)
      store_two<T>(to, is_e4m3, i, i < p.head_dim ? load_two(from, bias, i) : Two{0, 0});
    return;
  }
  const float* norm = is_query ? p.q_norm : p.k_norm;
  float scale = 1;
  if (norm) {
    float squares = 0;
    for (uint32_t i = lane * 2; i < p.head_dim; i += 64) {
      const Two v = load_two(from, bias, i);
      squares += v.x * v.x + v.y * v.y;
    }
    scale = rsqrtf(warp_sum(squares) / p.head_dim + p.epsilon);
  }
  const float *cos = p.rope + (size_t)p.positions[row] * p.head_dim, *sin = cos + half;
  for (uint32_t i = lane * 2; i < half; i += 64) {
    Two a = load_two(from, bias, i), b = load_two(from, bias, i + half);
    if (norm) {
      a = {a.x * scale * norm[i], a.y * scale * norm[i + 1]};
      b = {b.x * scale * norm[i + half], b.y * scale * norm[i + half + 1]};
    }
    store_two<T>(to, is_e4m3, i, {a.x * cos[i] - b.x * sin[i], a.y * cos[i + 1] - b.y * sin[i + 1]});
    store_two<T>(to, is_e4m3, i + half, {b.x * cos[i] + a.x * sin[i], b.y * cos[i + 1] + a.y * sin[i + 1]});
  }
  for (uint32_t i = p.head_dim + lane * 2; i < p.stride; i += 64)
    store_two<T>(to, is_e4m3, i, {0, 0});
}

}  // namespace

KERNELS(store_kv, StoreKvParams, kWarps * 32)
