#include "emu.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define UNPOISON(p, n)
#endif
namespace emu {
thread_local Block* blk;
thread_local Thread* cur;
static thread_local Entry g_entry;
static thread_local void* g_fn;
static thread_local void** g_args;
static Kernel* kernels;
Kernel::Kernel(const char* n, void* f, Entry e, size_t bytes)
    : name(n), fn(f), entry(e), param_bytes(bytes), next(kernels) {
  kernels = this;
}
extern "C" void emu_switch(void** save, void* load);
asm(".text\n.globl emu_switch\nemu_switch:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n "
    "push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n "
    "ret\n");
void yield() {
  emu_switch(&cur->sp, blk->sched_sp);
}
void die(const char* what) {
  fprintf(stderr, "cuda-emu: %s at block (%u,%u,%u)", what, blk->idx.x, blk->idx.y, blk->idx.z);
  if (cur)
    fprintf(stderr, " thread %d", cur->lin);
  fputc('\n', stderr);
  for (auto& t : blk->th)
    if (!t.done && (t.bar || t.poll)) {
      fprintf(stderr, "  thread %d waits on %s\n", t.lin,
              t.poll                                       ? "a poll"
              : t.bar >= blk->bar && t.bar < blk->bar + 16 ? "a block barrier"
                                                           : "a warp collective");
    }
  abort();
}
// What a test chose.
static int order = 0;
static const char* planted_name = "";
static char planted_buffer[128];
static std::mutex sites_lock;
static std::set<std::string> sites;
bool planted(const char* name) {
  return !strcmp(name, planted_name);
}
static void wait(Barrier& b, uint64_t g) {
  cur->bar = &b;
  cur->gen = g;
  while (b.gen == g)
    yield();
  cur->bar = nullptr;
}
static void arrive(Barrier& b, int need) {
  if (++b.arrived >= need) {
    b.arrived = 0;
    b.gen++;
    blk->progress++;
  }
}
void sync(int id, int n, const char* file, int line) {
  if (file) {
    const char* base = strrchr(file, '/');
    char site[96];
    snprintf(site, sizeof site, "%s:%d", base ? base + 1 : file, line);
    if (planted(site))
      return;
    if (cur->lin == 0) {
      std::lock_guard<std::mutex> l(sites_lock);
      sites.insert(site);
    }
  }
  Barrier& b = blk->bar[id];
  if (!b.arrived)
    b.line = line;
  else if (line && b.line != line)
    die("threads met at different __syncthreads()");
  uint64_t g = b.gen;
  blk->expect[id] = n;
  arrive(b, n ? n : blk->alive);
  if (b.gen == g)
    wait(b, g);
}
Sync& collective(uint32_t mask, int op, const void* mine, size_t n, int& slot) {
  Warp& w = blk->warps[cur->lin >> 5];
  Sync* y = nullptr;
  int l = lane();
  for (Sync* s : w.syncs)
    if (s->mask == mask)
      y = s;
  if (!y) {
    y = new Sync;
    y->mask = mask;
    w.syncs.push_back(y);
  }
  if (!(mask >> l & 1))
    die("collective called by a lane outside its mask");
  if (mask & ~w.alive)
    die("collective mask names a lane that has exited");
  slot = y->flip[l] ^= 1;
  if (y->bar.arrived == 0)
    y->op = op;
  else if (y->op != op)
    die("lanes of one warp met in different collectives");
  memcpy(y->buf[slot][l], mine, n);
  uint64_t g = y->bar.gen;
  arrive(y->bar, __builtin_popcount(mask));
  if (y->bar.gen == g)
    wait(y->bar, g);
  return *y;
}
static void body() {
  g_entry(g_fn, g_args);
  if (!cur->open.empty() || !cur->groups.empty())
    die("thread ended with cp.async still in flight");
  cur->done = true;
  blk->alive--;
  blk->progress++;
  blk->warps[cur->lin >> 5].alive &= ~(1u << lane());
  Barrier& b = blk->bar[0];
  if (blk->alive && b.arrived >= blk->alive && !blk->expect[0]) {
    b.arrived = 0;
    b.gen++;
  }
  yield();
}
static const size_t STACK = 128 << 10;
static void run_block(Block& B, char* stacks, std::mt19937& rng) {
  blk = &B;
  int n = B.dim.x * B.dim.y * B.dim.z;
  UNPOISON(stacks, n * STACK);
  memset(B.smem, 0xff, B.smem_bytes);  // NaN: reads before writes show
  B.th.assign(n, Thread{});
  B.alive = n;
  for (auto& w : B.warps)
    for (Sync* s : w.syncs)
      delete s;
  B.warps.assign((n + 31) / 32, Warp{});
  for (auto& b : B.bar)
    b = Barrier{};
  for (int i = 0; i < n; i++) {
    Thread& t = B.th[i];
    t.lin = i;
    t.tid = dim3(i % B.dim.x, i / B.dim.x % B.dim.y, i / (B.dim.x * B.dim.y));
    B.warps[i >> 5].alive |= 1u << (i & 31);
    void** x = (void**)(stacks + (i + 1) * STACK - 16);
    x[0] = (void*)body;
    x[1] = 0;
    memset(x - 6, 0, 48);
    t.sp = x - 6;
  }
  std::vector<int> ix(n);
  for (int i = 0; i < n; i++)
    ix[i] = order == 1 ? n - 1 - i : i;
  while (B.alive) {
    uint64_t before = B.progress;
    bool ran = false;
    auto run = [&](int i) {
      Thread& t = B.th[i];
      if (t.done || (t.bar && t.bar->gen == t.gen))
        return false;
      bool p = t.poll;
      cur = &t;
      emu_switch(&B.sched_sp, t.sp);
      cur = nullptr;
      return !p || !t.poll;
    };
    if (order == 2)
      std::shuffle(ix.begin(), ix.end(), rng);
    if (order < 3)
      for (int i : ix)
        ran |= run(i);
    else {  // one warp as far as it goes before the next: shows missing barriers
      int nw = (n + 31) / 32, w0 = order == 3 ? 0 : rng() % nw;
      for (int j = 0; j < nw; j++)
        for (bool any = true; any;) {
          any = false;
          int w = (w0 + j) % nw;
          for (int i = w * 32; i < std::min(n, w * 32 + 32); i++)
            any |= run(i);
          ran |= any;
        }
    }
    if (!ran && B.progress == before)
      die("deadlock");
  }
}
void launch(Entry e, void* fn, dim3 grid, dim3 block, size_t smem, void** args) {
  int nb = grid.x * grid.y * grid.z, nt = std::min<int>(nb, std::thread::hardware_concurrency());
  std::atomic<int> nextb{0};
  auto work = [&] {
    size_t nthr = block.x * block.y * block.z;
    Block B{};
    B.dim = block;
    B.grid = grid;
    B.smem_bytes = smem;
    B.smem = (char*)aligned_alloc(1024, (smem + 2047) / 1024 * 1024);
    char* st = (char*)mmap(0, nthr * STACK, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_entry = e;
    g_fn = fn;
    g_args = args;
    for (int b; (b = nextb++) < nb;) {
      B.idx = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
      std::mt19937 rng(b + 1);  // the same however blocks are dealt to cores
      run_block(B, st, rng);
    }
    UNPOISON(st, nthr * STACK);
    munmap(st, nthr * STACK);
    free(B.smem);
  };
  std::vector<std::thread> ts;
  for (int i = 1; i < nt; i++)
    ts.emplace_back(work);
  work();
  for (auto& t : ts)
    t.join();
}
// Runs a kernel by name to its end: 0, or 500 (CUDA_ERROR_NOT_FOUND) where there is none of this name.
extern "C" int cuda_emu_launch(const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned block,
                               unsigned smem, void** args) {
  for (Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name)) {
      launch(k->entry, k->fn, dim3(gx, gy, gz), dim3(block, 1, 1), smem, args);
      return 0;
    }
  return 500;
}
// Bytes of a kernel's parameters, 0 for no such kernel.
extern "C" size_t cuda_emu_param_bytes(const char* name) {
  for (Kernel* k = kernels; k; k = k->next)
    if (!strcmp(k->name, name))
      return k->param_bytes;
  return 0;
}
// Order in which threads run: 0 forward, 1 backward, 2 shuffled, 3 and 4 warp by warp as far as each goes.
// `mistake` is a name that kernels ask for by PLANTED, or "file:line" of a __syncthreads to leave out, or
// empty.
extern "C" void cuda_emu_configure(int new_order, const char* mistake) {
  order = new_order;
  snprintf(planted_buffer, sizeof planted_buffer, "%s", mistake);
  planted_name = planted_buffer;
}
// The barriers met so far, as "file:line" separated by spaces.
extern "C" size_t cuda_emu_sites(char* out, size_t len) {
  std::string all;
  for (auto& s : sites)
    all += s + " ";
  snprintf(out, len, "%s", all.c_str());
  return all.size();
}
}  // namespace emu
