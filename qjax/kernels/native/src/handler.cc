// The door from XLA to core.h: buffers and attributes in, the same products out, threads from XLA's own pool.

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Numbers = ffi::Span<const int64_t>;

// Shares tasks over the pool. The caller works too, and waits for tasks, not for helpers: a helper that gets its turn
// only after the last task finds nothing to do, touches nothing, and cannot hold anyone up.
void Parallel(void* context, int64_t count, qjax_task task, void* arg) {
  auto& pool = *static_cast<ffi::ThreadPool*>(context);
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  const auto state = std::make_shared<State>();
  const auto drain = [state, count, task, arg] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      task(arg, i);
      if (state->done.fetch_add(1) + 1 == count) {
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_all();
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(drain));
  drain();
  // The last task of another thread ends soon, as a rule: sleeping and waking would take longer.
  for (int spin = 0; spin < 20000 && state->done.load(std::memory_order_acquire) < count; ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (state->done.load() == count) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
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

}  // namespace

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
