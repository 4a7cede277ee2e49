/* 8-bit codes of groups of 256 numbers, see ``codes.py``, which has the equations. */

#include <math.h>
#include <string.h>

#define GROUP 256

static inline void decode_group(float* restrict values, const uint8_t* restrict codes, float scale, int64_t count) {
  const float size = fabsf(scale), both = 1.0f / 127, one = 1.0f / 255;
  if (scale < 0) {
    for (int64_t i = 0; i < count; i++) {
      const float level = (float)((int)codes[i] - 128) * both;
      values[i] = level * fabsf(level) * size;
    }
  } else {
    for (int64_t i = 0; i < count; i++) {
      const float root = (float)(int)codes[i] * one, level = root * root;
      values[i] = level * level * size;
    }
  }
}

/* A random number in [0, 1) from a position. */
static inline float noise_at(uint32_t position, uint32_t seed) {
  uint32_t x = position * 0x9E3779B9u + seed;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

/* Codes of values[0 .. count), which are the numbers of an array from position on; returns their scale. */
static inline float encode_group(uint8_t* restrict codes, const float* restrict values, uint32_t seed, int64_t position,
                                 int64_t count) {
  typedef int32_t __attribute__((may_alias)) Bits;
  const Bits* bits = (const Bits*)values;
  int32_t largest = 0, negative = 0;
  for (int64_t i = 0; i < count; i++) { /* magnitudes are ordered as their bits are, and maxima of integers are exact */
    const int32_t magnitude = bits[i] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
    negative |= values[i] < 0;
  }
  float scale;
  memcpy(&scale, &largest, sizeof scale);
  const float inverse = scale > 0 ? 1 / scale : 0;
  const uint32_t start = (uint32_t)position;
  /* Numbers are compared in units in which levels are powers of whole numbers. x * (1 / x) is at most 1 in floating
     point, so the largest number has the last level and is not rounded up. Branches would prevent vectorization. */
  if (negative) {
    for (int64_t i = 0; i < count; i++) {
      const float size = fabsf(values[i]) * inverse * 16129.0f; /* 127 squared */
      const int below = (int)sqrtf(size), sign = values[i] < 0;
      const float level = (float)below;
      const int code = below + (noise_at(start + (uint32_t)i, seed) * (2 * level + 1) < size - level * level);
      codes[i] = (uint8_t)(128 + (code ^ -sign) + sign);
    }
  } else {
    for (int64_t i = 0; i < count; i++) {
      const float size = values[i] * inverse * 4228250625.0f; /* 255 to the fourth */
      const int below = (int)sqrtf(sqrtf(size));
      const float level = (float)below, next = level + 1;
      const float low = level * level * (level * level), gap = next * next * (next * next) - low;
      const int code = below + (noise_at(start + (uint32_t)i, seed) * gap < size - low);
      codes[i] = (uint8_t)(code + ((code == 0) & (size > 0))); /* a positive number never becomes 0 */
    }
  }
  if (largest >= 0x7f800000) scale = NAN;
  return negative ? -scale : scale;
}
