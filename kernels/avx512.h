// What the kernels for CPUs with AVX-512 share.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <utility>

constexpr int LANES = 16;

// Call f(0), …, f(N - 1) with constants: arrays of vectors so indexed stay in registers. (Loops are unrolled too late.)
template <int... I, typename F>
[[gnu::always_inline]] inline void each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
[[gnu::always_inline]] inline void each(F&& f) {
  each(std::make_integer_sequence<int, N>{}, f);
}

// Sixteen values as fp32, the first of them where `some` are wanted and zeros beyond.
inline __m512 widen(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 widen(const float* x, __mmask16 some) { return _mm512_maskz_loadu_ps(some, x); }
inline __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline __m512 widen(const at::BFloat16* x) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline __m512 widen(const at::BFloat16* x, __mmask16 some) { return widen(_mm256_maskz_loadu_epi16(some, x)); }

// Sixteen values to memory, or as many as `some` has; in bf16 to nearest, ties to even.
inline void narrow(__m512 y, float* to, __mmask16 some = 0xffff) { _mm512_mask_storeu_ps(to, some, y); }
inline void narrow(__m512 y, at::BFloat16* to, __mmask16 some = 0xffff) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

// 2^x for x < 127: degree 2 (within 0.2 %) or 3 is enough where the result is rounded to 8 bits, degree 6 for fp32.
template <int DEGREE>
inline __m512 exp2_(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less the next lower whole
  __m512 p;
  if constexpr (DEGREE == 2) {
    p = _mm512_set1_ps(0.33718943f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.65763628f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0017248f));
  } else if constexpr (DEGREE == 3) {
    p = _mm512_set1_ps(0.078024523f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22606716f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583354f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
  } else {
    static_assert(DEGREE == 6);
    p = _mm512_set1_ps(0.00021702255f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0012439688f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009678841f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055483342f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022984f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314698f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  }
  return _mm512_scalef_ps(p, x);  // which takes the next lower whole itself
}
