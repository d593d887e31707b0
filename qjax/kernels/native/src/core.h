// The compute of the CPU kernels as a plain C interface: no JAX, no XLA, no C++ types.
//
//   y[m, n] = sum_k x[m, k] * w[n, k]
//
// with w packed in the lane-blocked layout (qjax/arrays/lanes.py has the same text):
//
//   A tile is 16 rows of w (the last tile is filled up with rows that are computed and dropped), a step 32 columns (the
//   last step is filled up with columns for which x is taken as zero). With T tiles and S steps:
//
//   planes[i], of `width` w bits a code: uint8 [T, S, w, 64]. Byte 4 * lane + c of vector v of a step holds, at bits
//     [w * p, w * p + w), the code of row 16 t + lane and column 32 s + 4 * (v + w * p) + c, for p = 0 ... 8 / w - 1.
//     The first plane holds the lowest bits. Codes are unsigned; `offset` is subtracted from them.
//   scale, minimum, zero: [T, G, 16]: entry [t, g, lane] is that of row 16 t + lane and group g. G = ceil(columns /
//     group_size), one more where groups of 16 would end in half a step.
//   sub: uint8 [T, SB * B, 16]: byte b of super-block sb of row 16 t + lane at [t, sb * B + b, lane]; the B bytes of a
//     super-block are those of qjax/arrays/two_level.py.
//
//   w[n, k] = scale[g] * (code - offset - zero[g]) + minimum[g]        (code: table[code] if there is a table)
//   w[n, k] = scale[g] * value                          (of QJAX_E4M3 ... QJAX_VALUES: the float that the code stands for)

#ifndef QJAX_CORE_H_
#define QJAX_CORE_H_

#include <stdint.h>

// The only names that the library shows.
#define QJAX_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum qjax_scale_kind {
  QJAX_F16 = 0,   // scale (and minimum) float16, one a group
  QJAX_F32 = 1,   // float32
  QJAX_E8M0 = 2,  // uint8 e: 2^(e - 128)
  // scale and minimum float16, one a super-block of 256; `sub` holds the groups' integers
  QJAX_Q2_K = 3,
  QJAX_Q3_K = 4,
  QJAX_Q4_K = 5,
  QJAX_Q6_K = 6,
  QJAX_IQ4_XS = 7,
  QJAX_BF16 = 8,    // bfloat16, one a group
  QJAX_PACKED = 9,  // uint8 c, one a group: scale_table[c] * super_scale[row, (start[row] + g) / scale_block] + scale_offset
};

enum qjax_value_kind {
  QJAX_INTEGERS = 0,  // codes are integers, or those of `table`
  QJAX_E4M3 = 1,      // bits of float8_e4m3fn, none of them NaN
  QJAX_E5M2 = 2,      // bits of float8_e5m2
  QJAX_VALUES = 3,    // places in `values`
};

enum qjax_isa {
  QJAX_GENERIC = 0,
  QJAX_AVX2 = 1,         // with FMA and F16C
  QJAX_AVX_VNNI = 2,     // AVX2 with VNNI in 256 bits
  QJAX_AVX512_VNNI = 3,  // F, BW, DQ, VL, VNNI
  QJAX_NEON_DOT = 4,     // dotprod
  QJAX_NEON_I8MM = 5,    // dotprod and i8mm
  QJAX_ISA_COUNT = 6,
};

typedef struct {
  int64_t rows, columns;
  int64_t group_size;  // columns that share a scale: 16, or a multiple of 32, or all columns
  int32_t plane_count;
  int32_t width[2];
  int32_t offset;
  int32_t scale_kind;
  int32_t has_table;
  int8_t table[16];
  const uint8_t* plane[2];
  const void* scale;
  const void* minimum;  // NULL if none
  const uint8_t* sub;   // NULL unless the scale kind has it
  const uint8_t* zero;  // NULL if none
  int32_t value_kind;
  float values[16];
  // Of QJAX_PACKED: 256 numbers; [T, supers, 16]; [T, 16].
  const float* scale_table;
  const float* super_scale;
  const uint8_t* start;
  int64_t supers, scale_block;
  float scale_offset;
} qjax_weight;

enum qjax_rounding {
  QJAX_FLOATS = 0,  // x is multiplied as it is
  QJAX_GROUPS = 1,  // rounded to int8 from -127 to 127, a scale for each 32 columns of each row
  QJAX_TOKENS = 2,  // rounded to int8 from -128 to 127, a scale for each row; integers are summed up to a weight's scale
};

// x, and what is done to it before it is multiplied: x[m, k] / input_scale[k], then columns in another order, rounding.
typedef struct {
  const float* x;            // [m, columns]
  int64_t m;
  const int32_t* columns;    // the column of x that column k of w is multiplied with; NULL for k. NaN for one not there
  const float* input_scale;  // [columns]; NULL for ones
  const float* x_scale;      // the scale of QJAX_TOKENS; NULL for a row's largest magnitude / 127.5
  int32_t rounding;
} qjax_input;

// Columns that share a scale under QJAX_TOKENS, at most: their integer sums have 32 bits.
#define QJAX_MOST_SUMMED 65536

// Runs task(arg, i) for i = 0 ... count - 1, on any threads in any order, and returns when all are done.
typedef void (*qjax_task)(void* arg, int64_t i);
typedef void (*qjax_parallel)(void* context, int64_t count, qjax_task task, void* arg);

// Bytes that each leaf must have; 0 for a leaf that the kind of scale has not.
QJAX_API int64_t qjax_plane_bytes(const qjax_weight* w, int plane);
QJAX_API int64_t qjax_scale_bytes(const qjax_weight* w);
QJAX_API int64_t qjax_sub_bytes(const qjax_weight* w);
QJAX_API int64_t qjax_zero_bytes(const qjax_weight* w);

// NULL if the kernels serve this weight, else what they do not (sizes, widths, groups).
QJAX_API const char* qjax_check(const qjax_weight* w);

// Whether this CPU has the instructions; the best of them.
QJAX_API int qjax_has_isa(int isa);
QJAX_API int qjax_best_isa(void);
QJAX_API const char* qjax_isa_name(int isa);

// y[i] = float32 [rows of x, w[i].rows] for each of `count` weights that share x.
//   isa: one that qjax_has_isa. parallel: NULL runs everything on the caller. Results do not depend on it.
// Returns 0, or 1 for a weight that qjax_check refuses, or 2 where there is no memory for the scratch space. Of
// QJAX_TOKENS: 1 for minimums, scales of two levels, and groups of 16 or of more than QJAX_MOST_SUMMED; of floats: 1 for both.
QJAX_API int qjax_matmul(const qjax_weight* w, int64_t count, const qjax_input* input, float* const* y, int isa,
                         qjax_parallel parallel, void* context);

// Whether qjax_matmul reads each weight but once, from front to back, for so many rows of x.
QJAX_API int qjax_reads_once(int isa, int64_t m);
// Where the tasks of share `part` of `parts` begin to read then, and the bytes from there to the end of the plane.
QJAX_API int64_t qjax_start(const qjax_weight* w, int64_t count, int64_t part, int64_t parts, const uint8_t** at);

// y[m, rows] = x[m, columns] * w^T for row-major 16-bit floats w; bf16: bfloat16, else float16.
QJAX_API int qjax_matmul_dense(const uint16_t* w, int64_t rows, int64_t columns, int bf16, const float* x, int64_t m, float* y,
                      int isa, qjax_parallel parallel, void* context);

// Grouped-query attention in float32 of queries over a cache, row by row of the batch: a query at position p sees slots
// p - window + 1 ... p (all up to p if window is 0), each slot holding the position of its number.
//   q, out: float32 [batch, seq, heads, dim]; k, v: [batch, kv_heads, slots, dim], dim a multiple of 16;
//   positions: int32 [batch, seq], below slots.
//   k_scale, v_scale: of int8 entries, float32 [batch, kv_heads, slots]: an entry stands for scale * its numbers.
enum qjax_entry_kind { QJAX_KIND_F16 = 0, QJAX_KIND_BF16 = 1, QJAX_KIND_F32 = 2, QJAX_KIND_INT8 = 3 };
typedef struct {
  const float* q;
  const void *k, *v;
  const float *k_scale, *v_scale;  // NULL but for int8
  const int32_t* positions;
  float* out;
  int64_t batch, seq, heads, kv_heads, slots, dim, window;
  int32_t kind;  // of k and v
} qjax_attention_args;
QJAX_API int qjax_attention(const qjax_attention_args* args, int isa, qjax_parallel parallel, void* context);

// Row by row of float32 [rows, n]: y = x / sqrt(mean(x^2) + eps) * weight; y = gate / (1 + exp(-gate)) * up.
QJAX_API int qjax_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t n, float* y, int isa,
                           qjax_parallel parallel, void* context);
QJAX_API int qjax_swiglu(const float* gate, const float* up, int64_t rows, int64_t n, float* y, int isa,
                         qjax_parallel parallel, void* context);
// Pairs (2 i, 2 i + 1), or (i, i + half), of each head of float32 [tokens, heads, dim] turned by angle i of the token,
// i < half; cosine, sine: [tokens, half]. Dimensions past twice `half` are passed through.
QJAX_API int qjax_rope(const float* x, const float* cosine, const float* sine, int64_t tokens, int64_t heads,
                       int64_t dim, int64_t half, int interleaved, float* y, int isa, qjax_parallel parallel,
                       void* context);

// One plane from rows-side-by-side (qjax/arrays/planes.py: chunks of `stride` bytes) to lanes, for tiles
// [first, first + tiles) of a plane of `rows` rows; `flip` is xored into each byte. out is that of all tiles.
// Returns 0, or 1 for a width or stride that is not known.
QJAX_API int qjax_to_lanes(const uint8_t* in, int64_t rows, int64_t columns, int width, int stride, int flip, int64_t first,
                  int64_t tiles, uint8_t* out);

#ifdef __cplusplus
}
#endif

#endif  // QJAX_CORE_H_
