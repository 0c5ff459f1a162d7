// What the kernels for CPUs with AVX-512 share.

#pragma once

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

// 2^x for x <= 8: degree 3 is enough where the result is rounded to 8 bits, degree 6 for fp32.
template <bool COARSE>
inline __m512 exp2_(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p;
  if constexpr (COARSE) {
    p = _mm512_set1_ps(0.055826318f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24013971f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69314721f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  } else {
    p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  }
  return _mm512_scalef_ps(p, whole);
}
