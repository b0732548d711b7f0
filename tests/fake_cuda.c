// A stand-in for libcuda.so.1: "the GPU's memory" is the process's own, and what another process shared is read out of
// that process. Enough for what csrc/ucx/cuda.cpp calls. FAKE_CUDA_COPY_US: how long each copy takes; it is made then,
// by a thread, so that bytes land late where nobody waits for them, and what is unmapped too soon is a crash; FAKE_CUDA_COPIES: how many there are before one fails; FAKE_CUDA_EVENTS: how many are seen before one
// says that the copies failed. What is mapped is counted in the file FAKE_CUDA_MAPPED, so that a test sees what is given back.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { kMaxOpen = 64, kMaxCopies = 1 << 16, kInvalid = 1, kNotReady = 600, kPeer = 400 };
struct Handle {
  uint32_t magic, pid;
  uint64_t base, nbytes;
  char rest[40];
};
struct Open {
  uint64_t here, base, nbytes;
  uint32_t pid, count;
};
struct Event {
  uint64_t after;  // copies
};
struct Copy {
  char* to;
  uint64_t from;
  size_t nbytes;
  double at;
};

static struct Open opened[kMaxOpen];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // of all that is below
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER;
static struct Copy queue[kMaxCopies];
static uint64_t queued, made;
static double busy_until;
static int copies, events;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static int is_next(const char* name, int* count) {
  const char* at = getenv(name);
  return at != NULL && (*count)++ == atoi(at);
}

static void count_mapped(void) {
  const char* path = getenv("FAKE_CUDA_MAPPED");
  if (path == NULL) return;
  unsigned total = 0;
  for (int i = 0; i < kMaxOpen; ++i) total += opened[i].count;
  char part[512];
  snprintf(part, sizeof part, "%s.part", path);
  FILE* file = fopen(part, "w");
  if (file == NULL) return;
  fprintf(file, "%u", total);
  fclose(file);
  rename(part, path);
}

static int move(char* to, uint64_t from, size_t nbytes) {
  for (int i = 0; i < kMaxOpen; ++i) {
    const struct Open* o = &opened[i];
    if (!o->count || from < o->here || from >= o->here + o->nbytes) continue;
    while (nbytes) {
      struct iovec local = {to, nbytes}, remote = {(void*)(from - o->here + o->base), nbytes};
      const ssize_t n = process_vm_readv((pid_t)o->pid, &local, 1, &remote, 1, 0);
      if (n <= 0) return 0;  // its owner died: CUDA reads what is left there
      to += n, from += n, nbytes -= n;
    }
    return 0;
  }
  memcpy(to, (const void*)from, nbytes);
  return 0;
}

static void* make_copies(void* unused) {
  pthread_mutex_lock(&mutex);
  for (;;) {
    while (made == queued) pthread_cond_wait(&asked, &mutex);
    const struct Copy* c = &queue[made % kMaxCopies];
    const double left = c->at - now();
    if (left > 0) {
      pthread_mutex_unlock(&mutex);
      usleep((useconds_t)(left * 1e6) + 1);
      pthread_mutex_lock(&mutex);
      continue;
    }
    move(c->to, c->from, c->nbytes);
    ++made;
  }
  return unused;
}

static int is_made(uint64_t count) {
  pthread_mutex_lock(&mutex);
  const int all = made >= count;
  pthread_mutex_unlock(&mutex);
  return all;
}

int cuInit(unsigned flags) { return flags ? kInvalid : 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < 2 ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(device + 1), 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device < 0; }
int cuCtxSetCurrent(void* context) { return context == NULL; }
int cuCtxSynchronize(void) {
  while (!is_made(queued)) usleep(100);
  return 0;
}
int cuStreamCreate(void** stream, unsigned flags) { return *stream = malloc(1), flags != 1; }
int cuStreamDestroy_v2(void* stream) { return free(stream), 0; }
int cuStreamSynchronize(void* stream) { return (void)stream, cuCtxSynchronize(); }
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t nbytes, void* stream) {
  return (void)stream, memcpy((void*)to, from, nbytes), 0;
}
int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t nbytes, void* stream) {
  cuStreamSynchronize(stream);
  pthread_mutex_lock(&mutex);
  move(to, from, nbytes);
  pthread_mutex_unlock(&mutex);
  return 0;
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t nbytes, void* stream) {
  static pthread_t thread;
  const char* us = getenv("FAKE_CUDA_COPY_US");
  (void)stream;
  if (is_next("FAKE_CUDA_COPIES", &copies)) return kInvalid;
  pthread_mutex_lock(&mutex);
  if (us == NULL) {
    move((char*)to, from, nbytes);
  } else {
    if (!queued) pthread_create(&thread, NULL, make_copies, NULL);
    busy_until = (busy_until > now() ? busy_until : now()) + atof(us) * 1e-6;
    queue[queued++ % kMaxCopies] = (struct Copy){(char*)to, from, nbytes, busy_until};
    pthread_cond_signal(&asked);
  }
  pthread_mutex_unlock(&mutex);
  return 0;
}
int cuMemGetAddressRange_v2(unsigned long long* base, size_t* nbytes, unsigned long long address) {
  *base = address & ~0xfffull;  // as if allocations began at pages
  *nbytes = 1ull << 32;
  return 0;
}
int cuIpcGetMemHandle(struct Handle* handle, unsigned long long address) {
  memset(handle, 0, sizeof *handle);
  handle->magic = 0x1bc, handle->pid = (uint32_t)getpid();
  return cuMemGetAddressRange_v2((unsigned long long*)&handle->base, (size_t*)&handle->nbytes, address);
}
static int open_handle(unsigned long long* base, struct Handle handle, unsigned flags) {
  if (handle.magic != 0x1bc || flags != 1 || handle.pid == (uint32_t)getpid()) return kInvalid;
  struct Open* unused = NULL;
  for (int i = 0; i < kMaxOpen; ++i) {
    struct Open* o = &opened[i];
    if (o->count && o->pid == handle.pid && o->base == handle.base) {
      ++o->count;
      return *base = o->here, count_mapped(), 0;
    }
    if (!o->count) unused = o;
  }
  if (unused == NULL) return kPeer;
  void* here = mmap(NULL, handle.nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (here == MAP_FAILED) return kPeer;
  *unused = (struct Open){(uint64_t)here, handle.base, handle.nbytes, handle.pid, 1};
  return *base = (uint64_t)here, count_mapped(), 0;
}
int cuIpcOpenMemHandle_v2(unsigned long long* base, struct Handle handle, unsigned flags) {
  static int opens;
  if (is_next("FAKE_CUDA_SLOW_OPEN", &opens)) sleep(3);
  pthread_mutex_lock(&mutex);
  const int result = open_handle(base, handle, flags);
  pthread_mutex_unlock(&mutex);
  return result;
}
static int close_handle(unsigned long long base) {
  for (int i = 0; i < kMaxOpen; ++i) {
    struct Open* o = &opened[i];
    if (!o->count || o->here != base) continue;
    if (--o->count == 0) munmap((void*)o->here, o->nbytes);
    return count_mapped(), 0;
  }
  return kInvalid;
}
int cuIpcCloseMemHandle(unsigned long long base) {
  pthread_mutex_lock(&mutex);
  const int result = close_handle(base);
  pthread_mutex_unlock(&mutex);
  return result;
}
int cuEventCreate(struct Event** event, unsigned flags) { return *event = calloc(1, sizeof **event), flags != 2; }
int cuEventRecord(struct Event* event, void* stream) { return (void)stream, event->after = queued, 0; }
int cuEventQuery(struct Event* event) {
  if (!is_made(event->after)) return kNotReady;
  return is_next("FAKE_CUDA_EVENTS", &events) ? kInvalid : 0;
}
int cuEventDestroy_v2(struct Event* event) { return free(event), 0; }
int cuGetErrorString(int result, const char** text) {
  return *text = result == kInvalid ? "invalid argument" : result == 101 ? "invalid device ordinal" : "error", 0;
}
