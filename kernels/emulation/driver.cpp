// A driver of CUDA, cuBLASLt and NVRTC without a GPU: what Tidemill calls of them, with kernels run by the
// emulation.
//
// It is a library of its own that a test puts where the real ones are looked for, so the code above the
// driver is tested as it is. It is as strict as the driver and as slow as it may be: a thread must have set
// the context, a capture forbids what it forbids, work is done only when somebody waits for it. With
// FAKE_DRIVER=refuse it takes no embedded image. Its cuBLASLt offers algorithms that must not be taken, and
// scales rows only into bf16.
#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "types.cuh"

extern "C" int cuda_emu_launch(const char*, unsigned, unsigned, unsigned, unsigned, unsigned, void**);
extern "C" size_t cuda_emu_param_bytes(const char*);

#define API extern "C" __attribute__((visibility("default")))

namespace {

enum {
  OK = 0,
  INVALID = 1,
  NO_MEMORY = 2,
  BAD_DEVICE = 101,
  NO_CONTEXT = 201,
  NO_BINARY = 209,
  NOT_FOUND = 500
};
enum { NOT_READY = 600, IN_CAPTURE = 900 };
using Work = std::function<void()>;
using Works = std::vector<Work>;

struct Stream {
  Works queue;
  uint64_t done = 0;  // works before the queue
  Works* recording = nullptr;
};
struct Event {
  Stream* stream = nullptr;
  uint64_t end = 0;
};
struct Module {};
struct Function {
  std::string name;
  unsigned shared = 48 << 10;
};

std::recursive_mutex mutex;
thread_local void* current = nullptr;
thread_local int capture_mode = 1;  // of this thread: 2 is relaxed
thread_local bool captures = false;
int context;
constexpr uint64_t kTotal = 1ull << 32;
uint64_t used = 0;
std::map<uint64_t, uint64_t> memory, pinned;
std::set<Stream*> streams;
int queries = 0;

// Every call that needs one begins with this.
#define ENTER                                        \
  std::lock_guard<std::recursive_mutex> lock(mutex); \
  if (!current)                                      \
    return NO_CONTEXT;
#define NOT_IN_CAPTURE               \
  if (captures && capture_mode != 2) \
    return IN_CAPTURE;

void run(Stream* stream, uint64_t end) {
  while (stream->done < end && !stream->queue.empty()) {
    Work work = std::move(stream->queue.front());
    stream->queue.erase(stream->queue.begin());
    stream->done++;
    work();
  }
}
void run_all() {
  for (Stream* stream : streams)
    run(stream, UINT64_MAX);
}
int push(Stream* stream, Work work) {
  (stream->recording ? *stream->recording : stream->queue).push_back(std::move(work));
  return OK;
}
bool within(const std::map<uint64_t, uint64_t>& ranges, const void* start, size_t bytes) {
  auto next = ranges.upper_bound((uint64_t)start);
  return next != ranges.begin() &&
         (uint64_t)start + bytes <= std::prev(next)->first + std::prev(next)->second;
}

}  // namespace

API int cuInit(unsigned) {
  return OK;
}
API int cuDriverGetVersion(int* version) {
  return *version = 13000, OK;
}
API int cuDeviceGetCount(int* count) {
  return *count = 1, OK;
}
API int cuDeviceGet(int* device, int ordinal) {
  return *device = ordinal, ordinal == 0 ? OK : BAD_DEVICE;
}
API int cuDeviceGetName(char* name, int len, int) {
  return snprintf(name, len, "fake H100"), OK;
}
API int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> values = {{16, 4}, {75, 9}, {76, 0}, {97, 227 << 10}};
  return *value = values.at(attribute), OK;
}
API int cuDevicePrimaryCtxRetain(void** out, int) {
  return *out = &context, OK;
}
API int cuDevicePrimaryCtxRelease_v2(int) {
  return OK;
}
API int cuCtxSetCurrent(void* to) {
  return current = to, OK;
}
API int cuGetErrorName(int, const char** text) {
  return *text = "FAKE_ERROR", OK;
}
API int cuGetErrorString(int, const char** text) {
  return *text = "a fake error", OK;
}

API int cuMemGetInfo_v2(size_t* free, size_t* total) {
  ENTER* free = kTotal - used;
  return *total = kTotal, OK;
}
API int cuMemAlloc_v2(uint64_t* out, size_t bytes) {
  ENTER NOT_IN_CAPTURE if (!bytes) return INVALID;
  if (bytes > kTotal - used)
    return NO_MEMORY;
  void* memory_ = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(memory_, 0xff, bytes);
  memory[*out = (uint64_t)memory_] = bytes;
  return used += bytes, OK;
}
API int cuMemFree_v2(uint64_t address) {
  ENTER NOT_IN_CAPTURE if (!address) return OK;
  run_all();
  if (!memory.count(address))
    return INVALID;
  used -= memory[address];
  memory.erase(address);
  return free((void*)address), OK;
}
API int cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  ENTER NOT_IN_CAPTURE* out = malloc(bytes);
  memset(*out, 0xff, bytes);
  return pinned[(uint64_t)*out] = bytes, OK;
}
API int cuMemFreeHost(void* start) {
  ENTER run_all();
  return pinned.erase((uint64_t)start) ? (free(start), OK) : INVALID;
}
API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* stream) {
  ENTER if (!within(memory, (void*)to, bytes)) return INVALID;
  if (within(pinned, from, bytes) || stream->recording)
    return push(stream, [=] { memcpy((void*)to, from, bytes); });
  std::string data((const char*)from, bytes);
  return push(stream, [=] { memcpy((void*)to, data.data(), bytes); });
}
API int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* stream) {
  ENTER if (!within(memory, (void*)from, bytes)) return INVALID;
  push(stream, [=] { memcpy(to, (void*)from, bytes); });
  if (!within(pinned, to, bytes) && !stream->recording)
    run(stream, UINT64_MAX);
  return OK;
}
API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* stream) {
  ENTER if (!within(memory, (void*)from, bytes) || !within(memory, (void*)to, bytes)) return INVALID;
  return push(stream, [=] { memcpy((void*)to, (void*)from, bytes); });
}

API int cuStreamCreate(Stream** out, unsigned) {
  ENTER* out = new Stream;
  return streams.insert(*out), OK;
}
API int cuStreamDestroy_v2(Stream* stream) {
  ENTER streams.erase(stream);
  return delete stream, OK;
}
API int cuStreamSynchronize(Stream* stream) {
  ENTER if (stream->recording) return IN_CAPTURE;
  return run(stream, UINT64_MAX), OK;
}
API int cuThreadExchangeStreamCaptureMode(int* mode) {
  return std::swap(*mode, capture_mode), OK;
}
API int cuStreamBeginCapture_v2(Stream* stream, int) {
  ENTER if (stream->recording) return INVALID;
  stream->recording = new Works;
  return captures = true, OK;
}
API int cuStreamEndCapture(Stream* stream, Works** out) {
  ENTER* out = stream->recording;
  stream->recording = nullptr;
  captures = false;
  return *out ? OK : INVALID;
}
API int cuGraphInstantiateWithFlags(Works** out, Works* graph, uint64_t) {
  ENTER* out = new Works(*graph);
  return OK;
}
API int cuGraphDestroy(Works* graph) {
  return delete graph, OK;
}
API int cuGraphUpload(Works*, Stream*) {
  return OK;
}
API int cuGraphExecDestroy(Works* graph) {
  ENTER return delete graph, OK;
}
API int cuGraphLaunch(Works* graph, Stream* stream) {
  ENTER for (const Work& work : *graph) push(stream, work);
  return OK;
}

API int cuEventCreate(Event** out, unsigned) {
  ENTER* out = new Event;
  return OK;
}
API int cuEventDestroy_v2(Event* event) {
  ENTER return delete event, OK;
}
API int cuEventRecord(Event* event, Stream* stream) {
  ENTER NOT_IN_CAPTURE* event = {stream, stream->done + stream->queue.size()};
  return OK;
}
API int cuEventSynchronize(Event* event) {
  ENTER NOT_IN_CAPTURE run(event->stream, event->end);
  return OK;
}
API int cuEventQuery(Event* event) {
  ENTER NOT_IN_CAPTURE if (event->stream->done >= event->end) return OK;
  if (++queries % 2)
    return NOT_READY;
  return run(event->stream, event->end), OK;
}

API int cuModuleLoadData(Module** out, const char* image) {
  ENTER NOT_IN_CAPTURE const char* mode = getenv("FAKE_DRIVER");
  bool is_made_here = !strncmp(image, "FAKE ", 5);
  if (mode && !strcmp(mode, "refuse") && !is_made_here)
    return NO_BINARY;
  return *out = new Module, OK;
}
API int cuModuleUnload(Module* module) {
  ENTER return delete module, OK;
}
API int cuModuleGetFunction(Function** out, Module*, const char* name) {
  ENTER if (!cuda_emu_param_bytes(name)) return NOT_FOUND;
  return *out = new Function{name}, OK;
}
API int cuFuncSetAttribute(Function* function, int attribute, int value) {
  ENTER if (attribute != 8 || value > 227 << 10) return INVALID;
  return function->shared = value, OK;
}
API int cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned,
                       unsigned, unsigned shared, Stream* stream, void** params, void**) {
  const size_t bytes = cuda_emu_param_bytes(function->name.c_str());
  ENTER if (shared > function->shared || !x || !y || !z || !bytes) return INVALID;
  struct alignas(128) Chunk {
    char bytes[128];
  };
  std::vector<Chunk> kept((bytes + 127) / 128);
  memcpy(kept.data(), params[0], bytes);
  return push(stream, [=]() mutable {
    void* kept_params[] = {kept.data()};
    cuda_emu_launch(function->name.c_str(), x, y, z, block, shared, kept_params);
  });
}
API int cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* bytes) {
  ENTER* offset = 0;
  *bytes = cuda_emu_param_bytes(function->name.c_str());
  return index ? INVALID : OK;
}
API int cuTensorMapEncodeTiled(void* out, int type, unsigned rank, char* base, const uint64_t* dims,
                               const uint64_t* strides, const unsigned* box, const unsigned*, int,
                               int swizzle, int, int) {
  if ((uint64_t)out % 64 || (uint64_t)base % 16 || strides[0] % 16 || type != 9 || rank != 2 || swizzle != 3)
    return INVALID;
  struct {  // TmaMap of hopper.cuh
    char* base;
    uint64_t dim[2], row_bytes;
    uint32_t box[2];
    int elem;
  } map = {base, {dims[0], dims[1]}, strides[0], {box[0], box[1]}, 2};
  memset(out, 0, 128);
  return memcpy(out, &map, sizeof map), OK;
}

// cuBLASLt. Types: 0 f32, 2 f16, 14 bf16, 28 e4m3.
#define BLAS_ENTER                                   \
  std::lock_guard<std::recursive_mutex> lock(mutex); \
  if (!current)                                      \
    return NOT_INITIALIZED;
namespace {
enum { NOT_INITIALIZED = 1, BAD_VALUE = 7, UNSUPPORTED = 15 };
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};
struct Product {
  std::map<int, uint64_t> attributes;
};
struct Algorithm {
  uint64_t m, num_splits, most, unused[5];
};
struct Found {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};
std::map<int, uint64_t> preferences;
enum { TRANSPOSE_A = 3, SCALE_A = 17, SCALE_B = 18, MODE_A = 31, MODE_B = 32 };

// Which kinds of products it can do.
bool knows(const Product* product, const Layout* a, const Layout* b, const Layout* d) {
  auto has = [&](int key) { return product->attributes.count(key) ? product->attributes.at(key) : 0; };
  bool scales = has(MODE_A) == 3 && has(MODE_B) == 3 && has(SCALE_A) && has(SCALE_B);
  return has(TRANSPOSE_A) == 1 && a->type == b->type && a->rows == b->rows && a->columns == d->rows &&
         b->columns == d->columns && (!scales || d->type == 14);
}
float number(const void* from, int type, uint64_t i) {
  return type == 14  ? to_float(((const bf16*)from)[i])
         : type == 2 ? to_float(((const f16*)from)[i])
                     : to_float(((const e4m3*)from)[i]);
}
int set(std::map<int, uint64_t>& attributes, int key, const void* value, size_t bytes) {
  uint64_t number = 0;
  memcpy(&number, value, bytes);
  return attributes[key] = number, OK;
}
}  // namespace

API size_t cublasLtGetVersion() {
  return 130000;
}
API int cublasLtCreate(void** out) {
  BLAS_ENTER* out = new int;
  return OK;
}
API int cublasLtDestroy(int* handle) {
  BLAS_ENTER return delete handle, OK;
}
API int cublasLtMatmulDescCreate(Product** out, int, int) {
  return *out = new Product, OK;
}
API int cublasLtMatmulDescDestroy(Product* product) {
  return delete product, OK;
}
API int cublasLtMatmulDescSetAttribute(Product* product, int key, const void* value, size_t bytes) {
  return set(product->attributes, key, value, bytes);
}
API int cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  return *out = new Layout{type, rows, columns, stride}, OK;
}
API int cublasLtMatrixLayoutDestroy(Layout* layout) {
  return delete layout, OK;
}
API int cublasLtMatrixLayoutSetAttribute(Layout* layout, int key, const void* value, size_t) {
  return key == 3 ? (layout->columns = *(const uint64_t*)value, OK) : BAD_VALUE;
}
API int cublasLtMatmulPreferenceCreate(void** out) {
  return *out = &preferences, OK;
}
API int cublasLtMatmulPreferenceDestroy(void*) {
  return OK;
}
API int cublasLtMatmulPreferenceSetAttribute(void*, int key, const void* value, size_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  return set(preferences, key, value, bytes);
}
API int cublasLtMatmulAlgoGetHeuristic(void*, Product* product, Layout* a, Layout* b, Layout*, Layout* d,
                                       void*, int wanted, Found* found, int* count) {
  BLAS_ENTER if (!knows(product, a, b, d)) return UNSUPPORTED;
  // One whose sums are split, one for small products only, and one for all.
  const Algorithm offered[] = {{d->columns, 4, 1 << 20}, {d->columns, 1, 100}, {d->columns, 1, 1 << 20}};
  *count = std::min(wanted, 3);
  for (int i = 0; i < *count; i++)
    found[i] = {offered[i], offered[i].num_splits > 1 ? 1 << 20 : 0, OK};
  return OK;
}
API int cublasLtMatmulAlgoCheck(void*, Product* product, Layout* a, Layout* b, Layout*, Layout* d,
                                const Algorithm* algorithm, Found* found) {
  // One that splits sums does one number of rows only.
  bool can = knows(product, a, b, d) && d->columns <= algorithm->most &&
             (algorithm->num_splits == 1 || d->columns == algorithm->m);
  *found = {*algorithm, algorithm->num_splits > 1 ? 1 << 20 : 0, OK};
  return can ? OK : UNSUPPORTED;
}
API int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int key, int* value, size_t,
                                             size_t*) {
  return *value = key == 2 ? algorithm->num_splits : 0, OK;
}
API int cublasLtMatmul(void* handle, Product* product, const float* alpha, const void* a, Layout* a_layout,
                       const void* b, Layout* b_layout, const float* beta, const void*, Layout*, void* d,
                       Layout* d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
                       Stream* stream) {
  BLAS_ENTER Found found;
  if (cublasLtMatmulAlgoCheck(handle, product, a_layout, b_layout, d_layout, d_layout, algorithm, &found))
    return BAD_VALUE;
  if (*beta != 0 || !within(memory, workspace, workspace_bytes))
    return BAD_VALUE;
  const uint64_t m = d_layout->columns, n = d_layout->rows, k = a_layout->rows;
  const int type = a_layout->type, out_type = d_layout->type;
  const bool is_scaled = product->attributes[MODE_A] == 3;
  // As is said of the real one: for some shapes it promises scales and then refuses.
  if (is_scaled && k == 64)
    return UNSUPPORTED;
  const float* a_scale = is_scaled ? (const float*)product->attributes[SCALE_A] : nullptr;
  const float* b_scale = is_scaled ? (const float*)product->attributes[SCALE_B] : nullptr;
  const float factor = *alpha;
  const int64_t a_stride = a_layout->stride, b_stride = b_layout->stride, d_stride = d_layout->stride;
  return push(stream, [=] {
    for (uint64_t row = 0; row < m; row++)
      for (uint64_t column = 0; column < n; column++) {
        float sum = 0;
        for (uint64_t i = 0; i < k; i++)
          sum += number(b, type, row * b_stride + i) * number(a, type, column * a_stride + i);
        sum *= factor;
        if (is_scaled)
          sum *= b_scale[row] * a_scale[column];
        const uint64_t at = row * d_stride + column;
        if (out_type == 14)
          ((bf16*)d)[at] = from_float<bf16>(sum);
        else if (out_type == 2)
          ((f16*)d)[at] = from_float<f16>(sum);
        else
          ((float*)d)[at] = sum;
      }
  });
}

// NVRTC, whose code is the source's text.
API int nvrtcVersion(int* major, int* minor) {
  return *major = 13, *minor = 0, OK;
}
API int nvrtcGetNumSupportedArchs(int* count) {
  return *count = 2, OK;
}
API int nvrtcGetSupportedArchs(int* archs) {
  return archs[0] = 80, archs[1] = 90, OK;
}
API int nvrtcCreateProgram(std::string** out, const char* text, const char*, int count,
                           const char* const* texts, const char* const*) {
  if (count < 1 || !strlen(texts[0]))
    return INVALID;
  return *out = new std::string(text), OK;
}
API int nvrtcDestroyProgram(std::string** program) {
  return delete *program, OK;
}
API int nvrtcCompileProgram(std::string*, int count, const char* const* options) {
  return std::any_of(options, options + count,
                     [](const char* o) { return !strcmp(o, "--gpu-architecture=sm_90a"); })
             ? OK
             : 5;
}
API int nvrtcGetProgramLogSize(std::string*, size_t* bytes) {
  return *bytes = 5, OK;
}
API int nvrtcGetProgramLog(std::string*, char* log) {
  return memcpy(log, "fake", 5), OK;
}
API int nvrtcGetCUBINSize(std::string* program, size_t* bytes) {
  return *bytes = program->size() + 5, OK;
}
API int nvrtcGetCUBIN(std::string* program, char* out) {
  memcpy(out, "FAKE ", 5);
  return memcpy(out + 5, program->data(), program->size()), OK;
}
API int nvrtcGetPTXSize(std::string*, size_t*) {
  return INVALID;
}
API int nvrtcGetPTX(std::string*, char*) {
  return INVALID;
}
