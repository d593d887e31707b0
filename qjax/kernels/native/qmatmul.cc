// y[m, n] = sum_k x[m, k] * w[n, k] for few rows of x, w packed: one pass over the packed bytes.
//
// Each row of w is unpacked into a buffer of one row that stays in the L1 cache (8-bit codes are read where they
// lie), then multiplied group by group:
//
//   float activations:  y = sum_g scale[g] * sum_i x[i] * code[i]              + minimum[g] * sum_i x[i]
//   int8 activations:   y = sum_g scale[g] * sx[g] * sum_i qx[i] * code[i]     + minimum[g] * sx[g] * sum_i qx[i]
//
// Blocks of rows are shared out over XLA's own thread pool. The layouts are those of qjax/arrays: bit planes as in
// planes.py, K-quants' integer scales as in two_level.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define QJAX_AVX2 1
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kSuperBlock = 256;

float HalfToFloat(uint16_t h) {
#ifdef QJAX_AVX2
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  float value;
  if (magnitude < 0x0400) {
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  } else {
    const uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    std::memcpy(&value, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

uint16_t Half(const uint8_t* at) {
  uint16_t h;
  std::memcpy(&h, at, 2);
  return h;
}

void HalvesToFloats(const uint8_t* half, int64_t n, float* out) {
  int64_t i = 0;
#ifdef QJAX_AVX2
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + 2 * i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) out[i] = HalfToFloat(Half(half + 2 * i));
}

// What a weight is; the same for all its rows.
struct Weight {
  int64_t rows = 0, columns = 0, groups = 0, group_size = 0;
  // Bit planes, lowest bits first.
  int plane_count = 0;
  const uint8_t* plane[2] = {nullptr, nullptr};
  int width[2] = {0, 0}, stride[2] = {0, 0};
  int offset = 0;
  const int8_t* table = nullptr;  // 16 values, or none
  int8_t table_values[16];
  // Scales.
  enum Kind { kHalf, kFloat, kE8m0, kQ2K, kQ3K, kQ4K, kQ6K, kIq4Xs } kind = kHalf;
  // No codes at all: 16-bit floats, in `scale`.
  enum Dense { kPacked, kF16, kBf16 } dense = kPacked;
  const uint8_t* scale = nullptr;
  const uint8_t* minimum = nullptr;
  const uint8_t* sub = nullptr;
};

// Vectors of bytes that GCC and Clang map to whatever the CPU has.
template <int kBytes>
struct BytesOf {
  typedef uint8_t Type __attribute__((vector_size(kBytes)));
};

template <int kWidth, int kStride>
void UnpackPlane(const uint8_t* in, int64_t columns, int shift, uint8_t offset, bool first, uint8_t* out) {
  constexpr int kPerByte = 8 / kWidth, kMask = (1 << kWidth) - 1, kBytes = kStride < 32 ? kStride : 32;
  using Bytes = typename BytesOf<kBytes>::Type;
  for (int64_t c = 0; c < columns; c += kPerByte * kStride, in += kStride, out += kPerByte * kStride) {
    for (int k = 0; k < kStride; k += kBytes) {
      Bytes packed;
      std::memcpy(&packed, in + k, kBytes);
#pragma GCC unroll 8
      for (int p = 0; p < kPerByte; ++p) {
        Bytes bits = (packed >> (p * kWidth)) & static_cast<uint8_t>(kMask);
        if (!first) {
          Bytes lower;
          std::memcpy(&lower, out + p * kStride + k, kBytes);
          bits = lower | (bits << shift);
        }
        bits -= offset;
        std::memcpy(out + p * kStride + k, &bits, kBytes);
      }
    }
  }
}

// Four bytes hold the bits of 32 codes, code k + 4 p in bit p of byte k: one word, seen through 32 masks.
template <>
void UnpackPlane<1, 4>(const uint8_t* in, int64_t columns, int shift, uint8_t offset, bool first, uint8_t* out) {
  using Bytes = BytesOf<32>::Type;
  typedef uint32_t Words __attribute__((vector_size(32)));
  Bytes mask;
  for (int i = 0; i < 32; ++i) mask[i] = static_cast<uint8_t>(1 << (i / 4));
  const uint8_t bit = static_cast<uint8_t>(1 << shift);
  for (int64_t c = 0; c < columns; c += 32, in += 4, out += 32) {
    uint32_t word;
    std::memcpy(&word, in, 4);
    const Words words = Words{} + word;
    Bytes bits = reinterpret_cast<Bytes>((reinterpret_cast<Bytes>(words) & mask) != 0) & bit;
    if (!first) {
      Bytes lower;
      std::memcpy(&lower, out, 32);
      bits |= lower;
    }
    bits -= offset;
    std::memcpy(out, &bits, 32);
  }
}

using Unpack = void (*)(const uint8_t*, int64_t, int, uint8_t, bool, uint8_t*);

Unpack UnpackFor(int width, int stride) {
  if (width == 4 && stride == 16) return UnpackPlane<4, 16>;
  if (width == 4 && stride == 32) return UnpackPlane<4, 32>;
  if (width == 4 && stride == 64) return UnpackPlane<4, 64>;
  if (width == 2 && stride == 32) return UnpackPlane<2, 32>;
  if (width == 1 && stride == 32) return UnpackPlane<1, 32>;
  if (width == 1 && stride == 4) return UnpackPlane<1, 4>;
  return nullptr;
}

// int8 values of one row's codes: where they lie if they have 8 bits, else in `buffer`.
const int8_t* RowCodes(const Weight& w, int64_t row, int8_t* buffer) {
  if (w.width[0] == 8) return reinterpret_cast<const int8_t*>(w.plane[0] + row * w.columns);
  uint8_t* codes = reinterpret_cast<uint8_t*>(buffer);
  int shift = 0;
  for (int p = 0; p < w.plane_count; ++p) {
    const int64_t nbytes = w.columns * w.width[p] / 8;
    // The last plane makes the codes whole: then the offset can go.
    const uint8_t offset = static_cast<uint8_t>(p + 1 == w.plane_count ? w.offset : 0);
    UnpackFor(w.width[p], w.stride[p])(w.plane[p] + row * nbytes, w.columns, shift, offset, p == 0, codes);
    shift += w.width[p];
  }
  if (w.table != nullptr) {
    int64_t i = 0;
#ifdef QJAX_AVX2
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table)));
    for (; i + 32 <= w.columns; i += 32) {
      __m256i* at = reinterpret_cast<__m256i*>(buffer + i);
      _mm256_storeu_si256(at, _mm256_shuffle_epi8(table, _mm256_loadu_si256(at)));
    }
#endif
    for (; i < w.columns; ++i) buffer[i] = w.table[codes[i]];
  }
  return buffer;
}

// Scales and minimums of one row's groups.
void RowScales(const Weight& w, int64_t row, float* scale, float* minimum) {
  const int64_t blocks = w.columns / kSuperBlock;
  switch (w.kind) {
    case Weight::kHalf:
      HalvesToFloats(w.scale + 2 * row * w.groups, w.groups, scale);
      if (w.minimum != nullptr) HalvesToFloats(w.minimum + 2 * row * w.groups, w.groups, minimum);
      return;
    case Weight::kFloat:
      std::memcpy(scale, w.scale + 4 * row * w.groups, 4 * w.groups);
      if (w.minimum != nullptr) std::memcpy(minimum, w.minimum + 4 * row * w.groups, 4 * w.groups);
      return;
    case Weight::kE8m0:
      for (int64_t g = 0; g < w.groups; ++g) scale[g] = std::ldexp(1.0f, w.scale[row * w.groups + g] - 128);
      return;
    case Weight::kQ2K:
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* sub = w.sub + (row * blocks + b) * 16;
        const float d = HalfToFloat(Half(w.scale + 2 * (row * blocks + b)));
        const float m = HalfToFloat(Half(w.minimum + 2 * (row * blocks + b)));
        for (int j = 0; j < 16; ++j) {
          scale[16 * b + j] = d * (sub[j] & 15);
          minimum[16 * b + j] = -m * (sub[j] >> 4);
        }
      }
      return;
    case Weight::kQ3K:
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* sub = w.sub + (row * blocks + b) * 12;
        const float d = HalfToFloat(Half(w.scale + 2 * (row * blocks + b)));
        for (int j = 0; j < 16; ++j) {
          const int low = j < 8 ? sub[j] & 15 : sub[j - 8] >> 4;
          const int high = (sub[8 + j % 4] >> (2 * (j / 4))) & 3;
          scale[16 * b + j] = d * ((low | (high << 4)) - 32);
        }
      }
      return;
    case Weight::kQ4K:
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* sub = w.sub + (row * blocks + b) * 12;
        const float d = HalfToFloat(Half(w.scale + 2 * (row * blocks + b)));
        const float m = HalfToFloat(Half(w.minimum + 2 * (row * blocks + b)));
        for (int j = 0; j < 4; ++j) {
          scale[8 * b + j] = d * (sub[j] & 63);
          minimum[8 * b + j] = -m * (sub[4 + j] & 63);
          scale[8 * b + 4 + j] = d * ((sub[8 + j] & 15) | ((sub[j] >> 6) << 4));
          minimum[8 * b + 4 + j] = -m * ((sub[8 + j] >> 4) | ((sub[4 + j] >> 6) << 4));
        }
      }
      return;
    case Weight::kQ6K:
      for (int64_t b = 0; b < blocks; ++b) {
        const int8_t* sub = reinterpret_cast<const int8_t*>(w.sub) + (row * blocks + b) * 16;
        const float d = HalfToFloat(Half(w.scale + 2 * (row * blocks + b)));
        for (int j = 0; j < 16; ++j) scale[16 * b + j] = d * sub[j];
      }
      return;
    case Weight::kIq4Xs:
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* sub = w.sub + (row * blocks + b) * 6;
        const float d = HalfToFloat(Half(w.scale + 2 * (row * blocks + b)));
        const uint32_t high = Half(sub);
        for (int j = 0; j < 8; ++j) {
          const int low = j % 2 == 0 ? sub[2 + j / 2] & 15 : sub[2 + j / 2] >> 4;
          scale[8 * b + j] = d * ((low | static_cast<int>((high >> (2 * j)) & 3) << 4) - 32);
        }
      }
      return;
  }
}

#ifdef QJAX_AVX2
float Sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

__m256 Widen(const int8_t* codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}
#endif

// sum_g scale[g] * sum_{i in g} x[i] * code[i]
float DotFloat(const int8_t* codes, const float* x, const float* scale, int64_t groups, int64_t group_size) {
#ifdef QJAX_AVX2
  if (group_size % 16 == 0) {
    __m256 total0 = _mm256_setzero_ps(), total1 = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      __m256 a = _mm256_setzero_ps(), b = _mm256_setzero_ps();
      for (int64_t i = 0; i < group_size; i += 16, codes += 16, x += 16) {
        a = _mm256_fmadd_ps(Widen(codes), _mm256_loadu_ps(x), a);
        b = _mm256_fmadd_ps(Widen(codes + 8), _mm256_loadu_ps(x + 8), b);
      }
      const __m256 s = _mm256_set1_ps(scale[g]);
      total0 = _mm256_fmadd_ps(a, s, total0);
      total1 = _mm256_fmadd_ps(b, s, total1);
    }
    return Sum(_mm256_add_ps(total0, total1));
  }
#endif
  float total = 0;
  for (int64_t g = 0; g < groups; ++g, codes += group_size, x += group_size) {
    float part = 0;
    for (int64_t i = 0; i < group_size; ++i) part += x[i] * codes[i];
    total += scale[g] * part;
  }
  return total;
}

// sum_g scale[g] * sx[g] * sum_{i in g} qx[i] * code[i], |qx| <= 127
float DotInt8(const int8_t* codes, const int8_t* qx, const float* sx, const float* scale, int64_t groups,
              int64_t group_size) {
#ifdef QJAX_AVX2
  const __m256i ones = _mm256_set1_epi16(1);
  // |code| as unsigned and the code's sign moved to x: what the unsigned-by-signed multiplication wants.
  const auto dot32 = [&](const int8_t* c, const int8_t* q) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c));
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_sign_epi8(code, code), _mm256_sign_epi8(value, code));
    return _mm256_madd_epi16(pairs, ones);
  };
  if (group_size % 32 == 0) {
    __m256 total = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      __m256i part = _mm256_setzero_si256();
      for (int64_t i = 0; i < group_size; i += 32, codes += 32, qx += 32) {
        part = _mm256_add_epi32(part, dot32(codes, qx));
      }
      total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), _mm256_set1_ps(scale[g] * sx[g]), total);
    }
    return Sum(total);
  }
  if (group_size == 16 && groups % 2 == 0) {
    __m256 total = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g += 2, codes += 32, qx += 32) {
      // 32 codes are two groups: the lower and the upper half of the register.
      const __m256 s = _mm256_set_m128(_mm_set1_ps(scale[g + 1] * sx[g + 1]), _mm_set1_ps(scale[g] * sx[g]));
      total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot32(codes, qx)), s, total);
    }
    return Sum(total);
  }
#endif
  float total = 0;
  for (int64_t g = 0; g < groups; ++g, codes += group_size, qx += group_size) {
    int32_t part = 0;
    for (int64_t i = 0; i < group_size; ++i) part += static_cast<int32_t>(qx[i]) * codes[i];
    total += scale[g] * sx[g] * static_cast<float>(part);
  }
  return total;
}

// sum_i x[i] * w[i] of 16-bit floats.
float DotDense(const uint8_t* row, Weight::Dense kind, const float* x, int64_t n) {
  int64_t i = 0;
  float total = 0;
#ifdef QJAX_AVX2
  __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (; i + 32 <= n; i += 32) {
    for (int j = 0; j < 4; ++j) {
      const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * (i + 8 * j)));
      const __m256 w = kind == Weight::kF16
                           ? _mm256_cvtph_ps(word)
                           : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(word), 16));
      part[j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i + 8 * j), part[j]);
    }
  }
  total = Sum(_mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3])));
#endif
  for (; i < n; ++i) {
    float w;
    if (kind == Weight::kF16) {
      w = HalfToFloat(Half(row + 2 * i));
    } else {
      const uint32_t bits = static_cast<uint32_t>(Half(row + 2 * i)) << 16;
      std::memcpy(&w, &bits, 4);
    }
    total += x[i] * w;
  }
  return total;
}

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
      qx.resize(rows * w.columns);
      sx.resize(rows * w.groups);
    }
    for (int64_t i = 0; i < rows * w.groups; ++i) {
      const float* at = x + i * w.group_size;
      float sum = 0;
      if (int8) {
        float largest = 0;
        for (int64_t k = 0; k < w.group_size; ++k) largest = std::max(largest, std::fabs(at[k]));
        const float scale = largest / 127, inverse = scale > 0 ? 1 / scale : 0;
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
  // Leaves in order: planes, scale, integer scales if two-level, minimum if any.
  size_t next = 0;
  const auto take = [&]() -> const uint8_t* {
    auto leaf = leaves.get<ffi::AnyBuffer>(next++);
    return leaf.has_value() ? static_cast<const uint8_t*>(leaf->untyped_data()) : nullptr;
  };
  for (int p = 0; p < w.plane_count; ++p) w.plane[p] = take();
  w.scale = take();
  if (w.kind >= Weight::kQ2K) w.sub = take();
  if (has_minimum) w.minimum = take();
  if (next != leaves.size()) return ffi::Error::InvalidArgument("unexpected number of leaves");

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
