// The door from XLA to core.h: buffers and attributes in, the same products out, threads from XLA's own pool.

#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "core.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

// The handlers are looked up by name.
#pragma GCC visibility push(default)
extern "C" XLA_FFI_Error* qjax_matmul_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_matmul_dense_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_attention_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_rms_norm_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_swiglu_ffi(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* qjax_rope_ffi(XLA_FFI_CallFrame*);
#pragma GCC visibility pop

namespace ffi = xla::ffi;

namespace {

using Numbers = ffi::Span<const int64_t>;
using Floats32 = ffi::Span<const float>;
using qjax::RunTogether;
using qjax::Starts;
using qjax::Work;
using qjax::team;

int64_t Threads(ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// What a call's tasks need beside themselves: where their threads come from, and what will be read after them.
struct Context {
  ffi::ThreadPool& pool;
  std::shared_ptr<const Starts> ahead;
};

void Parallel(void* context, int64_t count, qjax_task task, void* arg) {
  auto& [pool, ahead] = *static_cast<Context*>(context);
  RunTogether(std::make_shared<Work>(count, Threads(pool), task, arg, ahead),
              [&](const std::shared_ptr<Work>& work) { pool.Schedule([work] { team().Help(work); }); });
}

ffi::Error Finished(int code) {
  if (code == 0) return ffi::Error::Success();
  if (code == 2) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax: no memory for the kernel's scratch space");
  return ffi::Error::InvalidArgument("qjax: the kernel does not serve this weight on this CPU");
}

// Whether both change x in the same way.
bool Alike(const qjax_input& a, const qjax_input& b, int64_t columns) {
  const auto equal = [](const void* x, const void* y, int64_t n) {
    return x == y || (x != nullptr && y != nullptr && memcmp(x, y, 4 * n) == 0);
  };
  return equal(a.columns, b.columns, columns) && equal(a.input_scale, b.input_scale, columns) &&
         equal(a.x_scale, b.x_scale, 1);
}

int Multiply(ffi::ThreadPool& pool, const qjax_weight* w, int64_t count, const qjax_input& input, float* const* y,
             int isa) {
  const int64_t threads = Threads(pool);
  Context context{pool, nullptr};
  if (threads > 1 && qjax_reads_once(isa, input.m)) {
    context.ahead = team().Next(w[0].plane[0], [&] {
      Starts starts(threads);
      for (int64_t t = 0; t < threads; ++t) starts[t].nbytes = qjax_start(w, count, t, threads, &starts[t].at);
      return starts;
    });
  }
  return qjax_matmul(w, count, &input, y, isa, Parallel, &context);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs leaves, ffi::RemainingRets results,
                  Numbers plane_count, Numbers width0, Numbers width1, Numbers offset, Numbers scale_kind,
                  Numbers group_size, Numbers rows, Numbers has_minimum, Numbers has_sub, Numbers has_zero,
                  Numbers has_columns, Numbers has_input_scale, Numbers has_x_scale, Numbers has_table, Numbers tables,
                  Numbers value_kind, Numbers has_super, Numbers scale_block, Floats32 values, Floats32 scale_offset,
                  Floats32 scale_tables, int64_t rounding, int64_t isa) {
  const size_t count = results.size();
  for (const Numbers& numbers : {plane_count, width0, width1, offset, scale_kind, group_size, rows, has_minimum, has_sub,
                                 has_zero, has_columns, has_input_scale, has_x_scale, has_table, value_kind, has_super, scale_block}) {
    if (numbers.size() != count) return ffi::Error::InvalidArgument("qjax: expected a fact for each weight");
  }
  if (count == 0 || tables.size() != 16 * count || values.size() != 16 * count || scale_offset.size() != count ||
      x.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument("qjax: expected weights, their tables, and x of two axes");
  }
  std::vector<qjax_weight> weights(count);
  std::vector<qjax_input> inputs(count);
  std::vector<float*> products(count);
  size_t next = 0, next_table = 0;
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
    w.value_kind = static_cast<int32_t>(value_kind[i]);
    for (int v = 0; v < 16; ++v) w.values[v] = values[16 * i + v];
    const float none = 0;
    if (has_super[i]) {
      if (scale_tables.size() < next_table + 256) return ffi::Error::InvalidArgument("qjax: expected a table of scales");
      w.scale_table = scale_tables.begin() + next_table;
      next_table += 256;
      w.scale_block = scale_block[i];
      w.scale_offset = scale_offset[i];
    }
    // Sizes are made of these numbers, so they are looked at before any leaf is.
    const uint8_t there = 0;
    w.plane[0] = w.plane[1] = &there;
    w.scale = &there;
    w.minimum = has_minimum[i] ? &there : nullptr;
    w.sub = has_sub[i] ? &there : nullptr;
    w.zero = has_zero[i] ? &there : nullptr;
    w.super_scale = has_super[i] ? &none : nullptr;
    w.start = has_super[i] ? &there : nullptr;
    w.supers = has_super[i] ? 1 : 0;
    if (const char* refused = qjax_check(&w)) return ffi::Error::InvalidArgument(std::string("qjax: ") + refused);
    for (int p = 0; p < w.plane_count; ++p) w.plane[p] = take(qjax_plane_bytes(&w, p));
    w.scale = take(qjax_scale_bytes(&w));
    if (w.sub != nullptr) w.sub = take(qjax_sub_bytes(&w));
    if (w.minimum != nullptr) w.minimum = take(qjax_scale_bytes(&w));
    if (w.zero != nullptr) w.zero = take(qjax_zero_bytes(&w));
    if (has_super[i]) {
      const auto leaf = leaves.get<ffi::AnyBuffer>(next);
      const int64_t rows_there = (w.rows + 15) / 16 * 16;
      w.supers = leaf.has_value() ? static_cast<int64_t>(leaf->size_bytes()) / (4 * rows_there) : 0;
      w.super_scale = reinterpret_cast<const float*>(take(w.supers * 4 * rows_there));
      w.start = take(rows_there);
      sound = sound && w.supers > 0;
    }
    const auto numbers = [&](bool has, int64_t n) { return has ? take(4 * n) : nullptr; };
    inputs[i] = {x.typed_data(), x.dimensions()[0], nullptr, nullptr, nullptr, static_cast<int32_t>(rounding)};
    inputs[i].columns = reinterpret_cast<const int32_t*>(numbers(has_columns[i], w.columns));
    inputs[i].input_scale = reinterpret_cast<const float*>(numbers(has_input_scale[i], w.columns));
    inputs[i].x_scale = reinterpret_cast<const float*>(numbers(has_x_scale[i], 1));
    auto product = results.get<ffi::Buffer<ffi::F32>>(i);
    sound = sound && product.has_value() &&
            static_cast<int64_t>((*product)->element_count()) == x.dimensions()[0] * w.rows;
    if (!sound) return ffi::Error::InvalidArgument("qjax: a leaf of the weight has another size");
    products[i] = (*product)->typed_data();
  }
  if (next != leaves.size()) return ffi::Error::InvalidArgument("qjax: more leaves than the weights have");
  // Weights that change x in the same way go together: x is made ready once for them.
  for (size_t i = 0; i < count;) {
    const auto same = [&](const qjax_input& other) { return Alike(inputs[i], other, x.dimensions()[1]); };
    size_t end = i + 1;
    while (end < count && same(inputs[end])) ++end;
    const auto some = static_cast<int64_t>(end - i);
    const int code = Multiply(pool, &weights[i], some, inputs[i], &products[i], static_cast<int>(isa));
    if (code != 0) return Finished(code);
    i = end;
  }
  return Finished(0);
}

ffi::Error Dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y,
                 int64_t isa) {
  const bool bf16 = w.element_type() == ffi::BF16;
  if ((!bf16 && w.element_type() != ffi::F16) || w.dimensions().size() != 2 || x.dimensions().size() != 2 ||
      w.dimensions()[1] != x.dimensions()[1]) {
    return ffi::Error::InvalidArgument("qjax: expected a matrix of 16-bit floats with x's columns");
  }
  Context context{pool, nullptr};
  return Finished(qjax_matmul_dense(static_cast<const uint16_t*>(w.untyped_data()), w.dimensions()[0],
                                    w.dimensions()[1], bf16, x.typed_data(), x.dimensions()[0], y->typed_data(),
                                    static_cast<int>(isa), Parallel, &context));
}

// entries: k, v, positions; or int8 k and its scales, int8 v and its scales, positions.
ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::RemainingArgs entries,
                     ffi::ResultBuffer<ffi::F32> out, int64_t window, int64_t isa) {
  const bool int8 = entries.size() == 5;
  const auto k = entries.get<ffi::AnyBuffer>(0), v = entries.get<ffi::AnyBuffer>(int8 ? 2 : 1);
  const auto positions = entries.get<ffi::Buffer<ffi::S32>>(int8 ? 4 : 2);
  const auto wrong = [] {
    return ffi::Error::InvalidArgument("qjax: expected q [batch, seq, heads, dim], k and v [batch, kv_heads, slots, dim]");
  };
  if ((entries.size() != 3 && !int8) || !k.has_value() || !v.has_value() || !positions.has_value()) return wrong();
  const auto qs = q.dimensions(), ks = k->dimensions();
  const auto type = k->element_type();
  const int kind = type == ffi::F16    ? QJAX_KIND_F16
                   : type == ffi::BF16 ? QJAX_KIND_BF16
                   : type == ffi::S8   ? QJAX_KIND_INT8
                                       : QJAX_KIND_F32;
  if (qs.size() != 4 || ks.size() != 4 || v->element_type() != type || v->size_bytes() != k->size_bytes() ||
      (kind == QJAX_KIND_F32 && type != ffi::F32) || int8 != (kind == QJAX_KIND_INT8) || ks[0] != qs[0] ||
      ks[3] != qs[3] || static_cast<int64_t>(positions->element_count()) != qs[0] * qs[1] ||
      out->element_count() != q.element_count()) {
    return wrong();
  }
  const float* scales[2] = {nullptr, nullptr};
  for (int i = 0; int8 && i < 2; ++i) {
    const auto scale = entries.get<ffi::Buffer<ffi::F32>>(2 * i + 1);
    if (!scale.has_value() || static_cast<int64_t>(scale->element_count()) != ks[0] * ks[1] * ks[2]) return wrong();
    scales[i] = scale->typed_data();
  }
  const qjax_attention_args args{q.typed_data(),          k->untyped_data(),  v->untyped_data(), scales[0], scales[1],
                                 positions->typed_data(), out->typed_data(),  qs[0],             qs[1],     qs[2],
                                 ks[1],                   ks[2],              qs[3],             window,    kind};
  Context context{pool, nullptr};
  return Finished(qjax_attention(&args, static_cast<int>(isa), Parallel, &context));
}

using Floats = ffi::Buffer<ffi::F32>;

// Rows and numbers of a row of [..., n].
struct Rows {
  int64_t count, n;
};
template <typename Buffer>
Rows RowsOf(const Buffer& x) {
  const auto sizes = x.dimensions();
  const int64_t n = sizes.size() == 0 ? 1 : sizes[sizes.size() - 1];
  return {n == 0 ? 0 : static_cast<int64_t>(x.element_count()) / n, n};
}

ffi::Error RmsNorm(ffi::ThreadPool pool, Floats x, Floats weight, ffi::ResultBuffer<ffi::F32> y, float eps, int64_t isa) {
  const auto [rows, n] = RowsOf(x);
  if (static_cast<int64_t>(weight.element_count()) != n || y->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("qjax: expected x [..., n] and a weight [n]");
  }
  Context context{pool, nullptr};
  return Finished(qjax_rms_norm(x.typed_data(), weight.typed_data(), eps, rows, n, y->typed_data(),
                                static_cast<int>(isa), Parallel, &context));
}

ffi::Error SwiGlu(ffi::ThreadPool pool, Floats gate, Floats up, ffi::ResultBuffer<ffi::F32> y, int64_t isa) {
  const auto [rows, n] = RowsOf(gate);
  if (up.element_count() != gate.element_count() || y->element_count() != gate.element_count()) {
    return ffi::Error::InvalidArgument("qjax: expected gate and up of one shape");
  }
  Context context{pool, nullptr};
  return Finished(qjax_swiglu(gate.typed_data(), up.typed_data(), rows, n, y->typed_data(), static_cast<int>(isa),
                              Parallel, &context));
}

ffi::Error Rope(ffi::ThreadPool pool, Floats x, Floats cosine, Floats sine, ffi::ResultBuffer<ffi::F32> y,
                bool interleaved, int64_t isa) {
  const auto sizes = x.dimensions();
  const auto [tokens, half] = RowsOf(cosine);
  if (sizes.size() != 4 || sizes[0] * sizes[1] != tokens || sine.element_count() != cosine.element_count() ||
      y->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("qjax: expected x [batch, seq, heads, dim], angles [batch, seq, half]");
  }
  Context context{pool, nullptr};
  return Finished(qjax_rope(x.typed_data(), cosine.typed_data(), sine.typed_data(), tokens, sizes[2], sizes[3], half,
                            interleaved, y->typed_data(), static_cast<int>(isa), Parallel, &context));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_attention_ffi, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
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
                                  .Attr<Numbers>("has_columns")
                                  .Attr<Numbers>("has_input_scale")
                                  .Attr<Numbers>("has_x_scale")
                                  .Attr<Numbers>("has_table")
                                  .Attr<Numbers>("tables")
                                  .Attr<Numbers>("value_kind")
                                  .Attr<Numbers>("has_super")
                                  .Attr<Numbers>("scale_block")
                                  .Attr<Floats32>("values")
                                  .Attr<Floats32>("scale_offset")
                                  .Attr<Floats32>("scale_tables")
                                  .Attr<int64_t>("rounding")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_matmul_dense_ffi, Dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_rms_norm_ffi, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_swiglu_ffi, SwiGlu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_rope_ffi, Rope,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("interleaved")
                                  .Attr<int64_t>("isa"));
