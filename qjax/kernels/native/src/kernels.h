// What matmul.cc and around.cc ask of an instruction set: a table of functions, filled by kernels.inc once for each isa_*.cc.

#ifndef QJAX_KERNELS_H_
#define QJAX_KERNELS_H_

#include <stdint.h>

#include "core.h"

namespace qjax {

constexpr int kLanes = 16, kStep = 32, kSuperBlock = 256;
// Most rows of x that a kernel keeps in registers, over all instruction sets.
constexpr int kMostRows = 12;

// How a code is put together; see kernels.inc.
enum CodeForm { kForm8, kForm4, kForm4Table, kForm4And1, kForm4And2, kForm2, kForm2And1, kFormE4m3, kFormE5m2, kFormValues, kForms };
// Those before hold integers.
constexpr int kIntegerForms = kFormE4m3;

// Where one tile's codes and tables lie, from some step on.
struct Codes {
  const uint8_t* plane[2];
  const uint8_t* table;  // 16 values plus 128
  const float* values;   // 16 floats
};

// One chunk of rows of x, made ready: see Inputs::Prepare in matmul.cc. `rows` of them lie side by side in each entry.
struct Rows {
  int rows;
  const int8_t* q;       // [steps, 8, rows, 4]
  const float* x;        // [steps, 32, rows], for float activations
  const float* scale;    // [steps, rows]: x ~ scale * q
  const int32_t* start;  // [steps or 2 steps, rows]: what each integer sum starts from
  const float* sums;     // [steps or 2 steps, rows]: sums of x over the columns of a step, half a step (or a scale)
};

// How a product reads its scales.
enum ScaleForm {
  kEachStep,         // float32 [steps, 16]
  kEachHalfStep,     // float32 [2 steps, 16]
  kRaw,              // the weight's own float16, one for every `steps` steps
  kRawZero,          // the same with the weight's own zeros; x's sums are over the columns of a scale then
  kSubEachStep,      // the weight's own float16, one a super-block; int8 [steps, 16]
  kSubEachHalfStep,  // the same with int8 [2 steps, 16]
  kScaleForms
};
struct ScalesAt {
  const float* floats;
  const uint16_t* raw;
  const uint8_t *sub, *zero;
  int64_t steps;
};

// All add to sums [rows, 16]. `minimum` is float32 [steps, 16] or [2 steps, 16].
using ProductFn = void (*)(const Codes&, int64_t steps, const Rows&, const ScalesAt& scales, int bias, float* sums);
using MinimumFn = void (*)(int64_t count, const Rows&, const float* minimum, float* sums);
using SubMinimumFn = void (*)(int64_t blocks, int parts, const Rows&, const uint16_t* raw, const uint8_t* sub, float* sums);
// dots [rows, 16] += sums of x.q times the unsigned codes.
using DotsFn = void (*)(const Codes&, int64_t steps, const Rows&, int32_t* dots);
using UnpackFn = void (*)(const Codes&, int64_t steps, uint8_t* codes);

// Floats of scratch that `attention` needs for so many queries, each of `group` heads.
constexpr int64_t AttentionFloats(int64_t queries, int64_t group, int64_t dim) {
  return 2 * dim * 64 + queries * group * (2 * dim + 64 + 4) + 16 * dim;
}

struct KernelTable {
  int rows;            // that the panel kernels take at once, at most kMostRows
  int half_step_rows;  // the same where half steps have scales of their own, which takes more registers a row
  int fused_rows;      // that the kernels which unpack on their way take at once
  int wide_bias;       // what this instruction set's product takes from codes of 8 bits before it multiplies them
  // Integer and float products that unpack on their way, by rows - 1; integer ones alone read raw scales.
  ProductFn int8_product[kForms][kScaleForms][kMostRows];
  ProductFn float_product[kForms][kRaw][kMostRows];
  // Of rows of x that have one scale each: integers alone, then sums += scale * (dots - (taken + zero) * sums of x.q),
  // for one group of columns; the dots become 0.
  DotsFn dots[kForms][kMostRows];
  void (*scale_dots)(int64_t rows, const ScalesAt& scale, int taken, const int32_t* q_sums, int32_t* dots, float* sums);
  // sums += minimum * sums of x. Of two levels: minus float16 [blocks, 16] times uint8 [blocks, parts, 16].
  MinimumFn minimum[kMostRows];
  SubMinimumFn sub_minimum[kMostRows];
  UnpackFn unpack[kForms];
  // float panel [32 * steps, 16] of codes in bytes; then its product.
  void (*dequantize[kForms])(const uint8_t* codes, const float* values, int64_t steps, const float* scale,
                             const float* minimum, int bias, int halves, float* panel);
  void (*panel_product[kMostRows])(const float* panel, int64_t columns, const Rows&, float* sums);
  // One step of one row: 32 floats (fewer at the end of a row) to int8, their scale, and the sums of both halves.
  void (*quantize)(const float* x, int8_t* q, float* scale, int32_t* sums);
  // A row of whole steps to int8, its scale (`fixed` if there is one), and the sums of each step.
  void (*quantize_row)(const float* x, int64_t steps, const float* fixed, int8_t* q, float* scale, int32_t* sums);
  // The integers of two levels alone, of whole super-blocks: int8 and (if the kind has them) uint8 [count, 16].
  void (*sub_scales)(const qjax_weight& w, int64_t groups, int64_t tile, int64_t first, int64_t count, uint8_t* scale,
                     uint8_t* minimum);
  // float32 of a tile's scales, and of its minimums if wanted, each [count, 16], for `count` groups from `first` on
  // (whole super-blocks where there are any); a row has `groups`.
  void (*scales)(const qjax_weight& w, int64_t groups, int64_t tile, int64_t first, int64_t count, float* scale,
                 float* minimum);
  // Attention of queries [begin, end) of one row of the batch, for the heads that share one of the cache. `scratch` holds
  // AttentionFloats(...) floats.
  void (*attention)(const qjax_attention_args& a, int64_t b, int64_t kv_head, int64_t begin, int64_t end, float* scratch);
  void (*dense)(const uint16_t* w, int64_t columns, int bf16, const float* x, int64_t m, float* y, int64_t y_stride);
  // One row; some numbers; one token.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  void (*rope)(const float* x, const float* cosine, const float* sine, int64_t heads, int64_t dim, int64_t half,
               int interleaved, float* y);
};

// Slots of the cache that attention takes at once.
constexpr int64_t kSlots = 64;

// NULL where the program was built for another kind of CPU.
const KernelTable* GenericKernels();
const KernelTable* Avx2Kernels();
const KernelTable* AvxVnniKernels();
const KernelTable* Avx512Kernels();
const KernelTable* NeonDotKernels();
const KernelTable* NeonI8mmKernels();

}  // namespace qjax

#endif  // QJAX_KERNELS_H_
