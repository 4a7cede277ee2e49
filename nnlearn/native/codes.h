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

/* The bits of the magnitude and of the sign. Magnitudes are ordered as their bits are, and maxima of integers are exact. */
#define SIGN INT32_MIN
static inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* What a group's codes depend on: its largest magnitude, and whether it has negative numbers. Zero and subnormal numbers,
   which are 0 here, have no sign. */
#define INSPECT(value, largest, signs)                             \
  {                                                                \
    const int32_t bits = bits_of(value), magnitude = bits & ~SIGN; \
    largest = magnitude > largest ? magnitude : largest;           \
    signs |= magnitude >= 0x00800000 ? bits : 0;                   \
  }

/* A random whole number in [0, 2^24) from a position's phase. */
#define PHASE 0x9E3779B9u
static inline float noise_of(uint32_t phase) {
  uint32_t x = (phase ^ (phase >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return (float)(int32_t)(x >> 8);
}

/* Codes of values[0 .. count), which are the numbers of an array from position on; returns their scale. */
static inline float encode_inspected(uint8_t* restrict codes, const float* restrict values, uint32_t seed,
                                     int64_t position, int64_t count, int32_t largest, int32_t signs) {
  float scale;
  memcpy(&scale, &largest, sizeof scale);
  const float inverse = scale > 0 ? 1 / scale : 0;
  const int negative = signs < 0;
  uint32_t phase = (uint32_t)position * PHASE + seed;
  /* Numbers are compared in units in which levels are powers of whole numbers. x * (1 / x) is at most 1 in floating
     point, so the largest number has the last level and is not rounded up. Branches would prevent vectorization. */
  if (negative) {
    for (int64_t i = 0; i < count; i++, phase += PHASE) {
      const float size = fabsf(values[i]) * inverse * 16129.0f; /* 127 squared */
      const int below = (int)sqrtf(size), sign = bits_of(values[i]) >> 31;
      const float level = (float)below;
      const int code = below + (noise_of(phase) * (level * 0x1p-23f + 0x1p-24f) < size - level * level);
      codes[i] = (uint8_t)(128 + (code ^ sign) - sign);
    }
  } else {
    for (int64_t i = 0; i < count; i++, phase += PHASE) {
      const float size = values[i] * inverse * 4228250625.0f; /* 255 to the fourth */
      const int below = (int)sqrtf(sqrtf(size));
      const float level = (float)below, next = level + 1;
      const float low = level * level * (level * level), gap = next * next * (next * next) - low;
      const int code = below + (noise_of(phase) * 0x1p-24f * gap < size - low);
      codes[i] = (uint8_t)(code + ((code == 0) & (size > 0))); /* a positive number never becomes 0 */
    }
  }
  if (largest >= 0x7f800000) scale = NAN;
  return negative ? -scale : scale;
}

static inline float encode_group(uint8_t* restrict codes, const float* restrict values, uint32_t seed, int64_t position,
                                 int64_t count) {
  int32_t largest = 0, signs = 0;
  for (int64_t i = 0; i < count; i++) INSPECT(values[i], largest, signs)
  return encode_inspected(codes, values, seed, position, count, largest, signs);
}
