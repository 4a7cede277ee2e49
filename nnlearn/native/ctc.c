/* The CTC loss and its gradient, one example per unit of work, with the names and the recursion of losses/ctc.py.

   A probability is a mantissa and an integer exponent, both floats; 0 has mantissa 0 and exponent -inf. Column n has
   two states: ``blank`` n, the blank before the n-th label, and ``label`` n, the label itself. Column N, after the last
   label, has only a blank. Loops over columns and classes are written so that compilers vectorize them. */

#include <math.h>
#include <string.h>

#define LANES 16
#define NORMALIZE_EVERY 16 /* a frame multiplies a mantissa by at most 6, and 6^16 < 2^42 */
#define LOG2_E 1.44269504f
#ifdef __clang__
#define NO_DEPENDENCE _Pragma("clang loop vectorize(assume_safety)")
#else
#define NO_DEPENDENCE _Pragma("GCC ivdep")
#endif

typedef struct {
  int64_t frames, classes, labels;
  int32_t blank_id;
  const float* logits;      /* [examples, frames, classes] */
  const uint8_t* is_frame;  /* [examples, frames] */
  const int32_t* label_ids; /* [examples, labels], padded at the end */
  const int32_t* lengths;   /* [examples] */
  float* losses;            /* [examples] */
  float* gradients;         /* like the logits, or NULL */
  atomic_bool out_of_memory;
} Work;

typedef struct {
  float *mantissa, *exponent;
} Scaled;

static inline float from_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline int32_t to_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float larger(float a, float b) { return a > b ? a : b; }

/* 2**exponent, or 0 below the least normal number and for NaN, which -inf - -inf gives. The last bits of an integer
   plus 2**23 are the integer. */
static inline float power_of_two(float exponent) {
  return from_bits(to_bits(larger(exponent, -127.0f) + (8388608.0f + 127.0f)) << 23);
}

/* exp2 for -0.5 to 0.5: its series, up to terms below a float's last digit */
static inline float exp2_near_zero(float x) {
  float y = 1.5252734e-5f;
  y = y * x + 1.5403530e-4f;
  y = y * x + 1.3333558e-3f;
  y = y * x + 9.6181291e-3f;
  y = y * x + 5.5504109e-2f;
  y = y * x + 2.4022651e-1f;
  y = y * x + 6.9314718e-1f;
  return y * x + 1.0f;
}

/* exp(x) for x <= 0 as a mantissa from 0.7 to 1.4 and an exponent; ln 2 is split in two to keep the rest accurate */
static inline float exp_scaled(float x, float* exponent) {
  float whole = rintf(x * LOG2_E);
  float rest = ((x - whole * 0.693359375f) - whole * -2.12194440e-4f) * LOG2_E;
  rest = rest > -0.5f ? rest : -0.5f; /* for x so large that no digits are left for it */
  rest = rest < 0.5f ? rest : 0.5f;
  *exponent = whole;
  return x == -INFINITY ? 0.0f : x != x ? x : exp2_near_zero(rest);
}

static inline float exp_of(float x) {
  float exponent;
  float mantissa = exp_scaled(x, &exponent);
  return mantissa * power_of_two(exponent);
}

static float largest_of(const float* row, int64_t count) {
  float lanes[LANES], largest = -__FLT_MAX__; /* not -inf, so that a row of -inf has weights 0 */
  int64_t k = 0;
  for (int j = 0; j < LANES; j++) lanes[j] = largest;
  for (; k + LANES <= count; k += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] = row[k + j] > lanes[j] ? row[k + j] : lanes[j];
  for (int j = 0; j < LANES; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  for (; k < count; k++) largest = row[k] > largest ? row[k] : largest;
  return largest;
}

/* The sum of exp(row - largest); writes the terms to weights unless it is NULL. */
static float sum_weights(const float* row, int64_t count, float largest, float* weights) {
  float lanes[LANES] = {0}, total = 0;
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
    float some[LANES];
    for (int j = 0; j < LANES; j++) some[j] = exp_of(row[k + j] - largest);
    for (int j = 0; j < LANES; j++) lanes[j] += some[j];
    if (weights)
      for (int j = 0; j < LANES; j++) weights[k + j] = some[j];
  }
  for (; k < count; k++) {
    float one = exp_of(row[k] - largest);
    total += one;
    if (weights) weights[k] = one;
  }
  for (int j = 0; j < LANES; j++) total += lanes[j];
  return total == 0 ? 1 : total;
}

static inline float add(float a, float a_exponent, float b, float b_exponent, float* exponent) {
  *exponent = larger(a_exponent, b_exponent);
  return a * power_of_two(a_exponent - *exponent) + b * power_of_two(b_exponent - *exponent);
}

/* Scales mantissas to 1..2 without changing the values. */
static void normalize(Scaled states, int64_t count) {
  float *restrict mantissa = states.mantissa, *restrict exponent = states.exponent;
  for (int64_t n = 0; n < count; n++) {
    int32_t biased = to_bits(mantissa[n]) >> 23;
    mantissa[n] *= from_bits((254 - biased) << 23);
    exponent[n] += biased - 127;
  }
}

/* One frame forward, columns 0 to N, from one pair of states to another; label -1 exists and has probability 0. */
static void step_forward(int64_t columns, Scaled blank, Scaled label, Scaled new_blank, Scaled new_label,
                         float blank_mantissa, float blank_exponent, Scaled emitted, const int32_t* may_skip) {
  const float *bm = blank.mantissa, *lm = label.mantissa, *em = emitted.mantissa;
  const float *be = blank.exponent, *le = label.exponent, *ee = emitted.exponent;
  float *nbm = new_blank.mantissa, *nlm = new_label.mantissa, *nbe = new_blank.exponent, *nle = new_label.exponent;
  NO_DEPENDENCE
  for (int64_t n = 0; n < columns; n++) {
    float entered_exponent, exponent;
    float entered = add(bm[n], be[n], lm[n - 1], le[n - 1], &entered_exponent);
    float come = may_skip[n] ? entered : bm[n];
    float come_exponent = may_skip[n] ? entered_exponent : be[n];
    float in_label = add(lm[n], le[n], come, come_exponent, &exponent);
    nbm[n] = entered * blank_mantissa;
    nbe[n] = entered_exponent + blank_exponent;
    nlm[n] = in_label * em[n];
    nle[n] = exponent + ee[n];
  }
}

/* One frame backward: the probability of all that follows each state, in place, with two arrays as workspace. */
static void step_backward(int64_t columns, Scaled blank, Scaled label, Scaled through_blank, Scaled entered,
                          float blank_mantissa, float blank_exponent, Scaled emitted, const int32_t* may_skip) {
  float *bm = blank.mantissa, *lm = label.mantissa, *tm = through_blank.mantissa, *nm = entered.mantissa;
  float *be = blank.exponent, *le = label.exponent, *te = through_blank.exponent, *ne = entered.exponent;
  const float *em = emitted.mantissa, *ee = emitted.exponent;
  NO_DEPENDENCE
  for (int64_t n = 0; n < columns; n++) {
    tm[n] = bm[n] * blank_mantissa;
    te[n] = be[n] + blank_exponent;
    lm[n] *= em[n];
    le[n] += ee[n];
    nm[n] = add(tm[n], te[n], lm[n], le[n], &ne[n]);
  }
  NO_DEPENDENCE
  for (int64_t n = 0; n < columns; n++) {
    bm[n] = nm[n];
    be[n] = ne[n];
  }
  NO_DEPENDENCE
  for (int64_t n = 0; n + 1 < columns; n++) {
    float next = may_skip[n + 1] ? nm[n + 1] : tm[n + 1];
    float next_exponent = may_skip[n + 1] ? ne[n + 1] : te[n + 1];
    float exponent;
    lm[n] = add(lm[n], le[n], next, next_exponent, &exponent);
    le[n] = exponent;
  }
}

static Scaled take(void** memory, int64_t count) {
  Scaled taken = {*memory, (float*)*memory + count};
  *memory = taken.exponent + count;
  return taken;
}

static Scaled at(Scaled states, int64_t place) { return (Scaled){states.mantissa + place, states.exponent + place}; }

static void fill_zero(Scaled states, int64_t count) {
  for (int64_t n = 0; n < count; n++) {
    states.mantissa[n] = 0;
    states.exponent[n] = -INFINITY;
  }
}

static void start_at(Scaled states, int64_t n) {
  states.mantissa[n] = 1;
  states.exponent[n] = 0;
}

static void run_example(void* data, int64_t example) {
  Work* work = data;
  const int64_t classes = work->classes, columns = work->lengths[example] + 1, last = columns - 1;
  const float* logits = work->logits + example * work->frames * classes;
  const uint8_t* is_frame = work->is_frame + example * work->frames;
  const int32_t* label_ids = work->label_ids + example * work->labels;
  float* gradient = work->gradients ? work->gradients + example * work->frames * classes : NULL;
  /* For each frame the blank and the labels; for the gradient also the labels' states after the frame. */
  const int64_t kept = work->frames * columns, history = gradient ? kept : 0;
  const int64_t scaled = work->frames + kept + history + 6 * (columns + 1);
  void* memory = malloc(8 * scaled + 4 * columns);
  if (!memory) {
    atomic_store(&work->out_of_memory, true);
    return;
  }
  void* left = memory;
  Scaled blank_emitted = take(&left, work->frames), emitted = take(&left, kept), labels_after = take(&left, history);
  Scaled states[4], room[2];
  for (int i = 0; i < 4; i++) { /* with probability 0 before the first column */
    states[i] = take(&left, columns + 1);
    fill_zero(states[i], columns + 1);
    states[i] = at(states[i], 1);
  }
  for (int i = 0; i < 2; i++) room[i] = take(&left, columns + 1);
  int32_t* may_skip = left;
  may_skip[0] = 0;
  for (int64_t n = 1; n < columns; n++) may_skip[n] = n < last && label_ids[n] != label_ids[n - 1];

  Scaled blank = states[0], label = states[1], new_blank = states[2], new_label = states[3];
  start_at(blank, 0);
  double cost = 0;
  int64_t count = 0;
  for (int64_t t = 0; t < work->frames; t++) {
    const float* row = logits + t * classes;
    float* weights = gradient ? gradient + t * classes : NULL;
    if (!is_frame[t]) {
      if (weights) memset(weights, 0, 4 * classes);
      continue;
    }
    float largest = largest_of(row, classes), total = sum_weights(row, classes, largest, weights);
    cost += log(total);
    if (weights) {
      float over = 1 / total;
      for (int64_t k = 0; k < classes; k++) weights[k] *= over;
    }
    Scaled here = at(emitted, count * columns);
    for (int64_t n = 0; n < last; n++)
      here.mantissa[n] = exp_scaled(row[label_ids[n]] - largest, &here.exponent[n]);
    fill_zero(at(here, last), 1);
    blank_emitted.mantissa[count] = exp_scaled(row[work->blank_id] - largest, &blank_emitted.exponent[count]);
    step_forward(columns, blank, label, new_blank, new_label, blank_emitted.mantissa[count],
                 blank_emitted.exponent[count], here, may_skip);
    Scaled old_blank = blank, old_label = label;
    blank = new_blank, label = new_label, new_blank = old_blank, new_label = old_label;
    if (count % NORMALIZE_EVERY == NORMALIZE_EVERY - 1) {
      normalize(blank, columns);
      normalize(label, columns);
    }
    if (gradient) {
      memcpy(labels_after.mantissa + count * columns, label.mantissa, 4 * columns);
      memcpy(labels_after.exponent + count * columns, label.exponent, 4 * columns);
    }
    count++;
  }

  float exponent;
  float likelihood = add(blank.mantissa[last], blank.exponent[last], label.mantissa[last - 1], label.exponent[last - 1],
                         &exponent);
  double loss = likelihood == 0 ? cost + INFINITY : cost - (log(likelihood) + exponent * log(2.0));
  loss = loss < 0 ? 0 : loss; /* rounding may make it negative */
  work->losses[example] = loss;
  if (gradient && loss == INFINITY) memset(gradient, 0, 4 * work->frames * classes);
  if (gradient && loss != INFINITY) {
    for (int i = 0; i < 2; i++) fill_zero(at(states[i], -1), columns + 1);
    blank = states[0], label = states[1];
    start_at(blank, last);
    if (last) start_at(label, last - 1);
    const float over = 1 / likelihood;
    for (int64_t t = work->frames - 1; t >= 0; t--) {
      if (!is_frame[t]) continue;
      count--;
      float* row = gradient + t * classes;
      float* restrict share = room[0].mantissa;
      const float* after = labels_after.mantissa + count * columns;
      const float* after_exponent = labels_after.exponent + count * columns;
      for (int64_t n = 0; n < last; n++) {
        /* Exponents beyond a float's digits are off by more than 1, so the share is limited to 1. */
        float shift = after_exponent[n] + label.exponent[n] - exponent;
        float one = label.mantissa[n] * over * after[n] * power_of_two(shift > 127.0f ? 127.0f : shift);
        share[n] = one > 1 ? 1 : one;
      }
      float rest = 1;
      for (int64_t n = 0; n < last; n++) {
        rest -= share[n];
        row[label_ids[n]] -= share[n];
      }
      row[work->blank_id] -= rest; /* the blank gets the rest of the frame */
      step_backward(columns, blank, label, room[0], room[1], blank_emitted.mantissa[count],
                    blank_emitted.exponent[count], at(emitted, count * columns), may_skip);
      if (count % NORMALIZE_EVERY == 0) {
        normalize(blank, columns);
        normalize(label, columns);
      }
    }
  }
  free(memory);
}

static XLA_FFI_Error* run(XLA_FFI_CallFrame* frame, bool with_gradient) {
  if (answered(frame)) return NULL;
  const XLA_FFI_Buffer *logits = frame->args.args[0], *labels = frame->args.args[2];
  Work work = {
      .frames = logits->dims[1],
      .classes = logits->dims[2],
      .labels = labels->dims[1],
      .blank_id = *(int32_t*)argument(frame, 4),
      .logits = argument(frame, 0),
      .is_frame = argument(frame, 1),
      .label_ids = argument(frame, 2),
      .lengths = argument(frame, 3),
      .losses = result(frame, 0),
      .gradients = with_gradient ? result(frame, 1) : NULL,
  };
  run_blocks(frame, logits->dims[0], run_example, &work);
  return atomic_load(&work.out_of_memory) ? no_memory(frame) : NULL;
}

XLA_FFI_Error* ctc_loss(XLA_FFI_CallFrame* frame) { return run(frame, false); }

XLA_FFI_Error* ctc_gradient(XLA_FFI_CallFrame* frame) { return run(frame, true); }
