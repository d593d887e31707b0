// Dot products of one unpacked row with one row of activations.

#ifndef QJAX_DOTS_H_
#define QJAX_DOTS_H_

#include "layouts.h"

namespace {

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

}  // namespace

#endif  // QJAX_DOTS_H_
