/* cuBLAS and cuBLASLt: every product is one that does nothing. */
#include <stdlib.h>
#include <string.h>

int cublasCreate_v2(void **out) { *out = calloc(1, 64); return 0; }
int cublasGetPointerMode_v2(void *handle, int *out) { *out = 0; return 0; }
int cublasGetMathMode(void *handle, int *out) { *out = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(void **out, int compute, int scale) { *out = calloc(1, 64); return 0; }
int cublasLtMatmulPreferenceCreate(void **out) { *out = calloc(1, 64); return 0; }
int cublasLtMatrixLayoutCreate(void **out, int type, unsigned long long rows,
                               unsigned long long columns, long long stride) {
    *out = calloc(1, 64);
    return 0;
}
struct found { unsigned long long algorithm[8]; size_t workspace; int state; float waves; int rest[4]; };
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *preference, int asked, struct found *out, int *count) {
    memset(out, 0, sizeof *out * asked);
    *count = 1;
    return 0;
}
