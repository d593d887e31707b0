// y[m, n] = sum_k x[m, k] * w[n, k] for few rows of x, w packed: one pass over the packed bytes.
//
// Each row of w is unpacked into a buffer of one row that stays in the L1 cache (8-bit codes are read where they
// lie), then multiplied group by group:
//
//   float activations:  y = sum_g scale[g] * sum_i x[i] * code[i]              + minimum[g] * sum_i x[i]
//   int8 activations:   y = sum_g scale[g] * sx[g] * sum_i qx[i] * code[i]     + minimum[g] * sx[g] * sum_i qx[i]
//
// Blocks of rows are shared out over XLA's own thread pool.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "dots.h"
#include "layouts.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// All rows of x, made ready once.
struct Activations {
  int64_t rows = 0;
  const float* x = nullptr;
  bool int8 = false;
  std::vector<int8_t> qx;    // [rows, columns]
  std::vector<float> sx;     // [rows, groups]
  std::vector<float> sums;   // [rows, groups]: of x, or of sx * qx

  void Prepare(const Weight& w) {
    sums.resize(rows * w.groups);
    if (int8) {
      qx.assign(rows * w.columns, 0);
      sx.resize(rows * w.groups);
    }
    for (int64_t i = 0; i < rows * w.groups; ++i) {
      const float* at = x + i * w.group_size;
      float sum = 0;
      if (int8) {
        float largest = 0, any = 0;
        for (int64_t k = 0; k < w.group_size; ++k) {
          largest = std::max(largest, std::fabs(at[k]));
          any += 0 * at[k];  // NaN if one of them is no finite number
        }
        if (std::isnan(any)) {
          sx[i] = sums[i] = any;
          continue;
        }
        const float scale = largest / 127, inverse = scale > 1e-37f ? 1 / scale : 0;
        int32_t whole = 0;
        for (int64_t k = 0; k < w.group_size; ++k) {
          const int32_t q = static_cast<int32_t>(std::nearbyint(at[k] * inverse));
          qx[i * w.group_size + k] = static_cast<int8_t>(q);
          whole += q;
        }
        sx[i] = scale;
        sum = scale * static_cast<float>(whole);
      } else {
        for (int64_t k = 0; k < w.group_size; ++k) sum += at[k];
      }
      sums[i] = sum;
    }
  }
};

void Rows(const Weight& w, const Activations& a, int64_t begin, int64_t end, float* y) {
  std::vector<int8_t> buffer(w.plane_count == 0 || w.width[0] == 8 ? 0 : w.columns);
  std::vector<float> scale(w.groups), minimum(w.minimum == nullptr ? 0 : w.groups);
  for (int64_t n = begin; w.dense != Weight::kPacked && n < end; ++n) {
    for (int64_t m = 0; m < a.rows; ++m) {
      y[m * w.rows + n] = DotDense(w.scale + 2 * n * w.columns, w.dense, a.x + m * w.columns, w.columns);
    }
  }
  for (int64_t n = begin; w.dense == Weight::kPacked && n < end; ++n) {
    const int8_t* codes = RowCodes(w, n, buffer.data());
    RowScales(w, n, scale.data(), minimum.data());
    for (int64_t m = 0; m < a.rows; ++m) {
      float sum = a.int8 ? DotInt8(codes, a.qx.data() + m * w.columns, a.sx.data() + m * w.groups, scale.data(),
                                   w.groups, w.group_size)
                         : DotFloat(codes, a.x + m * w.columns, scale.data(), w.groups, w.group_size);
      if (w.minimum != nullptr) {
        const float* sums = a.sums.data() + m * w.groups;
        float extra = 0;
        for (int64_t g = 0; g < w.groups; ++g) extra += minimum[g] * sums[g];
        sum += extra;
      }
      y[m * w.rows + n] = sum;
    }
  }
}

// Shares `count` blocks over the pool. The caller works too, and waits for blocks, not for helpers: a helper that
// gets its turn only after the last block finds nothing to do, touches nothing, and cannot hold anyone up.
void Parallel(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  const auto state = std::make_shared<State>();
  const auto* job = &work;
  const auto drain = [state, count, job] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      (*job)(i);
      if (state->done.fetch_add(1) + 1 == count) {
        const std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_all();
      }
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(drain));
  drain();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

ffi::Error QMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs leaves,
                   ffi::ResultBuffer<ffi::F32> y, std::string_view scale_kind, ffi::Span<const int64_t> widths,
                   ffi::Span<const int64_t> strides, int64_t offset, ffi::Span<const int64_t> table,
                   int64_t groups, bool has_minimum, bool int8) {
  Weight w;
  Activations a;
  a.rows = x.dimensions()[0];
  a.x = x.typed_data();
  a.int8 = int8;
  w.columns = x.dimensions()[1];
  w.rows = y->dimensions()[1];
  w.groups = groups;
  w.group_size = w.columns / groups;
  w.offset = static_cast<int>(offset);
  w.plane_count = static_cast<int>(widths.size());
  if (scale_kind == "f16") w.dense = Weight::kF16;
  if (scale_kind == "bf16") w.dense = Weight::kBf16;
  const bool packed = w.dense == Weight::kPacked;
  if (w.plane_count < (packed ? 1 : 0) || w.plane_count > (packed ? 2 : 0)) return ffi::Error::InvalidArgument("expected one or two planes");
  for (int p = 0; p < w.plane_count; ++p) {
    w.width[p] = static_cast<int>(widths[p]);
    w.stride[p] = static_cast<int>(strides[p]);
    if (w.width[p] != 8 && UnpackFor(w.width[p], w.stride[p]) == nullptr) {
      return ffi::Error::InvalidArgument("no unpacking for this plane");
    }
  }
  if (table.size() == 16) {
    for (int i = 0; i < 16; ++i) w.table_values[i] = static_cast<int8_t>(table[i]);
    w.table = w.table_values;
  }
  constexpr std::pair<std::string_view, Weight::Kind> kKinds[] = {
      {"half", Weight::kHalf}, {"float", Weight::kFloat}, {"e8m0", Weight::kE8m0}, {"q2_k", Weight::kQ2K},
      {"q3_k", Weight::kQ3K},  {"q4_k", Weight::kQ4K},    {"q6_k", Weight::kQ6K},  {"iq4_xs", Weight::kIq4Xs}};
  bool known = !packed;
  for (const auto& [name, kind] : kKinds) {
    if (name == scale_kind) w.kind = kind, known = true;
  }
  if (!known) return ffi::Error::InvalidArgument("unknown kind of scales");
  // Leaves in order: planes, scale, integer scales if two-level, minimum if any; each of the size that it will be read.
  const bool two_level = w.kind >= Weight::kQ2K;
  const int64_t scale_bytes = w.kind == Weight::kE8m0 ? 1 : w.kind == Weight::kFloat ? 4 : 2;
  const int64_t scales = w.rows * (two_level ? w.columns / kSuperBlock : w.groups) * scale_bytes;
  size_t next = 0;
  bool sound = true;
  const auto take = [&](int64_t nbytes) -> const uint8_t* {
    auto leaf = leaves.get<ffi::AnyBuffer>(next++);
    sound = sound && leaf.has_value() && static_cast<int64_t>(leaf->size_bytes()) == nbytes;
    return sound ? static_cast<const uint8_t*>(leaf->untyped_data()) : nullptr;
  };
  for (int p = 0; p < w.plane_count; ++p) w.plane[p] = take(w.rows * w.columns * w.width[p] / 8);
  w.scale = take(packed ? scales : 2 * w.rows * w.columns);
  if (two_level) w.sub = take(w.rows * w.columns / kSuperBlock * SubScaleBytes(w.kind));
  if (has_minimum) w.minimum = take(scales);
  if (!sound || next != leaves.size()) return ffi::Error::InvalidArgument("a leaf of the weight has another size");

  if (packed) a.Prepare(w);
  // Blocks of about 64 KiB of codes: enough to be worth a turn, few enough to share out evenly.
  const int64_t rows = std::max<int64_t>(1, std::min<int64_t>(w.rows, (1 << 16) / std::max<int64_t>(1, w.columns)));
  float* out = y->typed_data();
  Parallel(pool, (w.rows + rows - 1) / rows,
           [&](int64_t i) { Rows(w, a, i * rows, std::min(w.rows, (i + 1) * rows), out); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_qmatmul, QMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("scale_kind")
                                  .Attr<ffi::Span<const int64_t>>("widths")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<int64_t>("offset")
                                  .Attr<ffi::Span<const int64_t>>("table")
                                  .Attr<int64_t>("groups")
                                  .Attr<bool>("has_minimum")
                                  .Attr<bool>("int8"));
