/* Splits one buffer into many arrays, or joins many arrays end to end. ITEM is the size of an element in bytes. */

#include <string.h>

#define CHUNK (1 << 18) /* bytes per unit of work */

typedef struct {
  int64_t parts;
  int64_t* ends; /* end of each part in the buffer, in bytes */
  char** data;   /* memory of each part */
  char* buffer;
  bool splits;
} Work;

static void run(void* data, int64_t block) {
  const Work* work = data;
  const int64_t total = work->ends[work->parts - 1];
  int64_t at = block * CHUNK;
  const int64_t last = at + CHUNK < total ? at + CHUNK : total;
  int64_t part = 0;
  for (int64_t step = work->parts; step > 0;) { /* find the first part that ends after this position */
    int64_t half = step / 2;
    if (work->ends[part + half] <= at) {
      part += half + 1;
      step -= half + 1;
    } else {
      step = half;
    }
  }
  while (at < last) {
    const int64_t start = part ? work->ends[part - 1] : 0;
    const int64_t stop = work->ends[part] < last ? work->ends[part] : last;
    char *here = work->data[part] + (at - start), *there = work->buffer + at;
    memcpy(work->splits ? here : there, work->splits ? there : here, stop - at);
    at = stop;
    part++;
  }
}

static XLA_FFI_Error* copy(XLA_FFI_CallFrame* frame, bool splits) {
  if (answered(frame)) return NULL;
  const int64_t parts = splits ? frame->rets.size : frame->args.size;
  void** buffers = splits ? frame->rets.rets : frame->args.args;
  int64_t* ends = malloc(parts * (sizeof(int64_t) + sizeof(char*)));
  if (!ends) return no_memory(frame);
  Work work = {parts, ends, (char**)(ends + parts), splits ? argument(frame, 0) : result(frame, 0), splits};
  int64_t end = 0;
  for (int64_t part = 0; part < parts; part++) {
    const XLA_FFI_Buffer* one = buffers[part];
    ends[part] = end += ITEM * length(one);
    work.data[part] = one->data;
  }
  run_blocks(frame, (end + CHUNK - 1) / CHUNK, run, &work);
  free(ends);
  return NULL;
}

XLA_FFI_Error* split(XLA_FFI_CallFrame* frame) { return copy(frame, true); }

XLA_FFI_Error* join(XLA_FFI_CallFrame* frame) { return copy(frame, false); }
