// 16 lanes as four 128-bit registers; QJAX_I8MM has the product of unsigned by signed bytes.

#include <arm_neon.h>

namespace {

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};
struct U8 {
  uint8x16_t v[4];
};

constexpr int kPanelRows = 2, kFusedRows = 2;
#ifdef QJAX_I8MM
constexpr int kWideBias = 0;
#else
constexpr int kWideBias = 128;
#endif

template <typename V, typename Part>
inline V Each(Part part) {
  return V{{part(0), part(1), part(2), part(3)}};
}

inline F Set(float x) { return Each<F>([&](int) { return vdupq_n_f32(x); }); }
inline F Zero() { return Set(0); }
inline F Load(const float* p) { return Each<F>([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline void Store(float* p, F x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline F Add(F x, F y) { return Each<F>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
inline F Mul(F x, F y) { return Each<F>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
inline F Div(F x, F y) { return Each<F>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
inline F Fma(F x, F y, F z) { return Each<F>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); }); }
inline F FromInt(I x) { return Each<F>([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
inline I SetInt(int32_t x) { return Each<I>([&](int) { return vdupq_n_s32(x); }); }
inline float Sum(F x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }

inline U8 LoadCodes(const uint8_t* p) { return Each<U8>([&](int i) { return vld1q_u8(p + 16 * i); }); }
inline void StoreCodes(uint8_t* p, U8 x) {
  for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, x.v[i]);
}
inline U8 SetCodes(int x) { return Each<U8>([&](int) { return vdupq_n_u8(static_cast<uint8_t>(x)); }); }
inline U8 And(U8 x, U8 y) { return Each<U8>([&](int i) { return vandq_u8(x.v[i], y.v[i]); }); }
inline U8 Merge(U8 x, U8 y, U8 mask) {
  return Each<U8>([&](int i) { return vorrq_u8(x.v[i], vandq_u8(y.v[i], mask.v[i])); });
}
inline U8 Less(U8 x, U8 y) { return Each<U8>([&](int i) { return vsubq_u8(x.v[i], y.v[i]); }); }
template <int n>
inline U8 Shift(U8 x) {
  return Each<U8>([&](int i) {
    if constexpr (n == 0) return x.v[i];
    else if constexpr (n > 0) return vshrq_n_u8(x.v[i], n);
    else return vshlq_n_u8(x.v[i], -n);
  });
}
inline U8 LoadTable(const uint8_t* p) { return Each<U8>([&](int) { return vld1q_u8(p); }); }
inline U8 Look(U8 table, U8 index) { return Each<U8>([&](int i) { return vqtbl1q_u8(table.v[i], index.v[i]); }); }

template <bool kWide, bool kFull>
inline I Dot(I sum, U8 codes, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
#ifdef QJAX_I8MM
  return Each<I>([&](int i) { return vusdotq_s32(sum.v[i], codes.v[i], all); });
#else
  // Codes of up to 7 bits are signed bytes as they are; of 8 bits, less 128.
  return Each<I>([&](int i) {
    const uint8x16_t code = kWide ? veorq_u8(codes.v[i], vdupq_n_u8(128)) : codes.v[i];
    return vdotq_s32(sum.v[i], vreinterpretq_s8_u8(code), all);
  });
#endif
}

template <int c>
inline F Column(U8 codes) {
  return Each<F>([&](int i) {
    int32x4_t v = vreinterpretq_s32_u8(codes.v[i]);
    if constexpr (c < 3) v = vshlq_n_s32(v, 24 - 8 * c);
    return vcvtq_f32_s32(vshrq_n_s32(v, 24));
  });
}

// Column c's byte of each lane as the highest bits of float16, `right` bits further down.
template <int c, int right, int mask>
inline F Float8(U8 codes) {
  return Each<F>([&](int i) {
    int32x4_t v = vreinterpretq_s32_u8(codes.v[i]);
    if constexpr (c < 3) v = vshlq_n_s32(v, 24 - 8 * c);
    const uint32x4_t half = vandq_u32(vreinterpretq_u32_s32(vshrq_n_s32(v, 16 + right)), vdupq_n_u32(mask));
    return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(half)));
  });
}
// The float at the place that column c's 4 bits name.
template <int c>
inline F LookFloat(F values, U8 codes) {
  const uint8x16x4_t table = {{vreinterpretq_u8_f32(values.v[0]), vreinterpretq_u8_f32(values.v[1]),
                               vreinterpretq_u8_f32(values.v[2]), vreinterpretq_u8_f32(values.v[3])}};
  return Each<F>([&](int i) {
    uint32x4_t place = vreinterpretq_u32_u8(codes.v[i]);
    if constexpr (c > 0) place = vshrq_n_u32(place, 8 * c);
    // Four bytes of each place.
    place = vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(place, vdupq_n_u32(15)), 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(place)));
  });
}

inline F LoadHalf(const uint16_t* p) {
  return Each<F>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline F LoadBf16(const uint16_t* p) {
  return Each<F>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
// One byte a lane.
template <bool kSigned>
inline I LoadInts(const uint8_t* p) {
  int16x8_t low, high;
  if constexpr (kSigned) {
    const int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(p));
    low = vmovl_s8(vget_low_s8(v));
    high = vmovl_high_s8(v);
  } else {
    const uint8x16_t v = vld1q_u8(p);
    low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v)));
    high = vreinterpretq_s16_u16(vmovl_high_u8(v));
  }
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
inline I MulInt(I x, I y) { return Each<I>([&](int i) { return vmulq_s32(x.v[i], y.v[i]); }); }
inline I AddInt(I x, I y) { return Each<I>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); }); }

inline uint32_t LargestBits(const float* x) {
  uint32x4_t most = vdupq_n_u32(0);
  for (int i = 0; i < 32; i += 4) {
    most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
  }
  return vmaxvq_u32(most);
}
inline int32_t Round(const float* x, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i += 4) {
    const int32x4_t whole = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse));
    sum += vaddvq_s32(whole);
    const int16x4_t half = vqmovn_s32(whole);
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(half, half));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    __builtin_memcpy(q + i, &four, 4);
  }
  return sum;
}

constexpr int kQueryRows = 2, kQueryLanes = 2;
inline F Max(F x, F y) {  // y where one is NaN
  return Each<F>([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline float Largest(F x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.v[0], x.v[1]), vmaxnmq_f32(x.v[2], x.v[3])));
}
inline I Nearest(F x) { return Each<I>([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }
inline F PowerOfTwo(I n) {
  return Each<F>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], vdupq_n_s32(127)), 23)); });
}

}  // namespace
