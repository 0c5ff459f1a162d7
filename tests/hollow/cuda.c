/* The driver's part of it, which Triton and torch's compiled code call: modules load, kernels are
 * launched and do nothing. */
#include <stdlib.h>

int hollow_attribute(int which);
void hollow_launch(void *stream);

int hollow_nothing(void) { return 0; }
int cuDeviceGetAttribute(int *out, int which, int device) { *out = hollow_attribute(which); return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = (void *)1; return 0; }
int cuCtxGetCurrent(void **out) { *out = (void *)1; return 0; }
int cuCtxGetLimit(size_t *out, int which) { *out = 1 << 20; return 0; }
int cuGetErrorString(int error, const char **out) { *out = "an error of the hollow driver"; return 0; }
int cuModuleLoad(void **out, const char *file) { *out = calloc(1, 8); return 0; }
int cuModuleLoadData(void **out, const void *image) { *out = calloc(1, 8); return 0; }
int cuModuleLoadDataEx(void **out, const void *image, unsigned n, void *options, void *values) {
    *out = calloc(1, 8);
    return 0;
}
int cuModuleGetFunction(void **out, void *module, const char *name) { *out = calloc(1, 8); return 0; }
/* 0: the most threads a block; 4: registers a thread. */
int cuFuncGetAttribute(int *out, int which, void *function) {
    *out = which == 0 ? 1024 : which == 4 ? 64 : 0;
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
    hollow_launch(stream);
    return 0;
}
int cuLaunchCooperativeKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned shared, void *stream,
                              void **arguments) {
    hollow_launch(stream);
    return 0;
}
struct config { unsigned gx, gy, gz, bx, by, bz, shared; void *stream, *attributes; unsigned n; };
int cuLaunchKernelEx(struct config *config, void *function, void **arguments, void **extra) {
    hollow_launch(config->stream);
    return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, void *function, int threads, size_t shared) {
    *out = 2;
    return 0;
}
int cuOccupancyMaxActiveClusters(int *out, void *function, void *config) { *out = 16; return 0; }
/* Memory's type (2: of the device), or the address itself. */
int cuPointerGetAttribute(void *out, int which, unsigned long long pointer) {
    if (which == 2) *(unsigned *)out = 2;
    else if (which == 9) *(int *)out = 0;
    else *(unsigned long long *)out = pointer;
    return 0;
}
