// 16 lanes as vectors of the compiler's own, which it maps to whatever the CPU has.

#include <math.h>

namespace {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint8_t U8 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));

constexpr int kPanelRows = 4, kFusedRows = 2, kWideBias = 0;

inline F Zero() { return F{}; }
inline F Set(float v) { return F{} + v; }
template <typename V>
inline V LoadAs(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline F Load(const float* p) { return LoadAs<F>(p); }
inline void Store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline F Add(F a, F b) { return a + b; }
inline F Mul(F a, F b) { return a * b; }
inline F Div(F a, F b) { return a / b; }
inline F Fma(F a, F b, F c) { return a * b + c; }
inline F FromInt(I a) { return __builtin_convertvector(a, F); }
inline I SetInt(int32_t v) { return I{} + v; }
inline float Sum(F v) {
  float total = 0;
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
}

inline U8 LoadCodes(const uint8_t* p) { return LoadAs<U8>(p); }
inline void StoreCodes(uint8_t* p, U8 v) { __builtin_memcpy(p, &v, sizeof v); }
inline U8 SetCodes(int v) { return U8{} + static_cast<uint8_t>(v); }
inline U8 And(U8 a, U8 b) { return a & b; }
inline U8 Merge(U8 a, U8 b, U8 mask) { return a | (b & mask); }
inline U8 Less(U8 a, U8 b) { return a - b; }
template <int n>
inline U8 Shift(U8 a) {
  if constexpr (n >= 0) return a >> n;
  else return a << -n;
}
inline U8 LoadTable(const uint8_t* p) {
  U8 v{};
  __builtin_memcpy(&v, p, 16);
  return v;
}
inline U8 Look(U8 table, U8 index) {
  U8 v;
  for (int i = 0; i < 64; ++i) v[i] = table[index[i]];
  return v;
}

template <bool kWide, bool kFull>
inline I Dot(I sum, U8 codes, const int8_t* x) {
  const I words = reinterpret_cast<I>(codes);
  return sum + (words & 255) * x[0] + ((words >> 8) & 255) * x[1] + ((words >> 16) & 255) * x[2] +
         ((words >> 24) & 255) * x[3];
}

template <int c>
inline F Column(U8 codes) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const Words left = reinterpret_cast<Words>(codes) << (24 - 8 * c);
  return __builtin_convertvector(reinterpret_cast<I>(left) >> 24, F);
}

inline float HalfToFloat(uint16_t h) {
  const uint32_t magnitude = h & 0x7fff;
  float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // subnormal: counts of 2^-24
  if (magnitude >= 0x0400) {
    const uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    __builtin_memcpy(&value, &bits, 4);
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline F LoadHalf(const uint16_t* p) {
  F v;
  for (int i = 0; i < 16; ++i) v[i] = HalfToFloat(p[i]);
  return v;
}
// Column c's byte of each lane as the highest bits of float16, `right` bits further down.
template <int c, int right, int mask>
inline F Float8(U8 codes) {
  F v;
  for (int i = 0; i < 16; ++i) v[i] = HalfToFloat(((static_cast<int8_t>(codes[4 * i + c]) * 256) >> right) & mask);
  return v;
}
// The float at the place that column c's 4 bits name.
template <int c>
inline F LookFloat(F values, U8 codes) {
  F v;
  for (int i = 0; i < 16; ++i) v[i] = values[codes[4 * i + c] & 15];
  return v;
}
inline F LoadBf16(const uint16_t* p) {
  float out[16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    __builtin_memcpy(&out[i], &bits, 4);
  }
  return Load(out);
}
// One byte a lane.
template <bool kSigned>
inline I LoadInts(const uint8_t* p) {
  I v;
  for (int i = 0; i < 16; ++i) v[i] = kSigned ? static_cast<int8_t>(p[i]) : p[i];
  return v;
}
inline I MulInt(I a, I b) { return a * b; }
inline I AddInt(I a, I b) { return a + b; }

inline uint32_t LargestBits(const float* x) {
  uint32_t most = 0;
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    if (bits > most) most = bits;
  }
  return most;
}
inline int32_t Round(const float* x, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    const int32_t whole = static_cast<int32_t>(nearbyintf(x[i] * inverse));
    q[i] = static_cast<int8_t>(whole);
    sum += whole;
  }
  return sum;
}

constexpr int kQueryRows = 1, kQueryLanes = 1;
inline F Max(F a, F b) {  // b where one is NaN
  for (int i = 0; i < 16; ++i) b[i] = a[i] > b[i] ? a[i] : b[i];
  return b;
}
inline float Largest(F v) {
  float most = v[0];
  for (int i = 1; i < 16; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
inline I Nearest(F v) {
  I n;
  for (int i = 0; i < 16; ++i) n[i] = v[i] == v[i] ? static_cast<int32_t>(nearbyintf(v[i])) : 0;
  return n;
}
inline F PowerOfTwo(I n) { return reinterpret_cast<F>((n + 127) << 23); }

}  // namespace
