// The products, in terms of a table of kernels: x made ready once, tiles of w shared out over threads.
//
// Few rows of x: each tile is unpacked in registers on its way into the sums. Many rows: a stretch of a tile's columns
// is unpacked into a panel that stays in cache and serves all rows. A tile's sums are made by one thread, in an order
// that neither the number of threads nor that of rows changes.

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "core.h"
#include "run.h"

namespace qjax {
namespace {

constexpr int kTilesTogether = 2;      // of a panel: each chunk of x is read once for them
// Columns are taken in stretches of whole super-blocks, so that scales and codes are read side by side.
constexpr int64_t kFusedSteps = 32;    // unpacked in registers
constexpr int64_t kPanelSteps = 16;    // to 8-bit codes: 8 KiB a tile
constexpr int64_t kFloatSteps = 8;     // to floats: 16 KiB a tile
constexpr int64_t kMostParts = 2 * kFusedSteps;

int64_t Tiles(const qjax_weight& w) { return Ceil(w.rows, kLanes); }
int64_t Steps(const qjax_weight& w) { return Ceil(w.columns, kStep); }
bool Halves(const qjax_weight& w) { return w.group_size == 16; }
// Scales that the kernels read of a tile.
int64_t Parts(const qjax_weight& w) { return Steps(w) * (Halves(w) ? 2 : 1); }

int64_t Groups(const qjax_weight& w) {
  return Halves(w) ? 2 * Steps(w) : Ceil(w.columns, w.group_size);
}

int SubBytes(int kind) {
  switch (kind) {
    case QJAX_Q2_K:
    case QJAX_Q6_K:
      return 16;
    case QJAX_Q3_K:
    case QJAX_Q4_K:
      return 12;
    case QJAX_IQ4_XS:
      return 6;
    default:
      return 0;
  }
}

CodeForm FormOf(const qjax_weight& w) {
  const int low = w.width[0], high = w.plane_count > 1 ? w.width[1] : 0;
  if (w.value_kind != QJAX_INTEGERS) {
    if (low != (w.value_kind == QJAX_VALUES ? 4 : 8) || high != 0) return kForms;
    return w.value_kind == QJAX_E4M3 ? kFormE4m3 : w.value_kind == QJAX_E5M2 ? kFormE5m2 : kFormValues;
  }
  if (low == 8 && high == 0) return kForm8;
  if (low == 4 && high == 0) return w.has_table ? kForm4Table : kForm4;
  if (low == 4 && high == 1) return kForm4And1;
  if (low == 4 && high == 2) return kForm4And2;
  if (low == 2 && high == 0) return kForm2;
  if (low == 2 && high == 1) return kForm2And1;
  return kForms;
}

bool Wide(CodeForm form) { return form == kForm8 || form == kForm4Table; }

// What the unsigned codes that the kernels see are above the numbers they stand for.
int Offset(const qjax_weight& w) { return w.has_table ? 128 : w.offset; }
// What the float kernels take from a code, so that the rest is a signed byte.
int Bias(const qjax_weight& w) { return Wide(FormOf(w)) ? 128 : w.offset; }

bool HasMinimum(const qjax_weight& w, bool int8) {
  return w.minimum != nullptr || w.zero != nullptr || (!int8 && Bias(w) != Offset(w));
}

// One block of memory, cut up.
class Block {
 public:
  ~Block() { free(memory_); }
  template <typename T>
  void Reserve(T** to, int64_t count) {
    if (parts_ == kMost) return;
    part_[parts_++] = {reinterpret_cast<void**>(to), size_};
    size_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }
  bool Allocate() {
    memory_ = aligned_alloc(64, size_ + 64);
    for (int i = 0; memory_ != nullptr && i < parts_; ++i) *part_[i].to = static_cast<char*>(memory_) + part_[i].at;
    return memory_ != nullptr;
  }

 private:
  static constexpr int kMost = 8;
  struct Part {
    void** to;
    size_t at;
  } part_[kMost];
  int parts_ = 0;
  size_t size_ = 0;
  void* memory_ = nullptr;
};

// x for all weights of a call: chunks of rows that the kernels take at once, row numbers innermost.
struct Inputs {
  const KernelTable* table;
  const qjax_input& from;
  int64_t m, columns, steps, chunks;
  bool int8, tokens, fused;
  int8_t* q = nullptr;           // [chunk][steps, 8, rows, 4]
  float* packed = nullptr;       // [chunk][steps, 32, rows]
  float* scale = nullptr;        // [chunk][steps, rows]; for tokens [m]
  int32_t* whole = nullptr;      // [chunk][2 steps, rows]: sums of q; for tokens [chunk][steps, rows]
  float* half_sums = nullptr;    // [chunk][2 steps, rows]: sums of x as it is multiplied

  int64_t First(int64_t chunk) const { return m * chunk / chunks; }

  // Row r of x, changed as is asked for, in `to` (whole steps) where that is needed.
  const float* Row(int64_t r, float* to) const {
    const float* row = from.x + r * columns;
    if (from.columns == nullptr && from.input_scale == nullptr && (!tokens || columns % kStep == 0)) return row;
    memset(to + columns, 0, (steps * kStep - columns) * sizeof(float));
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t at = from.columns == nullptr ? k : from.columns[k];
      to[k] = at < 0 || at >= columns ? __builtin_nanf("") : row[at];
      if (from.input_scale != nullptr && to[k] == to[k]) to[k] /= from.input_scale[at];
    }
    return to;
  }

  bool Prepare(int64_t chunk) const {
    const int64_t first = First(chunk), rows = First(chunk + 1) - first, filled = steps * kStep;
    float* memory = scratch.Floats(filled + filled / 4 + steps);
    if (memory == nullptr) return false;
    auto* round_row = reinterpret_cast<int8_t*>(memory + filled);
    auto* sums_row = reinterpret_cast<int32_t*>(memory + filled + filled / 4);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = Row(first + r, memory);
      if (tokens) {
        table->quantize_row(row, steps, from.x_scale, round_row, scale + first + r, sums_row);
        int8_t* out = q + first * filled + 4 * r;
        for (int64_t j = 0; j < filled / 4; ++j) memcpy(out + 4 * rows * j, round_row + 4 * j, 4);
        for (int64_t s = 0; s < steps; ++s) whole[first * steps + s * rows + r] = sums_row[s];
        continue;
      }
      for (int64_t s = 0; s < steps; ++s) {
        float padded[kStep];
        const float* at = row + s * kStep;
        if (columns - s * kStep < kStep) {
          memset(padded, 0, sizeof padded);
          memcpy(padded, at, (columns - s * kStep) * sizeof(float));
          at = padded;
        }
        float* sums = half_sums + first * 2 * steps + 2 * s * rows + r;
        if (int8) {
          int8_t round[kStep];
          int32_t both[2];
          float* to = scale + first * steps + s * rows + r;
          table->quantize(at, round, to, both);
          int8_t* out = q + first * steps * kStep + s * kStep * rows + 4 * r;
          for (int j = 0; j < 8; ++j) memcpy(out + 4 * rows * j, round + 4 * j, 4);
          int32_t* integers = whole + first * 2 * steps + 2 * s * rows + r;
          for (int h = 0; h < 2; ++h) {
            integers[h * rows] = both[h];
            sums[h * rows] = *to * static_cast<float>(both[h]);
          }
        } else {
          float* out = packed + first * steps * kStep + s * kStep * rows + r;
          for (int k = 0; k < kStep; ++k) out[k * rows] = at[k];
          for (int h = 0; h < 2; ++h) {
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += at[16 * h + k];
            sums[h * rows] = sum;
          }
        }
      }
    }
    return true;
  }
};

// What differs from weight to weight: where integer sums start, and sums over whole steps where a scale serves one.
struct Job {
  const qjax_weight* w;
  float* y;
  CodeForm form;
  bool halves, minimum;
  bool raw;  // where nothing else hangs on the scales, the product reads them as they are
  int64_t steps, tiles, tiles_a_task, first_task;
  int32_t* start = nullptr;  // for tokens, sums of q over the columns of each scale
  float* sums = nullptr;
  uint8_t table[16];

  // Scales of a step.
  int64_t Each() const { return halves ? 2 : 1; }

  // What the dots of codes in this form are above the numbers they stand for.
  int32_t Taken(const Inputs& in, CodeForm as) const { return Offset(*w) - (Wide(as) ? in.table->wide_bias : 0); }

  // Steps that share a scale, of whole steps.
  int64_t Shared() const { return Ceil(w->group_size, kStep); }

  void Fit(const Inputs& in) {
    const int64_t each = Each();
    if (in.tokens) {
      const int64_t groups = Groups(*w), shared = Shared();
      memset(start, 0, groups * in.m * sizeof(int32_t));
      for (int64_t chunk = 0; chunk < in.chunks; ++chunk) {
        const int64_t first = in.First(chunk), rows = in.First(chunk + 1) - first;
        for (int64_t i = 0; i < steps * rows; ++i) {
          start[first * groups + i / rows / shared * rows + i % rows] += in.whole[first * steps + i];
        }
      }
      return;
    }
    if (raw && minimum) SumGroups(in);
    // A panel holds bytes, whatever the codes were.
    const int32_t by = -Taken(in, in.fused ? form : kForm8);
    for (int64_t chunk = 0; chunk < in.chunks; ++chunk) {
      const int64_t first = in.First(chunk), rows = in.First(chunk + 1) - first;
      const int32_t* whole = in.whole + first * 2 * steps;
      const float* half = in.half_sums + first * 2 * steps;
      for (int64_t i = 0; i < steps * each; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t to = first * steps * each + i * rows + r, at = (halves ? i : 2 * i) * rows + r;
          if (in.int8) start[to] = by * (halves ? whole[at] : whole[at] + whole[at + rows]);
          if (minimum && !raw) sums[to] = halves ? half[at] : half[at] + half[at + rows];
        }
      }
    }
  }

  // Of the only chunk, sums of x over the columns of each scale.
  void SumGroups(const Inputs& in) const {
    const int64_t shared = w->group_size / kStep;
    memset(sums, 0, Groups(*w) * in.m * sizeof(float));
    for (int64_t i = 0; i < 2 * steps; ++i) {
      for (int64_t r = 0; r < in.m; ++r) sums[i / 2 / shared * in.m + r] += in.half_sums[i * in.m + r];
    }
  }

  Rows ChunkAt(const Inputs& in, int64_t chunk, int64_t step) const {
    const int64_t first = in.First(chunk), rows = in.First(chunk + 1) - first, each = Each();
    const int64_t at = first * steps + step * rows;
    Rows out{static_cast<int>(rows), nullptr, nullptr, nullptr, nullptr, nullptr};
    if (in.int8) {
      out.q = in.q + at * kStep;
      out.scale = in.scale + at;
      out.start = start + at * each;
    } else {
      out.x = in.packed + at * kStep;
    }
    if (minimum) out.sums = sums + at * each;
    return out;
  }

  Codes CodesAt(int64_t tile, int64_t step) const {
    Codes codes{{nullptr, nullptr}, table, w->values};
    for (int p = 0; p < w->plane_count; ++p) {
      codes.plane[p] = w->plane[p] + (tile * steps + step) * 64 * w->width[p];
    }
    return codes;
  }

  // Scales of `n` steps of a tile from `step` on, one a step or half step.
  void Scales(const Inputs& in, int64_t tile, int64_t step, int64_t n, float* scale, float* low) const {
    const int64_t groups = Groups(*w), each = Each();
    if (w->group_size <= kStep) {
      in.table->scales(*w, groups, tile, step * each, n * each, scale, minimum ? low : nullptr);
    } else {
      const auto group_of = [&](int64_t s) { return s * kStep / w->group_size; };
      const int64_t first = group_of(step), count = group_of(step + n - 1) - first + 1;
      alignas(64) float some_scale[kMostParts * kLanes], some_low[kMostParts * kLanes];
      in.table->scales(*w, groups, tile, first, count, some_scale, minimum ? some_low : nullptr);
      for (int64_t s = 0; s < n; ++s) {
        const int64_t from = (group_of(step + s) - first) * kLanes;
        memcpy(scale + s * kLanes, some_scale + from, kLanes * sizeof(float));
        if (minimum) memcpy(low + s * kLanes, some_low + from, kLanes * sizeof(float));
      }
    }
    for (int64_t i = 0; form == kFormE4m3 && i < n * each * kLanes; ++i) scale[i] *= 256;
    const int extra = in.int8 ? 0 : Bias(*w) - Offset(*w);
    for (int64_t i = 0; extra != 0 && i < n * each * kLanes; ++i) low[i] += scale[i] * static_cast<float>(extra);
  }

  void Write(const Inputs& in, int64_t tile, const float* sums) const {
    const int64_t lanes = std::min<int64_t>(kLanes, w->rows - tile * kLanes);
    for (int64_t r = 0; r < in.m; ++r) {
      float* to = y + r * w->rows + tile * kLanes;
      if (!in.tokens) memcpy(to, sums + r * kLanes, lanes * sizeof(float));
      for (int64_t i = 0; in.tokens && i < lanes; ++i) to[i] = sums[r * kLanes + i] * in.scale[r];
    }
  }

  // Integer sums of `n` steps of a tile, whose codes in the form `as` begin at `codes`; scaled where a scale's columns end.
  void Sum(const Inputs& in, CodeForm as, Codes codes, int64_t tile, int64_t step, int64_t n, int64_t chunk,
           int32_t* dots, float* sums) const {
    const int64_t shared = Shared(), groups = Groups(*w), first = in.First(chunk), rows = in.First(chunk + 1) - first;
    for (int64_t s = step, end; s < step + n; s = end) {
      const int64_t group = s / shared, last = std::min(steps, (group + 1) * shared);
      end = std::min(step + n, last);
      Rows x{static_cast<int>(rows), in.q + (first * steps + s * rows) * kStep, nullptr, nullptr, nullptr, nullptr};
      in.table->dots[as][rows - 1](codes, end - s, x, dots);
      for (int p = 0; p < (as == form ? w->plane_count : 1); ++p) {
        codes.plane[p] += 64 * (end - s) * (as == form ? w->width[p] : 8);
      }
      if (end < last) continue;
      const int64_t at = (tile * groups + group) * kLanes;
      alignas(64) float by[kLanes];
      in.table->scales(*w, groups, tile, group, 1, by, nullptr);
      const ScalesAt scale{by, nullptr, nullptr, w->zero == nullptr ? nullptr : w->zero + at, 0};
      in.table->scale_dots(rows, scale, Taken(in, as), start + first * groups + group * rows, dots, sums);
    }
  }

  // Scales of a stretch of a tile, in one of the ways that products read them.
  struct Stretch {
    alignas(64) float scale[kMostParts * kLanes], low[kMostParts * kLanes];
    alignas(64) uint8_t sub[kMostParts * kLanes], sub_low[kMostParts * kLanes];
    const uint16_t *raw, *raw_low;
  };

  // Whether the product reads the integers of two levels as they are.
  bool Sub(const Inputs& in) const { return in.int8 && SubBytes(w->scale_kind); }

  ScaleForm FormOfScales(const Inputs& in) const {
    if (Sub(in)) return halves ? kSubEachHalfStep : kSubEachStep;
    return halves ? kEachHalfStep : kEachStep;
  }

  void Read(const Inputs& in, int64_t tile, int64_t step, int64_t n, Stretch* to) const {
    if (!Sub(in)) {
      Scales(in, tile, step, n, to->scale, to->low);
      return;
    }
    const int64_t each = Each(), block = (tile * steps + step) * kStep / kSuperBlock * kLanes;
    in.table->sub_scales(*w, Groups(*w), tile, step * each, n * each, to->sub, to->sub_low);
    to->raw = static_cast<const uint16_t*>(w->scale) + block;
    to->raw_low = minimum ? static_cast<const uint16_t*>(w->minimum) + block : nullptr;
  }

  void Multiply(const Inputs& in, CodeForm as, const Codes& codes, int64_t n, const Rows& rows, const Stretch& read,
                float* sums) const {
    const int64_t each = Each();
    const auto& products = in.int8 ? in.table->int8_product[as] : in.table->float_product[as];
    products[FormOfScales(in)][rows.rows - 1](codes, n, rows, {read.scale, read.raw, read.sub, nullptr, 0}, Bias(*w), sums);
    if (!minimum) return;
    if (Sub(in)) {
      const int64_t blocks = n * kStep / kSuperBlock;
      in.table->sub_minimum[rows.rows - 1](blocks, static_cast<int>(n * each / blocks), rows, read.raw_low, read.sub_low, sums);
    } else {
      in.table->minimum[rows.rows - 1](n * each, rows, read.low, sums);
    }
  }

  void Few(const Inputs& in, int64_t begin, int64_t end) const {
    Stretch read;
    const int64_t groups = Groups(*w);
    for (int64_t tile = begin; tile < end; ++tile) {
      alignas(64) float sums[kMostRows * kLanes] = {};
      if (in.tokens) {
        alignas(64) int32_t dots[kMostRows * kLanes] = {};
        Sum(in, form, CodesAt(tile, 0), tile, 0, steps, 0, dots, sums);
        Write(in, tile, sums);
        continue;
      }
      if (raw) {
        const int64_t at = tile * groups * kLanes;
        const ScalesAt scales{nullptr, static_cast<const uint16_t*>(w->scale) + at, nullptr,
                              w->zero == nullptr ? nullptr : w->zero + at, w->group_size / kStep};
        const auto product = in.table->int8_product[form][w->zero == nullptr ? kRaw : kRawZero][in.m - 1];
        product(CodesAt(tile, 0), steps, ChunkAt(in, 0, 0), scales, 0, sums);
      }
      for (int64_t step = 0; !raw && step < steps; step += kFusedSteps) {
        const int64_t n = std::min(kFusedSteps, steps - step);
        Read(in, tile, step, n, &read);
        Multiply(in, form, CodesAt(tile, step), n, ChunkAt(in, 0, step), read, sums);
      }
      Write(in, tile, sums);
    }
  }

  bool Many(const Inputs& in, int64_t begin, int64_t end) const {
    const int64_t count = end - begin, each = Each();
    const int64_t stretch = in.int8 ? kPanelSteps : kFloatSteps;
    const int64_t panel_floats = stretch * kStep * kLanes / (in.int8 ? 4 : 1);
    const int64_t code_floats = in.int8 ? 0 : stretch * kStep * kLanes / 4;
    const int64_t tile_floats = panel_floats + (in.tokens ? 2 : 1) * in.m * kLanes;
    float* memory = scratch.Floats(count * tile_floats + code_floats);
    if (memory == nullptr) return false;
    Stretch read[kTilesTogether];
    const auto panel_of = [&](int64_t i) { return memory + i * tile_floats; };
    const auto sums_of = [&](int64_t i) { return memory + i * tile_floats + panel_floats; };
    const auto dots_of = [&](int64_t i) { return reinterpret_cast<int32_t*>(sums_of(i) + in.m * kLanes); };
    auto* codes = reinterpret_cast<uint8_t*>(memory + count * tile_floats);
    for (int64_t i = 0; i < count; ++i) memset(sums_of(i), 0, (tile_floats - panel_floats) * sizeof(float));
    for (int64_t step = 0; step < steps; step += stretch) {
      const int64_t n = std::min(stretch, steps - step);
      Codes packed[kTilesTogether];
      for (int64_t i = 0; i < count; ++i) {
        if (!in.tokens) Read(in, begin + i, step, n, &read[i]);
        packed[i] = CodesAt(begin + i, step);
        auto* bytes = in.int8 ? reinterpret_cast<uint8_t*>(panel_of(i)) : codes;
        if (w->width[0] < 8) {
          in.table->unpack[form](packed[i], n, bytes);
          packed[i].plane[0] = bytes;
        }
        if (!in.int8) {
          in.table->dequantize[form](packed[i].plane[0], w->values, n, read[i].scale, minimum ? read[i].low : nullptr, Bias(*w), halves,
                               panel_of(i));
        }
      }
      for (int64_t chunk = 0; chunk < in.chunks; ++chunk) {
        const Rows rows = ChunkAt(in, chunk, step);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t first = in.First(chunk) * kLanes;
          float* sums = sums_of(i) + first;
          if (in.tokens) {
            Sum(in, kForm8, packed[i], begin + i, step, n, chunk, dots_of(i) + first, sums);
          } else if (in.int8) {
            Multiply(in, kForm8, packed[i], n, rows, read[i], sums);
          } else {
            in.table->panel_product[rows.rows - 1](panel_of(i), n * kStep, rows, sums);
          }
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) Write(in, begin + i, sums_of(i));
    return true;
  }
};

constexpr int64_t kMostWeights = 8;

// Whether QJAX_TOKENS serves the weight.
bool SumsWhole(const qjax_weight& w) {
  return SubBytes(w.scale_kind) == 0 && w.minimum == nullptr && !Halves(w) && w.group_size <= QJAX_MOST_SUMMED;
}

// Tiles of a task of few rows of x.
int64_t TilesTogether(const qjax_weight& w) {
  int64_t tile_bytes = 0;
  for (int p = 0; p < w.plane_count; ++p) tile_bytes += Steps(w) * 64 * w.width[p];
  return std::max<int64_t>(1, kTaskBytes / tile_bytes);
}

}  // namespace
}  // namespace qjax

using namespace qjax;

extern "C" int64_t qjax_plane_bytes(const qjax_weight* w, int plane) {
  return Tiles(*w) * Steps(*w) * 64 * w->width[plane];
}

extern "C" int64_t qjax_scale_bytes(const qjax_weight* w) {
  if (SubBytes(w->scale_kind)) return Tiles(*w) * (w->columns / kSuperBlock) * kLanes * 2;
  const bool bytes = w->scale_kind == QJAX_E8M0 || w->scale_kind == QJAX_PACKED;
  return Tiles(*w) * Groups(*w) * kLanes * (bytes ? 1 : w->scale_kind == QJAX_F32 ? 4 : 2);
}

extern "C" int64_t qjax_sub_bytes(const qjax_weight* w) {
  return Tiles(*w) * (w->columns / kSuperBlock) * kLanes * SubBytes(w->scale_kind);
}

extern "C" int64_t qjax_zero_bytes(const qjax_weight* w) { return Tiles(*w) * Groups(*w) * kLanes; }

extern "C" const char* qjax_check(const qjax_weight* w) {
  if (w->rows < 1 || w->columns < 1 || w->rows > (1ll << 31) || w->columns > (1ll << 31)) return "no such size";
  if (w->plane_count < 1 || w->plane_count > 2 || FormOf(*w) == kForms) return "no such planes";
  if (w->has_table && FormOf(*w) != kForm4Table) return "a table is for codes of 4 bits";
  if (w->offset < 0 || w->offset > 255 || (w->has_table && w->offset != 0)) return "no such offset";
  if (w->scale_kind < QJAX_F16 || w->scale_kind > QJAX_PACKED) return "no such kind of scale";
  if (w->value_kind < QJAX_INTEGERS || w->value_kind > QJAX_VALUES) return "no such kind of value";
  if (w->value_kind != QJAX_INTEGERS && (w->has_table || w->offset != 0 || w->minimum != nullptr || w->zero != nullptr)) {
    return "floats have scales alone";
  }
  if (w->scale_kind == QJAX_PACKED && (w->scale_table == nullptr || w->super_scale == nullptr || w->start == nullptr ||
                                       w->supers < 1 || w->scale_block < 1)) {
    return "packed scales without what they are packed by";
  }
  const int64_t g = w->group_size;
  if (g != 16 && (g < 1 || g % kStep != 0) && g != w->columns) return "groups of 16, of a multiple of 32, or one a row";
  if (SubBytes(w->scale_kind)) {
    const bool sixteen = w->scale_kind == QJAX_Q2_K || w->scale_kind == QJAX_Q3_K || w->scale_kind == QJAX_Q6_K;
    if (w->columns % kSuperBlock != 0 || g != (sixteen ? 16 : 32)) return "not whole super-blocks";
    if (w->sub == nullptr) return "integer scales are missing";
    const bool needs = w->scale_kind == QJAX_Q2_K || w->scale_kind == QJAX_Q4_K;
    if (needs != (w->minimum != nullptr)) return needs ? "a minimum is missing" : "a minimum that nothing uses";
    if (w->zero != nullptr) return "zeros that nothing uses";
  }
  if ((w->scale_kind == QJAX_E8M0 || w->scale_kind == QJAX_PACKED) && w->minimum != nullptr) return "a minimum that nothing uses";
  if (w->scale == nullptr || w->plane[0] == nullptr || (w->plane_count == 2 && w->plane[1] == nullptr)) {
    return "data is missing";
  }
  return nullptr;
}

extern "C" int qjax_matmul(const qjax_weight* w, int64_t count, const qjax_input* input, float* const* y, int isa,
                           qjax_parallel parallel, void* context) {
  const KernelTable* table = TableOf(isa);
  const int64_t m = input->m;
  if (table == nullptr || count < 1 || count > kMostWeights || m < 0) return 1;
  if (input->rounding < QJAX_FLOATS || input->rounding > QJAX_TOKENS) return 1;
  const bool tokens = input->rounding == QJAX_TOKENS;
  for (int64_t i = 0; i < count; ++i) {
    if (qjax_check(&w[i]) != nullptr || w[i].columns != w[0].columns || (tokens && !SumsWhole(w[i]))) return 1;
    if (input->rounding != QJAX_FLOATS && w[i].value_kind != QJAX_INTEGERS) return 1;
  }
  if (m == 0) return 0;

  Inputs in{table, *input, m, w[0].columns, Steps(w[0]), 0, input->rounding != QJAX_FLOATS, tokens, m <= table->fused_rows};
  bool any_halves = false;
  for (int64_t i = 0; i < count; ++i) any_halves = any_halves || Halves(w[i]);
  in.chunks = Ceil(m, in.fused ? table->fused_rows : any_halves ? table->half_step_rows : table->rows);
  Block block;
  if (in.int8) {
    block.Reserve(&in.q, m * in.steps * kStep);
    block.Reserve(&in.scale, m * in.steps);
    block.Reserve(&in.whole, m * 2 * in.steps);
  } else {
    block.Reserve(&in.packed, m * in.steps * kStep);
  }
  if (!in.tokens) block.Reserve(&in.half_sums, m * 2 * in.steps);
  if (!block.Allocate()) return 2;
  std::atomic<bool> failed{false};
  const auto prepare = [&](int64_t chunk) {
    if (!in.Prepare(chunk)) failed = true;
  };
  Run(in.chunks > 1 ? parallel : nullptr, context, in.chunks, prepare);
  if (failed) return 2;

  Job jobs[kMostWeights];
  Block starts[kMostWeights];
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) {
    Job& job = jobs[i];
    job.w = &w[i];
    job.y = y[i];
    job.form = FormOf(w[i]);
    job.halves = Halves(w[i]);
    job.minimum = !in.tokens && HasMinimum(w[i], in.int8);
    job.raw = in.fused && in.int8 && w[i].minimum == nullptr && w[i].scale_kind == QJAX_F16 && w[i].group_size % kStep == 0;
    job.steps = in.steps;
    job.tiles = Tiles(w[i]);
    for (int v = 0; v < 16; ++v) job.table[v] = static_cast<uint8_t>(w[i].table[v] + 128);
    job.tiles_a_task = in.fused ? TilesTogether(w[i]) : kTilesTogether;
    job.first_task = tasks;
    tasks += Ceil(job.tiles, job.tiles_a_task);
    const int64_t parts = m * Parts(w[i]);
    if (in.int8) starts[i].Reserve(&job.start, parts);
    if (job.minimum) starts[i].Reserve(&job.sums, parts);
    if (!starts[i].Allocate()) return 2;
    job.Fit(in);
  }
  const auto work = [&](int64_t task) {
    int64_t i = count - 1;
    while (jobs[i].first_task > task) --i;
    const int64_t begin = (task - jobs[i].first_task) * jobs[i].tiles_a_task;
    const int64_t end = std::min(jobs[i].tiles, begin + jobs[i].tiles_a_task);
    if (in.fused) {
      jobs[i].Few(in, begin, end);
    } else if (!jobs[i].Many(in, begin, end)) {
      failed = true;
    }
  };
  Run(parallel, context, tasks, work);
  return failed ? 2 : 0;
}

extern "C" int qjax_reads_once(int isa, int64_t m) {
  const KernelTable* table = TableOf(isa);
  return table != nullptr && m <= table->fused_rows;
}

extern "C" int64_t qjax_start(const qjax_weight* w, int64_t count, int64_t part, int64_t parts, const uint8_t** at) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < count; ++i) tasks += Ceil(Tiles(w[i]), TilesTogether(w[i]));
  int64_t task = tasks * part / parts, i = 0;
  for (; i + 1 < count; ++i) {
    const int64_t own = Ceil(Tiles(w[i]), TilesTogether(w[i]));
    if (task < own) break;
    task -= own;
  }
  const int64_t before = task * TilesTogether(w[i]) * Steps(w[i]) * 64 * w[i].width[0];
  *at = w[i].plane[0] + before;
  return qjax_plane_bytes(&w[i], 0) - before;
}
