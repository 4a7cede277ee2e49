/* Odd matrix polynomials X <- (a + b A + c A A) X, A = X X^T, one after another, on each matrix of a stack. One thread
   works on one matrix, which stays in its cache. A and A A are symmetric, so half of each is computed. */

#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 8
#endif
#define COLUMNS (2 * LANES) /* a tile is ROWS x COLUMNS numbers, in registers */

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
  int64_t rows, columns, steps;
  const float *x, *coefficients;
  float* out;
  atomic_bool failed;
} Work;

static int64_t padded(int64_t size) { return (size + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* target = scale * own + factor * (left @ panel) for one tile, where panel is (depth, COLUMNS) without gaps. */
static void tile(float* target, const float* own, float scale, float factor, int64_t own_stride, const float* left,
                 int64_t left_stride, const float* panel, int64_t depth) {
  Vector sums[ROWS][2];
  memset(sums, 0, sizeof sums);
  for (int64_t k = 0; k < depth; k++) {
    const Vector first = *(const Vector*)(panel + k * COLUMNS), second = *(const Vector*)(panel + k * COLUMNS + LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      sums[row][0] += left[row * left_stride + k] * first;
      sums[row][1] += left[row * left_stride + k] * second;
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int half = 0; half < 2; half++) {
      const int64_t at = row * own_stride + half * LANES;
      Vector value = factor * sums[row][half];
      if (own) value += scale * *(const Vector*)(own + at);
      *(Vector*)(target + at) = value;
    }
}

typedef float Four __attribute__((vector_size(16), aligned(4)));

/* to[k][row] = from[row][k] for 4 rows and 4 columns. */
static inline void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  const Four a = *(Four*)from, b = *(Four*)(from + from_stride), c = *(Four*)(from + 2 * from_stride),
             d = *(Four*)(from + 3 * from_stride);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ba = __builtin_shufflevector(a, b, 2, 6, 3, 7), dc = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *(Four*)to = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  *(Four*)(to + to_stride) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  *(Four*)(to + 2 * to_stride) = __builtin_shufflevector(ba, dc, 0, 1, 4, 5);
  *(Four*)(to + 3 * to_stride) = __builtin_shufflevector(ba, dc, 2, 3, 6, 7);
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* to[j][i] = from[i][j], or to[i][j] = from[i][j]. */
static void copy(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                 bool turned) {
  if (!turned) {
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * to_stride, from + i * from_stride, columns * sizeof(float));
    return;
  }
  for (int64_t j = 0; j < columns; j += 4)
    for (int64_t i = 0; i < rows; i += 4) {
      if (i + 4 <= rows && j + 4 <= columns) {
        transpose(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
        continue;
      }
      for (int64_t k = i; k < least(i + 4, rows); k++)
        for (int64_t l = j; l < least(j + 4, columns); l++) to[l * to_stride + k] = from[k * from_stride + l];
    }
}

/* The lower triangle of target, in tiles, and its mirror image: scale * own + factor * (left @ right), where column j of
   right is row j of the array given. */
static void symmetric(float* target, const float* own, float scale, float factor, int64_t size, int64_t stride,
                      const float* left, const float* right, int64_t from_stride, int64_t depth, float* panel) {
  for (int64_t j = 0; j < size; j += COLUMNS) {
    for (int64_t k = 0; k < depth; k += 4)
      for (int64_t column = 0; column < COLUMNS; column += 4)
        transpose(panel + k * COLUMNS + column, COLUMNS, right + (j + column) * from_stride + k, from_stride);
    for (int64_t i = j; i < size; i += ROWS)
      tile(target + i * stride + j, own ? own + i * stride + j : NULL, scale, factor, stride, left + i * from_stride,
           from_stride, panel, depth);
    for (int64_t i = j + COLUMNS; i < size; i += 4)
      for (int64_t column = j; column < j + COLUMNS; column += 4)
        transpose(target + column * stride + i, stride, target + i * stride + column, stride);
  }
}

/* x <- scale * x + factor @ x, a panel of columns after another. */
static void multiply(float* x, float scale, const float* factor, int64_t height, int64_t width, int64_t long_stride,
                     int64_t stride, float* panel) {
  for (int64_t j = 0; j < width; j += COLUMNS) {
    for (int64_t k = 0; k < height; k++) memcpy(panel + k * COLUMNS, x + k * long_stride + j, COLUMNS * sizeof(float));
    for (int64_t i = 0; i < height; i += ROWS)
      tile(x + i * long_stride + j, scale ? x + i * long_stride + j : NULL, scale, 1, long_stride, factor + i * stride,
           stride, panel, height);
  }
}

static void run(void* data, int64_t block) {
  Work* work = data;
  const bool turned = work->rows > work->columns;
  const int64_t rows = turned ? work->columns : work->rows, columns = turned ? work->rows : work->columns;
  const bool wide = columns >= WIDE * rows && work->steps > 1;
  const int64_t height = padded(rows), width = padded(columns);
  const int64_t long_stride = width + LANES, stride = height + LANES; /* no power of 2, or rows would share cache sets */
  const int64_t numbers = height * (long_stride + (wide ? 4 : 2) * stride) + COLUMNS * width;
  float* x = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
  if (!x) {
    atomic_store(&work->failed, true);
    return;
  }
  float *gram = x + height * long_stride, *inner = gram + height * stride;
  float *product = inner + height * stride, *spare = product + (wide ? height * stride : 0);
  float* panel = spare + (wide ? height * stride : 0);
  const float* from = work->x + block * rows * columns;
  float* to = work->out + block * rows * columns;
  memset(x, 0, numbers * sizeof(float));
  copy(x, long_stride, from, work->columns, work->rows, work->columns, turned);
  for (int64_t step = 0; step < work->steps;) { /* several polynomials for each product with a wide matrix */
    const int64_t last = least(work->steps, step + (!wide ? 1 : step ? 3 : 2)) - 1, first = step;
    symmetric(gram, NULL, 0, 1, height, stride, x, x, long_stride, width, panel);
    for (; step <= last; step++) {
      const float* row = work->coefficients + 3 * step;
      symmetric(inner, gram, row[1], row[2], height, stride, gram, gram, stride, height, panel);
      if (first == last) break;
      if (step == first) {
        memcpy(product, inner, height * stride * sizeof(float));
        for (int64_t i = 0; i < rows; i++) product[i * stride + i] += row[0];
      } else {
        symmetric(spare, product, row[0], 1, height, stride, inner, product, stride, height, panel);
        float* other = spare;
        spare = product, product = other;
      }
      if (step == last) continue;
      symmetric(spare, gram, row[0], 1, height, stride, inner, gram, stride, height, panel);
      symmetric(gram, spare, row[0], 1, height, stride, inner, spare, stride, height, panel);
    }
    if (first == last) {
      multiply(x, work->coefficients[3 * first], inner, height, width, long_stride, stride, panel);
      step = last + 1;
    } else {
      multiply(x, 0, product, height, width, long_stride, stride, panel);
    }
  }
  copy(to, work->columns, x, long_stride, rows, columns, turned);
  free(x);
}

XLA_FFI_Error* polynomials(XLA_FFI_CallFrame* frame) {
  if (answered(frame)) return NULL;
  const XLA_FFI_Buffer *x = frame->args.args[0], *coefficients = frame->args.args[1];
  Work work = {.rows = x->dims[1], .columns = x->dims[2], .steps = coefficients->dims[0], .x = x->data,
               .coefficients = coefficients->data, .out = result(frame, 0)};
  atomic_init(&work.failed, false);
  run_blocks(frame, x->dims[0], run, &work);
  return atomic_load(&work.failed) ? no_memory(frame) : NULL;
}
