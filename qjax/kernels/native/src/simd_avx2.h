// 16 lanes as two 256-bit registers; QJAX_VNNI256 has the dot product of VNNI in that width.

#include <immintrin.h>

namespace {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
using U8 = I;  // 16 lanes of 4 codes

constexpr int kPanelRows = 3, kFusedRows = 3;
#ifdef QJAX_VNNI256
constexpr int kWideBias = 0;
#else
constexpr int kWideBias = 128;
#endif

inline F Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F Set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void Store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline F Add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F Mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F Div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F Fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F FromInt(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I SetInt(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline float Sum(F v) {
  const __m256 half = _mm256_add_ps(v.a, v.b);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline __m256i Load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline U8 LoadCodes(const uint8_t* p) { return {Load256(p), Load256(p + 32)}; }
inline void StoreCodes(uint8_t* p, U8 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b);
}
inline U8 SetCodes(int v) { return {_mm256_set1_epi8(static_cast<char>(v)), _mm256_set1_epi8(static_cast<char>(v))}; }
inline U8 And(U8 x, U8 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline U8 Merge(U8 x, U8 y, U8 mask) {
  const U8 more = And(y, mask);
  return {_mm256_or_si256(x.a, more.a), _mm256_or_si256(x.b, more.b)};
}
inline U8 Less(U8 x, U8 y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
template <int n>
inline U8 Shift(U8 x) {
  if constexpr (n >= 0) return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)};
  else return {_mm256_slli_epi16(x.a, -n), _mm256_slli_epi16(x.b, -n)};
}
inline U8 LoadTable(const uint8_t* p) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {t, t};
}
inline U8 Look(U8 table, U8 index) {
  return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
}

template <bool kWide, bool kFull>
inline __m256i Dot8(__m256i sum, __m256i codes, __m256i x) {
#ifdef QJAX_VNNI256
  return _mm256_dpbusd_avx_epi32(sum, codes, x);
#else
  __m256i pairs;
  if constexpr (kWide && kFull) {
    // -(-128) is no signed byte: the even and the odd columns, in 16 bits.
    const __m256i code = _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(128)));
    const auto even = [](__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
    const auto odd = [](__m256i v) { return _mm256_srai_epi16(v, 8); };
    return _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(even(code), even(x))),
                            _mm256_madd_epi16(odd(code), odd(x)));
  } else if constexpr (kWide) {
    // Two products of 8 bits by 8 would not fit into 16 bits: of signed codes, their sign moved to x, they do.
    const __m256i code = _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(128)));
    pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code));
  } else {
    pairs = _mm256_maddubs_epi16(codes, x);
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

template <bool kWide, bool kFull>
inline I Dot(I sum, U8 codes, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const __m256i all = _mm256_set1_epi32(four);
  return {Dot8<kWide, kFull>(sum.a, codes.a, all), Dot8<kWide, kFull>(sum.b, codes.b, all)};
}

template <int c>
inline __m256 Column8(__m256i codes) {
  const __m256i left = c == 3 ? codes : _mm256_slli_epi32(codes, 24 - 8 * c);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(left, 24));
}
template <int c>
inline F Column(U8 codes) {
  return {Column8<c>(codes.a), Column8<c>(codes.b)};
}

template <int c, int right, int mask>
inline __m256 Float8Of8(__m256i codes) {
  const __m256i left = c == 3 ? codes : _mm256_slli_epi32(codes, 24 - 8 * c);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi32(left, 16 + right), _mm256_set1_epi32(mask));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
// Column c's byte of each lane as the highest bits of float16, `right` bits further down.
template <int c, int right, int mask>
inline F Float8(U8 codes) {
  return {Float8Of8<c, right, mask>(codes.a), Float8Of8<c, right, mask>(codes.b)};
}
// The float at the place that column c's 4 bits name.
template <int c>
inline __m256 LookFloat8(F values, __m256i codes) {
  const __m256i place = _mm256_srli_epi32(codes, 8 * c);
  // The fourth bit, as a sign, chooses between the halves.
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(place, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values.a, place), _mm256_permutevar8x32_ps(values.b, place), high);
}
template <int c>
inline F LookFloat(F values, U8 codes) {
  return {LookFloat8<c>(values, codes.a), LookFloat8<c>(values, codes.b)};
}

inline __m128i Load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline F LoadHalf(const uint16_t* p) { return {_mm256_cvtph_ps(Load128(p)), _mm256_cvtph_ps(Load128(p + 8))}; }
inline __m256 Bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline F LoadBf16(const uint16_t* p) { return {Bf16(Load128(p)), Bf16(Load128(p + 8))}; }
// One byte a lane.
template <bool kSigned>
inline I LoadInts(const uint8_t* p) {
  const __m128i v = Load128(p), w = _mm_srli_si128(v, 8);
  if constexpr (kSigned) return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(w)};
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(w)};
}
inline I MulInt(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I AddInt(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }

inline uint32_t LargestBits(const float* x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_and_si256(Load256(x), mask);
  for (int i = 8; i < 32; i += 8) most = _mm256_max_epi32(most, _mm256_and_si256(Load256(x + i), mask));
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}
inline int32_t Round(const float* x, float inverse, int8_t* q) {
  const __m256 by = _mm256_set1_ps(inverse);
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), by));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), by));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), bytes);
  const __m256i both = _mm256_add_epi32(a, b);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

constexpr int kQueryRows = 2, kQueryLanes = 2;
inline F Max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y where one is NaN
inline float Largest(F v) {
  float all[16], most;
  Store(all, v);
  most = all[0];
  for (int i = 1; i < 16; ++i) most = all[i] > most ? all[i] : most;
  return most;
}
inline I Nearest(F v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline __m256 PowerOfTwo8(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline F PowerOfTwo(I n) { return {PowerOfTwo8(n.a), PowerOfTwo8(n.b)}; }

}  // namespace
