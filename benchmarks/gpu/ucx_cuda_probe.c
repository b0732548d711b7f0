// What UCX's one-sided operations do on device memory between two processes: which transport carries them with and
// without peer error handling, how fast, what becomes of them when the owner of the memory dies or stops amid reads,
// and whether the dead owner's device memory stays taken. Without -DCUDA the same on host memory.
//
//   ucx_cuda_probe peer|none OWNER_DEVICE READER_DEVICE speed|kill|stop|ipc
//
// Build and run: benchmarks/gpu/ucx_cuda_probe.sh. Findings: docs/design/transport.md.
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <ucp/api/ucp.h>
#include <unistd.h>
#ifdef CUDA
#include <cuda_runtime_api.h>
#define MEMORY UCS_MEMORY_TYPE_CUDA
#define TOTAL (1024 * MIB)
#else
#define MEMORY UCS_MEMORY_TYPE_HOST
#define TOTAL (256 * MIB)
#endif

#define MIB (1ull << 20)
#define CHECK(call)                                                                          \
  do {                                                                                       \
    int status_ = (int)(call);                                                               \
    if (status_ != 0) printf("%s:%d %s -> %d\n", __FILE__, __LINE__, #call, status_), exit(1); \
  } while (0)

static ucp_context_h context;
static ucp_worker_h worker;
static volatile int errors, finished, failed;
static double error_at, last_done_at;

struct Hello {
  uint64_t address, address_nbytes, key_nbytes;
  char worker_address[2048], key[512];
#ifdef CUDA
  cudaIpcMemHandle_t ipc;
#endif
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static char* memory(int device, size_t nbytes, int value) {
  char* p = NULL;
#ifdef CUDA
  CHECK(cudaSetDevice(device));
  CHECK(cudaMalloc((void**)&p, nbytes));
  CHECK(cudaMemset(p, value, nbytes));
  CHECK(cudaDeviceSynchronize());
#else
  (void)device;
  p = aligned_alloc(4096, nbytes);
  memset(p, value, nbytes);
#endif
  return p;
}

static int first_byte(const char* p) {
  unsigned char c = 0;
#ifdef CUDA
  CHECK(cudaMemcpy(&c, p, 1, cudaMemcpyDeviceToHost));
#else
  c = *p;
#endif
  return c;
}

static double free_mib(int device) {  // of the device, whoever holds the rest
#ifdef CUDA
  size_t free_nbytes = 0, total = 0;
  CHECK(cudaSetDevice(device));
  CHECK(cudaMemGetInfo(&free_nbytes, &total));
  return free_nbytes / (double)MIB;
#else
  (void)device;
  return 0;
#endif
}

static void open_ucx(void) {
  ucp_config_t* config;
  ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES, .features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP};
  ucp_worker_params_t wp = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE, .thread_mode = UCS_THREAD_MODE_SINGLE};
  CHECK(ucp_config_read(NULL, NULL, &config));
  CHECK(ucp_init(&params, config, &context));
  ucp_config_release(config);
  CHECK(ucp_worker_create(context, &wp, &worker));
}

static ucp_mem_h map(void* address, size_t nbytes) {
  ucp_mem_h handle;
  ucp_mem_map_params_t p = {.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                                          UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
                            .address = address, .length = nbytes, .memory_type = MEMORY};
  CHECK(ucp_mem_map(context, &p, &handle));
  return handle;
}

static void own(int fd, int device) {  // the owner: memory, address, key; then progress until killed
  static struct Hello hello;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  char* p = memory(device, TOTAL, 0x5a);
  open_ucx();
  ucp_mem_h handle = map(p, TOTAL);
  void *key, *address;
  CHECK(ucp_rkey_pack(context, handle, &key, &hello.key_nbytes));
  CHECK(ucp_worker_get_address(worker, (ucp_address_t**)&address, &hello.address_nbytes));
  if (hello.key_nbytes > sizeof hello.key || hello.address_nbytes > sizeof hello.worker_address) exit(2);
  memcpy(hello.key, key, hello.key_nbytes);
  memcpy(hello.worker_address, address, hello.address_nbytes);
  hello.address = (uint64_t)p;
#ifdef CUDA
  CHECK(cudaIpcGetMemHandle(&hello.ipc, p));
#endif
  if (write(fd, &hello, sizeof hello) != sizeof hello) exit(2);
  for (;;) {
    if (!ucp_worker_progress(worker)) usleep(20);
  }
}

static void on_error(void* arg, ucp_ep_h ep, ucs_status_t status) {
  (void)arg, (void)ep;
  if (!errors++) error_at = now();
  printf("  error handler: %s\n", ucs_status_string(status));
}

static void on_done(void* request, ucs_status_t status, void* data) {
  (void)data;
  ++finished;
  failed += status != UCS_OK;
  last_done_at = now();
  ucp_request_free(request);
}

static void post(ucp_ep_h ep, int put, char* local, size_t nbytes, uint64_t remote, ucp_rkey_h key, ucp_mem_h handle) {
  ucp_request_param_t p = {.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_MEMORY_TYPE |
                                           UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_USER_DATA,
                           .cb.send = on_done, .memory_type = MEMORY, .memh = handle};
  void* r = put ? ucp_put_nbx(ep, local, nbytes, remote, key, &p) : ucp_get_nbx(ep, local, nbytes, remote, key, &p);
  if (!UCS_PTR_IS_PTR(r)) ++finished, failed += r != NULL, last_done_at = now();
}

static double wait_for(int count, double seconds) {
  const double until = now() + seconds;
  while (finished < count && now() < until) ucp_worker_progress(worker);
  return now();
}

static void flush(ucp_ep_h ep) {
  ucp_request_param_t p = {0};
  void* r = ucp_ep_flush_nbx(ep, &p);
  if (!UCS_PTR_IS_PTR(r)) return;
  while (ucp_request_check_status(r) == UCS_INPROGRESS) ucp_worker_progress(worker);
  ucp_request_free(r);
}

static void speed(ucp_ep_h ep, char* local, uint64_t remote, ucp_rkey_h key, ucp_mem_h handle) {
  static const size_t sizes[] = {16, 64 << 10, MIB, 2 * MIB, 8 * MIB, 16 * MIB, 64 * MIB, 256 * MIB};
  for (int put = 0; put < 2; ++put) {
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; ++s) {
      const size_t n = sizes[s], batch = n * 64 > TOTAL ? TOTAL / n : 64;
      double best = 1e9, piped = 1e9;
      for (int i = 0; i < 12; ++i) {
        finished = failed = 0;
        const double t0 = now();
        post(ep, put, local, n, remote, key, handle);
        wait_for(1, 5);
        if (put) flush(ep);
        const double t1 = now();
        finished = 0;
        for (size_t b = 0; b < batch && i < 6; ++b) post(ep, put, local + b * n, n, remote + b * n, key, handle);
        if (i < 6) wait_for(batch, 5);
        if (put) flush(ep);
        const double t2 = now();
        if (i > 1 && t1 - t0 < best) best = t1 - t0;
        if (i > 1 && i < 6 && t2 - t1 < piped) piped = t2 - t1;
      }
      printf("  %s %9.3f MiB  one %9.1f us %7.1f GB/s   %2zu at once %7.1f GB/s  %s\n", put ? "put" : "get",
             n / (double)MIB, best * 1e6, n / best / 1e9, batch, batch * n / piped / 1e9, failed ? "FAILED" : "");
    }
    if (!put) printf("  bytes are the owner's: %s\n", first_byte(local) == 0x5a ? "yes" : "NO");
  }
  // asleep on the event descriptor, as a progress thread that has nothing to do
  int fd, naps = 0;
  CHECK(ucp_worker_get_efd(worker, &fd));
  double worst = 0, sum = 0;
  for (int i = 0; i < 20; ++i) {
    finished = 0;
    const double t0 = now();
    post(ep, 0, local, 16 * MIB, remote, key, handle);
    while (finished < 1) {
      if (ucp_worker_progress(worker)) continue;
      struct pollfd p = {fd, POLLIN, 0};
      if (ucp_worker_arm(worker) == UCS_OK) naps += poll(&p, 1, 1000) >= 0;
    }
    const double t = now() - t0;
    sum += t, worst = t > worst ? t : worst;
  }
  printf("  get 16 MiB asleep on the descriptor: mean %.1f us, worst %.1f us, %d naps\n", sum / 20 * 1e6, worst * 1e6,
         naps);
}

// Reads under way while the owner is killed (or stopped): what ends them, and when.
static void lose(ucp_ep_h ep, int sig, pid_t owner, char* local, uint64_t remote, ucp_rkey_h key, ucp_mem_h handle) {
  const size_t n = 64 * MIB;
  const int count = 512;
  for (int i = 0; i < count; ++i) post(ep, 0, local + i % 4 * n, n, remote + i % 4 * n, key, handle);
  const double warm = now() + 0.004;
  while (now() < warm) ucp_worker_progress(worker);
  const int before = finished;
  const double t0 = now();
  kill(owner, sig);
  if (sig == SIGKILL) waitpid(owner, NULL, 0);
  wait_for(count, 4);
  printf("  %s amid %d reads of 64 MiB (%d ended before): %d ended (%d failed), the last after %.1f ms\n",
         sig == SIGKILL ? "killed" : "stopped", count, before, finished, failed, (last_done_at - t0) * 1e3);
  const double until = now() + 1;
  while (!errors && now() < until) ucp_worker_progress(worker);
  if (errors) printf("  error handler called after %.1f ms\n", (error_at - t0) * 1e3);
  if (!errors) printf("  error handler not called within %.0f ms\n", (now() - t0) * 1e3);
  const int ended = finished, lost = failed;
  if (finished == count) {
    for (int i = 0; i < 4; ++i) post(ep, 0, local, n, remote, key, handle);
    wait_for(count + 4, 2);
    printf("  4 reads after that: %d ended, %d failed\n", finished - ended, failed - lost);
  }
}

int main(int argc, char** argv) {
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (argc != 5) return fprintf(stderr, "usage: peer|none OWNER_DEVICE READER_DEVICE speed|kill|stop|ipc\n"), 2;
  const int peer = !strcmp(argv[1], "peer"), theirs = atoi(argv[2]), ours = atoi(argv[3]);
  int fds[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds));
  const pid_t owner = fork();  // before CUDA or UCX begin
  if (owner == 0) own(fds[1], theirs);
  char* local = memory(ours, TOTAL, 0);
  open_ucx();
  ucp_mem_h handle = map(local, TOTAL);
  static struct Hello hello;
  if (recv(fds[0], &hello, sizeof hello, MSG_WAITALL) != sizeof hello) return printf("no owner\n"), 1;
  const double with_owner = free_mib(theirs);
  free_mib(ours);
  printf("%s, %s, devices %d -> %d, key of %zu bytes\n", argv[4], argv[1], theirs, ours, (size_t)hello.key_nbytes);
#ifdef CUDA
  if (!strcmp(argv[4], "ipc")) {  // the same without UCX: opened, copied and closed by hand
    void* mapped;
    double t0 = now();
    CHECK(cudaIpcOpenMemHandle(&mapped, hello.ipc, cudaIpcMemLazyEnablePeerAccess));
    printf("  opened in %.2f ms\n", (now() - t0) * 1e3);
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
    for (size_t n = 2 * MIB; n <= 256 * MIB; n *= 4) {
      double best = 1e9;
      for (int i = 0; i < 6; ++i) {
        t0 = now();
        for (size_t at = 0; at + n <= TOTAL; at += n)
          CHECK(cudaMemcpyAsync(local + at, (char*)mapped + at, n, cudaMemcpyDefault, stream));
        CHECK(cudaStreamSynchronize(stream));
        best = now() - t0 < best ? now() - t0 : best;
      }
      printf("  cudaMemcpyAsync of 1 GiB in pieces of %3zu MiB: %.1f GB/s\n", (size_t)(n / MIB), (double)TOTAL / best / 1e9);
    }
    kill(owner, SIGKILL);
    waitpid(owner, NULL, 0);
    usleep(500000);
    const double dead = free_mib(theirs);
    free_mib(ours);
    printf("  copy after its death: %d\n", (int)cudaMemcpy(local, mapped, MIB, cudaMemcpyDefault));
    t0 = now();
    const int closed = cudaIpcCloseMemHandle(mapped);
    const double close_ms = (now() - t0) * 1e3;
    usleep(200000);
    printf("  free on the owner's device: %.0f MiB alive, %.0f dead, %.0f after close (%d, %.2f ms)\n", with_owner, dead,
           free_mib(theirs), closed, close_ms);
    return 0;
  }
#endif
  ucp_ep_h ep;
  ucp_ep_params_t ep_params = {.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS |
                                             UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER,
                               .address = (ucp_address_t*)hello.worker_address,
                               .err_mode = peer ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE,
                               .err_handler.cb = on_error};
  CHECK(ucp_ep_create(worker, &ep_params, &ep));
  ucp_rkey_h key;
  CHECK(ucp_ep_rkey_unpack(ep, hello.key, &key));
  post(ep, 0, local, 4096, hello.address, key, handle);
  wait_for(1, 5);
  flush(ep);
  printf("  first read: %d ended, %d failed\n", finished, failed);
  ucp_ep_print_info(ep, stdout);
  finished = failed = 0;
  if (!strcmp(argv[4], "speed")) {
    speed(ep, local, hello.address, key, handle);
    return 0;
  }
  lose(ep, strcmp(argv[4], "kill") ? SIGSTOP : SIGKILL, owner, local, hello.address, key, handle);
  usleep(300000);
  double held[4] = {free_mib(theirs)};
  free_mib(ours);
  int ended = finished;
  double t0 = now();
  ucp_rkey_destroy(key);
  ucp_request_param_t force = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
  if (peer) {
    void* r = ucp_ep_close_nbx(ep, &force);
    const double until = now() + 3;
    while (UCS_PTR_IS_PTR(r) && ucp_request_check_status(r) == UCS_INPROGRESS && now() < until) {
      ucp_worker_progress(worker);
    }
    const int open = UCS_PTR_IS_PTR(r) && ucp_request_check_status(r) == UCS_INPROGRESS;
    printf("  endpoint %s after %.1f ms", open ? "NOT closed" : "closed by force", (now() - t0) * 1e3);
    wait_for(512, 3);
    printf(", %d operations ended after %.1f ms, %d of all failed\n", finished - ended, (now() - t0) * 1e3, failed);
  }
  held[1] = free_mib(theirs);
  free_mib(ours);
  ended = finished;
  t0 = now();
  ucp_worker_destroy(worker);
  printf("  worker destroyed in %.1f ms; it ended %d operations, %d of all failed\n", (now() - t0) * 1e3,
         finished - ended, failed);
  held[2] = free_mib(theirs);
  free_mib(ours);
  ucp_mem_unmap(context, handle);
  ucp_cleanup(context);
  held[3] = free_mib(theirs);
  printf("  free on the owner's device, MiB: %.0f alive, %.0f then, %.0f endpoint closed, %.0f worker, %.0f context\n",
         with_owner, held[0], held[1], held[2], held[3]);
  kill(owner, SIGKILL);
  return 0;
}
