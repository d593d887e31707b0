// The door from XLA to core.h: buffers and attributes in, the same products out, threads from XLA's own pool.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core.h"
#include "xla/ffi/api/ffi.h"

// The handlers are looked up by name.
#pragma GCC visibility push(default)
extern "C" XLA_FFI_Error* qjax_matmul_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_matmul_dense_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_attention_ffi(XLA_FFI_CallFrame*);
#pragma GCC visibility pop

namespace ffi = xla::ffi;

namespace {

using Numbers = ffi::Span<const int64_t>;

// The tasks of one call. The caller works too, and waits for tasks, not for helpers: a helper that gets its turn only
// after the last task finds nothing to do, touches nothing, and cannot hold anyone up.
struct Work {
  int64_t count, threads;
  qjax_task task;
  void* arg;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  Work(int64_t count, int64_t threads, qjax_task task, void* arg)
      : count(count), threads(threads), task(task), arg(arg) {}

  // Long runs of neighbours first, which memory likes, shorter ones towards the end, so that all end together.
  void Drain() {
    for (int64_t first = next.load();;) {
      const int64_t run = std::max<int64_t>(1, (count - first) / (2 * threads));
      if (first >= count) return;
      if (!next.compare_exchange_weak(first, first + run)) continue;
      for (int64_t i = first; i < first + run; ++i) task(arg, i);
      if (done.fetch_add(run) + run == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
      first = next.load();
    }
  }
};

// The newest work, for helpers that are still awake. To wake a thread takes as long as a small product, and a decode
// step is a chain of them: a helper that has finished looks out for the next one for a moment before it goes back to
// XLA's pool.
class Awake {
 public:
  void Offer(std::shared_ptr<Work> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    newest_ = std::move(work);
    number_.fetch_add(1);
  }
  int64_t helpers() const { return helpers_.load(); }

  // What a helper does: `work`, and what is offered soon after.
  void Help(std::shared_ptr<Work> work) {
    uint64_t seen = number_.load();
    helpers_.fetch_add(1);
    work->Drain();
    auto until = std::chrono::steady_clock::now() + kPatience;
    for (int spin = 1;; ++spin) {
      if (number_.load(std::memory_order_acquire) != seen) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          seen = number_.load();
          work = newest_;
        }
        work->Drain();
        until = std::chrono::steady_clock::now() + kPatience;
      }
      Pause();
      if (spin % 64 != 0) continue;
      // Whoever else wants this core may have it.
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > until) break;
    }
    helpers_.fetch_sub(1);
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

 private:
  static constexpr std::chrono::microseconds kPatience{200};
  std::mutex mutex_;
  std::shared_ptr<Work> newest_;
  std::atomic<uint64_t> number_{0};
  std::atomic<int64_t> helpers_{0};
};

// Never destroyed: a helper may outlive the program's last statement.
Awake& awake() {
  static auto* const one = new Awake;
  return *one;
}

void Parallel(void* context, int64_t count, qjax_task task, void* arg) {
  auto& pool = *static_cast<ffi::ThreadPool*>(context);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), helpers = std::min(threads, count) - 1;
  const auto work = std::make_shared<Work>(count, threads, task, arg);
  if (helpers > 0) {
    awake().Offer(work);
    for (int64_t i = awake().helpers(); i < helpers; ++i) pool.Schedule([work] { awake().Help(work); });
  }
  work->Drain();
  // The last task of another thread ends soon, as a rule: sleeping and waking would take longer.
  for (int spin = 0; spin < 20000 && work->done.load(std::memory_order_acquire) < count; ++spin) Awake::Pause();
  if (work->done.load() == count) return;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() == count; });
}

ffi::Error Finished(int code) {
  if (code == 0) return ffi::Error::Success();
  if (code == 2) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax: no memory for the kernel's scratch space");
  return ffi::Error::InvalidArgument("qjax: the kernel does not serve this weight on this CPU");
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs leaves, ffi::RemainingRets results,
                  Numbers plane_count, Numbers width0, Numbers width1, Numbers offset, Numbers scale_kind,
                  Numbers group_size, Numbers rows, Numbers has_minimum, Numbers has_sub, Numbers has_zero,
                  Numbers has_table, Numbers tables, bool int8, int64_t isa) {
  const size_t count = results.size();
  for (const Numbers& numbers : {plane_count, width0, width1, offset, scale_kind, group_size, rows, has_minimum, has_sub,
                                 has_zero, has_table}) {
    if (numbers.size() != count) return ffi::Error::InvalidArgument("qjax: expected a fact for each weight");
  }
  if (count == 0 || tables.size() != 16 * count || x.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("qjax: expected weights, their tables, and x of two axes");
  }
  std::vector<qjax_weight> weights(count);
  std::vector<float*> products(count);
  size_t next = 0;
  bool sound = true;
  const auto take = [&](int64_t nbytes) -> const uint8_t* {
    auto leaf = leaves.get<ffi::AnyBuffer>(next++);
    sound = sound && leaf.has_value() && static_cast<int64_t>(leaf->size_bytes()) == nbytes;
    return sound ? static_cast<const uint8_t*>(leaf->untyped_data()) : nullptr;
  };
  for (size_t i = 0; i < count; ++i) {
    qjax_weight& w = weights[i];
    w = {};
    w.rows = rows[i];
    w.columns = x.dimensions()[1];
    w.group_size = group_size[i];
    w.plane_count = static_cast<int32_t>(plane_count[i]);
    w.width[0] = static_cast<int32_t>(width0[i]);
    w.width[1] = static_cast<int32_t>(width1[i]);
    w.offset = static_cast<int32_t>(offset[i]);
    w.scale_kind = static_cast<int32_t>(scale_kind[i]);
    w.has_table = static_cast<int32_t>(has_table[i]);
    for (int v = 0; v < 16; ++v) w.table[v] = static_cast<int8_t>(tables[16 * i + v]);
    // Sizes are made of these numbers, so they are looked at before any leaf is.
    const uint8_t there = 0;
    w.plane[0] = w.plane[1] = &there;
    w.scale = &there;
    w.minimum = has_minimum[i] ? &there : nullptr;
    w.sub = has_sub[i] ? &there : nullptr;
    w.zero = has_zero[i] ? &there : nullptr;
    if (const char* refused = qjax_check(&w)) return ffi::Error::InvalidArgument(std::string("qjax: ") + refused);
    for (int p = 0; p < w.plane_count; ++p) w.plane[p] = take(qjax_plane_bytes(&w, p));
    w.scale = take(qjax_scale_bytes(&w));
    if (w.sub != nullptr) w.sub = take(qjax_sub_bytes(&w));
    if (w.minimum != nullptr) w.minimum = take(qjax_scale_bytes(&w));
    if (w.zero != nullptr) w.zero = take(qjax_zero_bytes(&w));
    auto product = results.get<ffi::Buffer<ffi::F32>>(i);
    sound = sound && product.has_value() &&
            static_cast<int64_t>((*product)->element_count()) == x.dimensions()[0] * w.rows;
    if (!sound) return ffi::Error::InvalidArgument("qjax: a leaf of the weight has another size");
    products[i] = (*product)->typed_data();
  }
  if (next != leaves.size()) return ffi::Error::InvalidArgument("qjax: more leaves than the weights have");
  return Finished(qjax_matmul(weights.data(), static_cast<int64_t>(count), x.typed_data(), x.dimensions()[0],
                              products.data(), int8, static_cast<int>(isa), Parallel, &pool));
}

ffi::Error Dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y,
                 int64_t isa) {
  const bool bf16 = w.element_type() == ffi::BF16;
  if ((!bf16 && w.element_type() != ffi::F16) || w.dimensions().size() != 2 || x.dimensions().size() != 2 ||
      w.dimensions()[1] != x.dimensions()[1]) {
    return ffi::Error::InvalidArgument("qjax: expected a matrix of 16-bit floats with x's columns");
  }
  return Finished(qjax_matmul_dense(static_cast<const uint16_t*>(w.untyped_data()), w.dimensions()[0],
                                    w.dimensions()[1], bf16, x.typed_data(), x.dimensions()[0], y->typed_data(),
                                    static_cast<int>(isa), Parallel, &pool));
}

ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::S32> positions, ffi::ResultBuffer<ffi::F32> out, int64_t window, int64_t isa) {
  const auto qs = q.dimensions(), ks = k.dimensions();
  const auto type = k.element_type();
  const int kind = type == ffi::F16 ? QJAX_KIND_F16 : type == ffi::BF16 ? QJAX_KIND_BF16 : QJAX_KIND_F32;
  if (qs.size() != 4 || ks.size() != 4 || v.element_type() != type || v.size_bytes() != k.size_bytes() ||
      (kind == QJAX_KIND_F32 && type != ffi::F32) || ks[0] != qs[0] || ks[3] != qs[3] ||
      static_cast<int64_t>(positions.element_count()) != qs[0] * qs[1] || out->element_count() != q.element_count()) {
    return ffi::Error::InvalidArgument("qjax: expected q [batch, seq, heads, dim], k and v [batch, kv_heads, slots, dim]");
  }
  const qjax_attention_args args{q.typed_data(),     k.untyped_data(), v.untyped_data(), positions.typed_data(),
                                 out->typed_data(),  qs[0],            qs[1],            qs[2],
                                 ks[1],              ks[2],            qs[3],            window,
                                 kind};
  return Finished(qjax_attention(&args, static_cast<int>(isa), Parallel, &pool));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_attention_ffi, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_matmul_ffi, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<Numbers>("plane_count")
                                  .Attr<Numbers>("width0")
                                  .Attr<Numbers>("width1")
                                  .Attr<Numbers>("offset")
                                  .Attr<Numbers>("scale_kind")
                                  .Attr<Numbers>("group_size")
                                  .Attr<Numbers>("rows")
                                  .Attr<Numbers>("has_minimum")
                                  .Attr<Numbers>("has_sub")
                                  .Attr<Numbers>("has_zero")
                                  .Attr<Numbers>("has_table")
                                  .Attr<Numbers>("tables")
                                  .Attr<bool>("int8")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_matmul_dense_ffi, Dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("isa"));
