/* Shared by every kernel: work on the threads of XLA's pool, and the answer to XLA's version query. */

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

typedef void Block(void* work, int64_t block);

/* As in XLA, subnormal numbers are 0. Computing with them would take a hundred times as long. */
static unsigned flush_to_zero(void) {
#ifdef __SSE__
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}

static void restore(unsigned before) {
#ifdef __SSE__
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

typedef struct {
  atomic_llong next, finished;
  atomic_int holders;
  int64_t blocks;
  Block* run;
  void* work;
} Job;

static void release(Job* job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) free(job);
}

static void take_blocks(void* data) {
  Job* job = data;
  unsigned before = flush_to_zero();
  for (;;) {
    int64_t block = atomic_fetch_add(&job->next, 1);
    if (block >= job->blocks) break;
    job->run(job->work, block);
    atomic_fetch_add(&job->finished, 1);
  }
  restore(before);
  release(job);
}

static bool failed(XLA_FFI_CallFrame* frame, XLA_FFI_Error* error) {
  if (!error) return false;
  XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  frame->api->XLA_FFI_Error_Destroy(&destroy);
  return true;
}

/* Runs all blocks. The caller takes blocks too and waits only for those that are running, so the work ends even if no
   thread of the pool is ever free; a thread that starts late finds nothing to do. */
static void run_blocks(XLA_FFI_CallFrame* frame, int64_t blocks, Block* run, void* work) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  if (failed(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&count))) threads = 1;
  int64_t helpers = (threads < blocks ? threads : blocks) - 1;
  Job* job = helpers > 0 ? malloc(sizeof *job) : NULL;
  if (!job) {
    unsigned before = flush_to_zero();
    for (int64_t block = 0; block < blocks; block++) run(work, block);
    restore(before);
    return;
  }
  *job = (Job){.blocks = blocks, .run = run, .work = work};
  atomic_init(&job->next, 0);
  atomic_init(&job->finished, 0);
  atomic_init(&job->holders, 2); /* one for taking blocks here, one for waiting */
  for (int64_t helper = 0; helper < helpers; helper++) {
    atomic_fetch_add(&job->holders, 1);
    XLA_FFI_ThreadPool_Schedule_Args schedule = {
        XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, take_blocks, job};
    if (failed(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&schedule))) {
      release(job);
      break;
    }
  }
  take_blocks(job);
  while (atomic_load(&job->finished) < blocks) sched_yield();
  release(job);
}

/* XLA calls a handler once only to ask which version of the interface it was written for. */
static bool answered(XLA_FFI_CallFrame* frame) {
  __auto_type extension = frame->extension_start; /* the name of its type differs between versions */
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return true;
}

static void* argument(XLA_FFI_CallFrame* frame, int64_t at) { return ((XLA_FFI_Buffer*)frame->args.args[at])->data; }

static void* result(XLA_FFI_CallFrame* frame, int64_t at) { return ((XLA_FFI_Buffer*)frame->rets.rets[at])->data; }

static int64_t length(const XLA_FFI_Buffer* buffer) {
  int64_t elements = 1;
  for (int64_t axis = 0; axis < buffer->rank; axis++) elements *= buffer->dims[axis];
  return elements;
}

static XLA_FFI_Error* no_memory(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error_Create_Args create = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, "a kernel of nnlearn found no memory",
                                      XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return frame->api->XLA_FFI_Error_Create(&create);
}
