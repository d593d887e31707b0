// 16 lanes as one 512-bit register.

#include <immintrin.h>

namespace {

using F = __m512;
using I = __m512i;
using U8 = __m512i;  // 16 lanes of 4 codes

constexpr int kPanelRows = 12, kFusedRows = 4, kWideBias = 0;

inline F Zero() { return _mm512_setzero_ps(); }
inline F Set(float v) { return _mm512_set1_ps(v); }
inline F Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F Add(F a, F b) { return _mm512_add_ps(a, b); }
inline F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F Div(F a, F b) { return _mm512_div_ps(a, b); }
inline F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F FromInt(I a) { return _mm512_cvtepi32_ps(a); }
inline I SetInt(int32_t v) { return _mm512_set1_epi32(v); }
inline float Sum(F v) { return _mm512_reduce_add_ps(v); }

inline U8 LoadCodes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void StoreCodes(uint8_t* p, U8 v) { _mm512_storeu_si512(p, v); }
inline U8 SetCodes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
inline U8 And(U8 a, U8 b) { return _mm512_and_si512(a, b); }
// a | (b & mask)
inline U8 Merge(U8 a, U8 b, U8 mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xF8); }
inline U8 Less(U8 a, U8 b) { return _mm512_sub_epi8(a, b); }
template <int n>
inline U8 Shift(U8 a) {  // right by n bits, left by -n; of 16-bit words, so that bits of neighbours come in
  if constexpr (n >= 0) return _mm512_srli_epi16(a, n);
  else return _mm512_slli_epi16(a, -n);
}
inline U8 LoadTable(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline U8 Look(U8 table, U8 index) { return _mm512_shuffle_epi8(table, index); }

// sum + dot of each lane's four codes with x[0..3]
template <bool kWide, bool kFull>
inline I Dot(I sum, U8 codes, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
}

// Signed code c of each lane.
template <int c>
inline F Column(U8 codes) {
  const I left = c == 3 ? codes : _mm512_slli_epi32(codes, 24 - 8 * c);
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(left, 24));
}

// Column c's byte of each lane as the highest bits of float16, `right` bits further down.
template <int c, int right, int mask>
inline F Float8(U8 codes) {
  const I left = c == 3 ? codes : _mm512_slli_epi32(codes, 24 - 8 * c);
  const I half = _mm512_and_si512(_mm512_srai_epi32(left, 16 + right), _mm512_set1_epi32(mask));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(half));
}
// The float at the place that column c's 4 bits name.
template <int c>
inline F LookFloat(F values, U8 codes) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * c), values);
}

inline F LoadHalf(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F LoadBf16(const uint16_t* p) {
  const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// One byte a lane.
template <bool kSigned>
inline I LoadInts(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return kSigned ? _mm512_cvtepi8_epi32(v) : _mm512_cvtepu8_epi32(v);
}
inline I MulInt(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I AddInt(I a, I b) { return _mm512_add_epi32(a, b); }

// The largest bits of |x| of 32 floats: of a number that is not finite they are 0x7f800000 or more.
inline uint32_t LargestBits(const float* x) {
  const I mask = _mm512_set1_epi32(0x7fffffff);
  const I a = _mm512_and_si512(_mm512_loadu_si512(x), mask), b = _mm512_and_si512(_mm512_loadu_si512(x + 16), mask);
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(a, b)));
}
// 16 floats times `inverse`, to the nearest int8; returns their sum.
inline int32_t Round(const float* x, float inverse, int8_t* q) {
  const I whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(whole));
  return _mm512_reduce_add_epi32(whole);
}

constexpr int kQueryRows = 4, kQueryLanes = 4;
inline F Max(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline float Largest(F v) { return _mm512_reduce_max_ps(v); }
inline I Nearest(F v) { return _mm512_cvtps_epi32(v); }
inline F PowerOfTwo(I n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23)); }

}  // namespace
