/* cuDNN: one engine for every graph, which needs no workspace and has no notes. */
#include <stdlib.h>
#include <string.h>

int cudnnGetProperty(int which, int *out) { *out = which == 0 ? 9 : which == 1 ? 99 : 0; return 0; }
size_t cudnnGetVersion(void) { return 99900; }
size_t cudnnGetCudartVersion(void) { return 13000; }
const char *cudnnGetErrorString(int error) { return "an error of the hollow cuDNN"; }
int cudnnCreate(void **out) { *out = calloc(1, 64); return 0; }
int cudnnGetStream(void *handle, void **out) { *out = 0; return 0; }
int cudnnBackendCreateDescriptor(int kind, void **out) { *out = calloc(1, 64); return 0; }

enum { HANDLE = 0, INT64 = 3, VOID_PTR = 6, DESCRIPTOR = 15, CHAR = 20 };
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long long asked, long long *count,
                             void *out) {
    int notes = type > VOID_PTR && type < CHAR && type != DESCRIPTOR;
    if (count) *count = notes ? 0 : 1;
    if (!out || asked <= 0 || notes || type == HANDLE || type == VOID_PTR || type == DESCRIPTOR)
        return 0;
    memset(out, 0, type == INT64 ? 8 : type == CHAR ? 1 : 4);
    return 0;
}
