// Group normalisation and SiLU on CPUs with AVX-512, for maps that are channels-last: memory is read twice (fp32 or
// bf16) and written once, in the type that the next layer reads (fp32, bf16 or uint8).
//
// Sums are taken of x less its channel's first pixel, so that a mean far from zero costs no digits, in fp32 over 64
// pixels and in double beyond.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "avx512.h"

namespace {

constexpr int64_t BLOCK = 64;  // pixels that are summed in fp32
constexpr int WIDE = 8;        // vectors of channels that are summed side by side

// sums[0..C), squares[0..C) += over `count` pixels of N vectors of channels.
template <int N, typename In>
void add_block(const In* x, int64_t channels, int64_t count, const float* shift, double* sums, double* squares) {
  __m512 from[N], sum[N], square[N];
  each<N>([&](auto n) {
    from[n] = _mm512_loadu_ps(shift + n * LANES);
    sum[n] = square[n] = _mm512_setzero_ps();
  });
  for (int64_t p = 0; p < count; ++p, x += channels)
    each<N>([&](auto n) {
      const __m512 d = _mm512_sub_ps(widen(x + n * LANES), from[n]);
      sum[n] = _mm512_add_ps(sum[n], d);
      square[n] = _mm512_fmadd_ps(d, d, square[n]);
    });
  const auto add = [](double* to, __m512 v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), low));
    _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), high));
  };
  each<N>([&](auto n) {
    add(sums + n * LANES, sum[n]);
    add(squares + n * LANES, square[n]);
  });
}

template <typename In>
void add_pixels(const In* x, int64_t channels, int64_t count, const float* shift, double* sums, double* squares) {
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t here = std::min(BLOCK, count - first);
    const In* block = x + first * channels;
    int64_t c = 0;
    for (; c + WIDE * LANES <= channels; c += WIDE * LANES)
      add_block<WIDE>(block + c, channels, here, shift + c, sums + c, squares + c);
    for (; c < channels; c += LANES) add_block<1>(block + c, channels, here, shift + c, sums + c, squares + c);
  }
}

// y = x * scale + offset of each channel, so that every group of x + added has mean 0 and variance 1 before weight and
// bias; added may be null.
void solve(const double* sums, const double* squares, const float* shift, const float* added, const float* weight,
           const float* bias, int64_t channels, int64_t pixels, int64_t groups, double eps, float* scale,
           float* offset) {
  const auto from = [&](int64_t c) { return static_cast<double>(shift[c]) + (added ? added[c] : 0.0f); };
  const int64_t wide = channels / groups;
  const double n = static_cast<double>(pixels);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * wide, end = begin + wide;
    double mean = 0, variance = 0;
    for (int64_t c = begin; c < end; ++c) mean += sums[c] / n + from(c);
    mean /= static_cast<double>(wide);
    for (int64_t c = begin; c < end; ++c) {
      const double away = mean - from(c);
      variance += (squares[c] - 2 * away * sums[c]) / n + away * away;
    }
    variance /= static_cast<double>(wide);
    const double inverse = 1 / std::sqrt(std::max(variance, 0.0) + eps);
    for (int64_t c = begin; c < end; ++c) {
      const double s = weight[c] * inverse;
      scale[c] = static_cast<float>(s);
      offset[c] = static_cast<float>(bias[c] - (mean - (added ? added[c] : 0.0f)) * s);
    }
  }
}

template <bool SILU, int DEGREE>
inline __m512 activate(__m512 y) {
  if constexpr (!SILU) return y;
  // y / (1 + 2^(-y log2 e)); the exponent is held below where 2^x overflows
  const __m512 power = _mm512_min_ps(_mm512_mul_ps(y, _mm512_set1_ps(-1.4426950408889634f)), _mm512_set1_ps(126.0f));
  const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_<DEGREE>(power));
  __m512 inverse = _mm512_rcp14_ps(below);
  inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2.0f)));
  return _mm512_mul_ps(y, inverse);
}

inline void store(float* to, __m512 y, __m512, __m512i) { _mm512_storeu_ps(to, y); }

inline void store(at::BFloat16* to, __m512 y, __m512, __m512i) { narrow(y, to); }

inline void store(uint8_t* to, __m512 y, __m512 multiplier, __m512i zero) {
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(y, multiplier)), zero);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512())));
}

template <bool SILU, typename In, typename Out>
void write_pixels(const In* x, int64_t channels, int64_t count, const float* scale, const float* offset,
                  const float* multiplier, int zero, Out* to) {
  const __m512i zeros = _mm512_set1_epi32(zero);
  for (int64_t p = 0; p < count; ++p, x += channels, to += channels)
    for (int64_t c = 0; c < channels; c += LANES) {
      const __m512 y = _mm512_fmadd_ps(widen(x + c), _mm512_loadu_ps(scale + c), _mm512_loadu_ps(offset + c));
      store(to + c, activate<SILU, sizeof(Out) == 1 ? 3 : 6>(y), multiplier ? _mm512_loadu_ps(multiplier + c) : y, zeros);
    }
}

// added: a row of channels for each of the batch, `added_stride` apart, or null.
template <bool SILU, typename In, typename Out>
void normalise(const In* x, int64_t batch, int64_t channels, int64_t pixels, const float* added, int64_t added_stride,
               const float* weight, const float* bias, int64_t groups, double eps, const float* multiplier, int zero,
               Out* to) {
  const int64_t chunks = std::min<int64_t>(pixels, at::get_num_threads());
  const auto first = [&](int64_t chunk) { return pixels * chunk / chunks; };
  std::vector<double> partial(batch * chunks * 2 * channels, 0.0);
  std::vector<float> shift(batch * channels);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c) shift[b * channels + c] = static_cast<float>(x[b * pixels * channels + c]);
  at::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const In* picture = x + i / chunks * pixels * channels;
      const int64_t from = first(i % chunks), until = first(i % chunks + 1);
      double* sums = partial.data() + i * 2 * channels;
      add_pixels(picture + from * channels, channels, until - from, shift.data() + i / chunks * channels, sums,
                 sums + channels);
    }
  });
  std::vector<float> scale(batch * channels), offset(batch * channels);
  for (int64_t b = 0; b < batch; ++b) {
    double* sums = partial.data() + b * chunks * 2 * channels;
    for (int64_t i = 2 * channels; i < chunks * 2 * channels; ++i) sums[i % (2 * channels)] += sums[i];
    solve(sums, sums + channels, shift.data() + b * channels, added ? added + b * added_stride : nullptr, weight, bias,
          channels, pixels, groups, eps, scale.data() + b * channels, offset.data() + b * channels);
  }
  at::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks, from = first(i % chunks), until = first(i % chunks + 1);
      const int64_t at = (b * pixels + from) * channels;
      write_pixels<SILU>(x + at, channels, until - from, scale.data() + b * channels, offset.data() + b * channels,
                         multiplier, zero, to + at);
    }
  });
}

at::Tensor group_norm(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t groups,
                      double eps, bool silu, at::ScalarType dtype, const std::optional<at::Tensor>& multiplier,
                      int64_t zero, const std::optional<at::Tensor>& added) {
  const bool half = input.scalar_type() == at::kBFloat16;
  TORCH_CHECK(input.dim() == 4 && (half || input.scalar_type() == at::kFloat) && input.device().is_cpu(),
              "group_norm on the CPU is for fp32 or bf16 tensors (B, C, H, W)");
  const int64_t channels = input.size(1);
  TORCH_CHECK(channels % LANES == 0 && groups > 0 && channels % groups == 0,
              "channels must be a multiple of 16 and of the groups");
  TORCH_CHECK((dtype == at::kByte) == multiplier.has_value(), "a multiplier is for uint8, and uint8 needs one");
  for (const auto& t : {weight, bias, multiplier.value_or(weight)})
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == channels,
                "weight, bias and multiplier are fp32, one a channel");
  const at::Tensor rows = added ? added->contiguous() : weight;
  TORCH_CHECK(!added || (rows.scalar_type() == at::kFloat && rows.dim() == 2 && rows.size(1) == channels &&
                         (rows.size(0) == 1 || rows.size(0) == input.size(0))),
              "what is added is fp32, (B or 1, C)");
  const at::Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype), at::MemoryFormat::ChannelsLast);
  if (x.numel() == 0) return out;
  const auto run = [&]<bool SILU>(const auto* from, auto* to) {
    normalise<SILU>(from, x.size(0), channels, x.size(2) * x.size(3), added ? rows.const_data_ptr<float>() : nullptr,
                    rows.size(0) == 1 ? 0 : channels, weight.const_data_ptr<float>(), bias.const_data_ptr<float>(),
                    groups, eps, multiplier ? multiplier->const_data_ptr<float>() : nullptr, static_cast<int>(zero),
                    to);
  };
  const auto with = [&](const auto* from, auto* to) {
    silu ? run.template operator()<true>(from, to) : run.template operator()<false>(from, to);
  };
  const auto either = [&](auto* to) {
    half ? with(x.const_data_ptr<at::BFloat16>(), to) : with(x.const_data_ptr<float>(), to);
  };
  if (dtype == at::kFloat)
    either(out.mutable_data_ptr<float>());
  else if (dtype == at::kBFloat16)
    either(out.mutable_data_ptr<at::BFloat16>());
  else if (dtype == at::kByte)
    either(out.mutable_data_ptr<uint8_t>());
  else
    TORCH_CHECK(false, "group_norm writes fp32, bf16 or uint8");
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastsd_cpu, library) {
  library.def(
      "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, ScalarType dtype, "
      "Tensor? multiplier, int zero, Tensor? added) -> Tensor",
      {at::Tag::needs_fixed_stride_order});
}
TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, library) { library.impl("group_norm", &group_norm); }
