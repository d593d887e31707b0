// What lies around the products: matrices of 16-bit floats, attention, norms, the gate, rotations.

#include <algorithm>
#include <atomic>

#include "core.h"
#include "run.h"

using namespace qjax;

namespace {

// Numbers below which other threads are not worth their waking.
constexpr int64_t kAloneFloats = 1 << 15;

// f(row) for all rows of `n` numbers: by the caller if they are few, else some rows a task.
template <typename F>
void RunRows(qjax_parallel parallel, void* context, int64_t rows, int64_t n, F f) {
  const int64_t each = std::max<int64_t>(1, kAloneFloats / 2 / std::max<int64_t>(1, n));
  const auto some = [&](int64_t task) {
    for (int64_t r = task * each; r < std::min(rows, (task + 1) * each); ++r) f(r);
  };
  Run(rows * n <= kAloneFloats ? nullptr : parallel, context, Ceil(rows, each), some);
}

}  // namespace

extern "C" int qjax_matmul_dense(const uint16_t* w, int64_t rows, int64_t columns, int bf16, const float* x, int64_t m,
                                 float* y, int isa, qjax_parallel parallel, void* context) {
  const KernelTable* table = TableOf(isa);
  if (table == nullptr || rows < 1 || columns < 1) return 1;
  const int64_t each = std::max<int64_t>(1, kTaskBytes / (2 * columns));
  const auto work = [&](int64_t task) {
    for (int64_t n = task * each; n < std::min(rows, (task + 1) * each); ++n) {
      table->dense(w + n * columns, columns, bf16, x, m, y + n, rows);
    }
  };
  Run(parallel, context, Ceil(rows, each), work);
  return 0;
}

extern "C" int qjax_attention(const qjax_attention_args* args, int isa, qjax_parallel parallel, void* context) {
  const KernelTable* table = TableOf(isa);
  const qjax_attention_args& a = *args;
  if (table == nullptr || a.dim < kLanes || a.dim % kLanes != 0 || a.kv_heads < 1 || a.heads % a.kv_heads != 0 ||
      a.slots < 1 || a.kind < QJAX_KIND_F16 || a.kind > QJAX_KIND_INT8 ||
      (a.kind == QJAX_KIND_INT8 && (a.k_scale == nullptr || a.v_scale == nullptr))) {
    return 1;
  }
  // About 64 rows of queries share the keys and values that are made ready for them.
  const int64_t group = a.heads / a.kv_heads, each = std::max<int64_t>(1, 64 / group), blocks = Ceil(a.seq, each);
  std::atomic<bool> failed{false};
  const auto work = [&](int64_t task) {
    // The longest first, for an even end.
    const int64_t block = blocks - 1 - task / (a.batch * a.kv_heads), head = task % (a.batch * a.kv_heads);
    const int64_t begin = block * each, end = std::min(a.seq, begin + each);
    float* memory = scratch.Floats(AttentionFloats(end - begin, group, a.dim));
    if (memory == nullptr) {
      failed = true;
      return;
    }
    table->attention(a, head / a.kv_heads, head % a.kv_heads, begin, end, memory);
  };
  Run(parallel, context, a.batch * a.kv_heads * blocks, work);
  return failed ? 2 : 0;
}

extern "C" int qjax_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t n, float* y, int isa,
                             qjax_parallel parallel, void* context) {
  const KernelTable* table = TableOf(isa);
  if (table == nullptr || rows < 0 || n < 1) return 1;
  RunRows(parallel, context, rows, n, [&](int64_t r) { table->rms_norm(x + r * n, weight, eps, n, y + r * n); });
  return 0;
}

extern "C" int qjax_swiglu(const float* gate, const float* up, int64_t rows, int64_t n, float* y, int isa,
                           qjax_parallel parallel, void* context) {
  const KernelTable* table = TableOf(isa);
  if (table == nullptr || rows < 0 || n < 1) return 1;
  RunRows(parallel, context, rows, n, [&](int64_t r) { table->swiglu(gate + r * n, up + r * n, n, y + r * n); });
  return 0;
}

extern "C" int qjax_rope(const float* x, const float* cosine, const float* sine, int64_t tokens, int64_t heads,
                         int64_t dim, int64_t half, int interleaved, float* y, int isa, qjax_parallel parallel,
                         void* context) {
  const KernelTable* table = TableOf(isa);
  if (table == nullptr || tokens < 0 || heads < 1 || half < 0 || 2 * half > dim) return 1;
  const int64_t n = heads * dim;
  RunRows(parallel, context, tokens, n, [&](int64_t t) {
    table->rope(x + t * n, cosine + t * half, sine + t * half, heads, dim, half, interleaved, y + t * n);
  });
  return 0;
}
