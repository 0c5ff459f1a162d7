/* CUDA's runtime with one GPU whose kernels do nothing. Its memory is the host's, mapped when it is
 * first touched; copies are done, events have the host's time, graphs remember nothing. What a
 * capture forbids is refused as CUDA refuses it, and said on stderr. See build.py. */
#define _GNU_SOURCE
#define CUDARTAPI
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define OK cudaSuccess
#define PAGE(n) (((n) ? (n) : 1) + 4095 & ~(size_t)4095)

struct CUstream_st { int priority, capturing; unsigned long long id; };
struct CUevent_st { double ms; int recorded; cudaStream_t captured; };

static unsigned long long launched, captures;
static __thread cudaError_t last;
static __thread cudaStream_t capturing; /* this thread's, while it captures */
static __thread int mode = cudaStreamCaptureModeGlobal;

/* How many kernels, copies and graphs were launched so far; for whoever counts them. */
unsigned long long hollow_launches(void) { return launched; }

static cudaError_t refuse(cudaError_t error, const char *what) {
    if (capturing) capturing->capturing = -1; /* invalid from here on */
    fprintf(stderr, "hollow CUDA: %s\n", what);
    return last = error;
}

void hollow_launch(cudaStream_t stream) {
    __atomic_add_fetch(&launched, 1, __ATOMIC_RELAXED);
    if (capturing && stream != capturing && !(stream && stream->capturing))
        fprintf(stderr, "hollow CUDA: a launch beside the capture: it would not be replayed\n");
}

static cudaError_t waits(const char *what) {
    return capturing && mode != cudaStreamCaptureModeRelaxed
        ? refuse(cudaErrorStreamCaptureUnsupported, what) : OK;
}

/* --- memory ------------------------------------------------------------------------------------ */

struct block { char *start; size_t size; int host; };
static const size_t total = (size_t)80 << 30;
static struct block blocks[1 << 20];
static size_t count, used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static cudaError_t take(void **out, size_t size, int host) {
    void *start = mmap(0, PAGE(size), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pthread_mutex_lock(&lock);
    blocks[count++] = (struct block){start, PAGE(size), host};
    used += host ? 0 : PAGE(size);
    pthread_mutex_unlock(&lock);
    *out = start;
    return OK;
}

static size_t forget(void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = count; i-- > 0;)
        if (blocks[i].start == start) {
            size = blocks[i].size;
            used -= blocks[i].host ? 0 : size;
            blocks[i] = blocks[--count];
            break;
        }
    pthread_mutex_unlock(&lock);
    return size;
}

static int kind_of(const void *pointer) {
    int kind = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++)
        if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size)
            kind = blocks[i].host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    pthread_mutex_unlock(&lock);
    return kind;
}

static cudaError_t release(void *start) {
    size_t size = start ? forget(start) : 0;
    if (size) munmap(start, size);
    return OK;
}

cudaError_t cudaMalloc(void **out, size_t size) {
    if (waits("memory is allocated in a capture")) return last;
    return used + size > total ? (last = cudaErrorMemoryAllocation) : take(out, size, 0);
}
cudaError_t cudaFree(void *start) { return waits("memory is freed in a capture") ? last : release(start); }
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned flags) { return take(out, size, 1); }
cudaError_t cudaFreeHost(void *start) { return release(start); }
cudaError_t cudaHostUnregister(void *start) { forget(start); return OK; }
cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) {
    pthread_mutex_lock(&lock);
    blocks[count++] = (struct block){start, size, 1};
    pthread_mutex_unlock(&lock);
    return OK;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *all) { *all = total; *free = total - used; return OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
    memset(out, 0, sizeof *out);
    out->type = kind_of(pointer);
    out->device = out->type ? 0 : cudaInvalidDeviceId;
    out->devicePointer = out->hostPointer = (void *)pointer;
    return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (waits("a copy waits in a capture")) return last;
    memmove(to, from, size);
    return OK;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    if (capturing && stream == capturing && !(kind_of(to) && kind_of(from)))
        return refuse(cudaErrorStreamCaptureUnsupported, "pageable memory is copied in a capture");
    memmove(to, from, size);
    hollow_launch(stream);
    return OK;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
    for (size_t i = 0; i < height; i++)
        memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    hollow_launch(stream);
    return OK;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return OK; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    memset(to, value, size);
    hollow_launch(stream);
    return OK;
}

/* --- the device -------------------------------------------------------------------------------- */

/* By the driver's numbers: threads a block, shared memory, warp, multiprocessors, 9.0, registers. */
int hollow_attribute(int which) {
    switch (which) {
    case 1: return 1024;
    case 8: return 49152;
    case 10: return 32;
    case 12: case 82: return 65536;
    case 13: return 1755000;
    case 16: return 132;
    case 36: return 2619000;
    case 37: return 5120;
    case 38: return 52428800;
    case 39: return 2048;
    case 75: return 9;
    case 81: return 233472;
    case 95: return 1;
    case 97: return 232448;
    case 106: return 32;
    default: return 0;
    }
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    memset(out, 0, sizeof *out);
    strcpy(out->name, "NVIDIA H100 80GB HBM3");
    out->totalGlobalMem = total;
    out->major = 9;
    out->multiProcessorCount = 132;
    out->warpSize = 32;
    out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
    out->maxThreadsDim[2] = 64;
    out->maxGridSize[0] = 2147483647;
    out->maxGridSize[1] = out->maxGridSize[2] = 65535;
    out->maxThreadsPerMultiProcessor = 2048;
    out->sharedMemPerBlock = 49152;
    out->sharedMemPerBlockOptin = 232448;
    out->sharedMemPerMultiprocessor = 233472;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->l2CacheSize = 52428800;
    out->unifiedAddressing = out->cooperativeLaunch = 1;
    out->memoryBusWidth = 5120;
    out->textureAlignment = 512;
    return OK;
}
cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr which, int device) {
    *out = hollow_attribute((int)which);
    return OK;
}
cudaError_t cudaGetDeviceCount(int *out) { *out = 1; return OK; }
cudaError_t cudaGetDevice(int *out) { *out = 0; return OK; }
cudaError_t cudaDeviceCanAccessPeer(int *out, int a, int b) { *out = 0; return OK; }
cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device) {
    snprintf(out, size, "0000:01:00.0");
    return OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return OK; }
cudaError_t cudaDeviceSynchronize(void) { return waits("a capture waits for the device"); }
cudaError_t cudaDriverGetVersion(int *out) { *out = CUDART_VERSION; return OK; }
cudaError_t cudaRuntimeGetVersion(int *out) { *out = CUDART_VERSION; return OK; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    *out = dlsym(driver, name);
    if (!*out) *out = dlsym(driver, "hollow_nothing");
    if (result) *result = cudaDriverEntryPointSuccess;
    return OK;
}
const char *cudaGetErrorName(cudaError_t error) { return "hollowError"; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory"
        : error == cudaErrorStreamCaptureUnsupported
        ? "operation not permitted when stream is capturing"
        : error == cudaErrorStreamCaptureInvalidated
        ? "operation failed due to a previous error during capture" : "an error of the hollow runtime";
}
cudaError_t cudaGetLastError(void) { cudaError_t error = last; last = OK; return error; }
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetSymbolAddress(void **out, const void *symbol) {
    static char zeros[1 << 16];
    *out = zeros;
    return OK;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *out) {
    *(unsigned long long *)out = 0;
    return OK;
}

/* --- streams, events, graphs --------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) {
    *out = calloc(1, sizeof **out);
    (*out)->priority = priority;
    return OK;
}
cudaError_t cudaStreamCreate(cudaStream_t *out) { return cudaStreamCreateWithPriority(out, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *out) {
    *out = stream ? stream->priority : 0;
    return OK;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream && stream->capturing
        ? refuse(cudaErrorStreamCaptureUnsupported, "a capturing stream is asked") : OK;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return stream && stream->capturing
        ? refuse(cudaErrorStreamCaptureUnsupported, "a capturing stream is waited for")
        : waits("a capture waits for a stream");
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode asked) {
    if (!stream || stream->capturing)
        return refuse(cudaErrorStreamCaptureUnsupported, "this stream cannot capture");
    stream->capturing = 1;
    stream->id = __atomic_add_fetch(&captures, 1, __ATOMIC_RELAXED);
    capturing = stream;
    return OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    if (!stream->capturing) return refuse(cudaErrorStreamCaptureUnsupported, "nothing is captured");
    int valid = stream->capturing > 0;
    stream->capturing = 0;
    capturing = 0;
    *out = 0;
    if (!valid) return last = cudaErrorStreamCaptureInvalidated;
    *out = calloc(1, 8);
    return OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *size) {
    static char nothing[8];
    int active = stream && stream->capturing;
    *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = stream ? stream->id : 0;
    if (graph) *graph = (cudaGraph_t)nothing;
    if (size) *size = 0;
    return OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return cudaStreamGetCaptureInfo(stream, status, 0, 0, 0, 0, 0);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *other) {
    int before = mode;
    mode = *other;
    *other = before;
    return OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data,
                                  unsigned flags) {
    call(stream, OK, data);
    return OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    call(data);
    return OK;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
    *out = calloc(1, sizeof **out);
    return OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *out) { return cudaEventCreateWithFlags(out, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return OK; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->ms = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    event->recorded = 1;
    event->captured = stream && stream->capturing ? stream : 0;
    return OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    if (event->captured && event->captured->capturing && event->captured != stream)
        return refuse(cudaErrorStreamCaptureIsolation, "a stream waits for another's capture");
    return OK;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return waits("an event is asked in a capture"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waits("a capture waits for an event"); }
cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t start, cudaEvent_t end) {
    if (!start->recorded || !end->recorded)
        return refuse(cudaErrorInvalidResourceHandle, "an event was never recorded");
    *out = end->ms - start->ms > 1e-3 ? end->ms - start->ms : 1e-3;
    return OK;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                          unsigned long long flags) {
    *out = calloc(1, 8);
    return OK;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return OK; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return OK; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *out, size_t *size) {
    *size = 1; /* torch warns of empty ones */
    return OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    hollow_launch(stream);
    return OK;
}

/* --- kernels ----------------------------------------------------------------------------------- */

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function) {
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 64;
    out->binaryVersion = out->ptxVersion = 90;
    out->maxDynamicSharedSizeBytes = 232448;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *out, const void *function,
                                                          int threads, size_t shared) {
    *out = 2;
    return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *function,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
    *out = 2;
    return OK;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
    hollow_launch(stream);
    return OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t stream) {
    hollow_launch(stream);
    return OK;
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block,
                                        void **arguments, size_t shared, cudaStream_t stream) {
    hollow_launch(stream);
    return OK;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                void **arguments) {
    hollow_launch(config->stream);
    return OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function) {
    *out = (cudaKernel_t)function;
    return OK;
}
char __cudaInitModule(void **handle) { return 1; }
void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    return handle;
}
/* What <<<...>>> compiles to: the launch's shape waits here for the stub that launches it. */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed[64];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed[depth].grid = grid;
    pushed[depth].block = block;
    pushed[depth].shared = shared;
    pushed[depth++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed[--depth].grid;
    *block = pushed[depth].block;
    *shared = pushed[depth].shared;
    *(void **)stream = pushed[depth].stream;
    return OK;
}
