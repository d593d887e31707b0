// Planes of codes from rows side by side to lanes; the inverse stands in qjax/arrays/lanes.py, in JAX.

#include <string.h>

#include "kernels.h"

namespace {

using qjax::kLanes;
using qjax::kStep;

// The plane's bits of `count` codes of a row from column `begin` on (a multiple of 32), one a byte.
void RowBits(const uint8_t* row, int width, int stride, int64_t begin, int64_t count, uint8_t* out) {
  const int per_byte = 8 / width, mask = (1 << width) - 1;
  const int64_t chunk = static_cast<int64_t>(stride) * per_byte;
  for (int64_t k = 0; k < count;) {
    const int64_t at = (begin + k) % chunk, shift = at / stride * width, first = at % stride;
    const uint8_t* bytes = row + (begin + k) / chunk * stride + first;
    const int64_t n = count - k < stride - first ? count - k : stride - first;
    for (int64_t i = 0; i < n; ++i) out[k + i] = static_cast<uint8_t>((bytes[i] >> shift) & mask);
    k += n;
  }
}

}  // namespace

extern "C" int qjax_to_lanes(const uint8_t* in, int64_t rows, int64_t columns, int width, int stride, int flip,
                             int64_t first, int64_t tiles, uint8_t* out) {
  if ((width != 8 && width != 4 && width != 2 && width != 1) || stride < 1 || rows < 1 || columns < 1 ||
      columns * width % 8 != 0) {
    return 1;
  }
  const int64_t steps = (columns + kStep - 1) / kStep, row_bytes = columns * width / 8;
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    uint8_t* tile_out = out + tile * steps * 64 * width;
    for (int64_t s = 0; s < steps; ++s) {
      uint8_t* step = tile_out + s * 64 * width;
      const int64_t count = columns - s * kStep < kStep ? columns - s * kStep : kStep;
      uint8_t bits[kLanes][kStep] = {};
      for (int lane = 0; lane < kLanes && tile * kLanes + lane < rows; ++lane) {
        const uint8_t* row = in + (tile * kLanes + lane) * row_bytes;
        if (width == 4 && stride == 16 && count == kStep) {
          // Columns 4 v + c and 4 v + c + 16 share a byte here as there.
          for (int v = 0; v < 4; ++v) memcpy(step + 64 * v + 4 * lane, row + s * 16 + 4 * v, 4);
        } else if (width == 8) {
          memcpy(bits[lane], row + s * kStep, count);
        } else {
          RowBits(row, width, stride, s * kStep, count, bits[lane]);
        }
      }
      if (width == 4 && stride == 16 && count == kStep) {
        for (int lane = static_cast<int>(rows - tile * kLanes); lane < kLanes; ++lane) {
          for (int v = 0; v < 4; ++v) memset(step + 64 * v + 4 * lane, 0, 4);
        }
        continue;
      }
      for (int v = 0; v < width; ++v) {
        for (int lane = 0; lane < kLanes; ++lane) {
          uint32_t word = 0;
          for (int p = 0; p < 8 / width; ++p) {
            uint32_t four;
            memcpy(&four, bits[lane] + 4 * (v + width * p), 4);
            word |= four << (width * p);
          }
          word ^= static_cast<uint32_t>(flip) * 0x01010101u;
          memcpy(step + 64 * v + 4 * lane, &word, 4);
        }
      }
    }
  }
  return 0;
}
