// How packed weights lie in memory: one row's codes as int8, one row's scales as float.
//
// Bit planes are those of qjax/arrays/planes.py, K-quants' integer scales those of qjax/arrays/two_level.py.

#ifndef QJAX_LAYOUTS_H_
#define QJAX_LAYOUTS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define QJAX_AVX2 1
#endif

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

// Bytes of a super-block's integer scales.
int64_t SubScaleBytes(Weight::Kind kind) {
  switch (kind) {
    case Weight::kQ2K:
    case Weight::kQ6K:
      return 16;
    case Weight::kQ3K:
    case Weight::kQ4K:
      return 12;
    case Weight::kIq4Xs:
      return 6;
    default:
      return 0;
  }
}

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

}  // namespace

#endif  // QJAX_LAYOUTS_H_
