// Attention on CPUs with AVX-512: out = softmax(q k^T / sqrt(K)) v in fp32, or with both products in int8 (VNNI), then
// from and to fp32 or bf16.
//
// Sixteen queries stand side by side in a vector, so that maxima, sums and exponentials never cross lanes, and keys and
// values are broadcast from memory. A tile of 64 queries meets the keys in blocks small enough for the first-level cache;
// a running maximum joins the blocks (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// In int8: the keys lose their mean over the tokens, which changes no softmax (Zhang et al. 2024, SageAttention); queries
// have a scale each, keys one a block, values one a channel. Probabilities are rounded to 0..255 against the largest of
// their own block, so that one strong key coarsens its own block only, and are summed as rounded.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "avx512.h"

namespace {

constexpr int VECTORS = 4;
constexpr int TILE = LANES * VECTORS;  // queries
constexpr int BLOCK = 96;              // keys: 16 times the 6 that a register tile holds, and a multiple of 4

struct Shape {
  int64_t batch, heads, queries, keys, width;
};

template <typename T>
struct Rows {  // one head's (N, K) inside a strided tensor
  const T* data;
  int64_t stride;
  const T* operator[](int64_t i) const { return data + i * stride; }
};

template <typename T>
Rows<T> head_of(const at::Tensor& x, int64_t b, int64_t m) {
  return {x.const_data_ptr<T>() + b * x.stride(0) + m * x.stride(1), x.stride(2)};
}

// sum += x . y in every lane, four bytes each, x unsigned and y signed. As assembly: around the intrinsic, g++ 12 copies
// the sums to the stack and back.
[[gnu::always_inline]] inline __m512i dot(__m512i sum, __m512i x, __m512i y) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
}

// A mask of the first `count` of sixteen lanes.
inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : static_cast<__mmask16>((1 << count) - 1); }

// to[c] = round((x[c] - mean[c]) * up[c]) within -127..127; mean may be null, up too: all_up. Returns their sum.
template <typename T>
inline int32_t quantise(const T* x, const float* mean, const float* up, float all_up, int64_t width, int8_t* to) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask16 some = first(width - c);
    __m512 y = widen(x + c, some);
    if (mean) y = _mm512_sub_ps(y, _mm512_maskz_loadu_ps(some, mean + c));
    y = _mm512_mul_ps(y, up ? _mm512_maskz_loadu_ps(some, up + c) : _mm512_set1_ps(all_up));
    __m512i q = _mm512_cvtps_epi32(y);
    q = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
    sum = _mm512_add_epi32(sum, q);
    _mm512_mask_cvtepi32_storeu_epi8(to + c, some, q);
  }
  return _mm512_reduce_add_epi32(sum);
}

// The largest |x[c] - mean[c]|, and at least 1e-30; mean may be null.
template <typename T>
inline float magnitude(const T* x, const float* mean, int64_t width) {
  __m512 largest = _mm512_set1_ps(1e-30f);
  for (int64_t c = 0; c < width; c += LANES) {
    const __mmask16 some = first(width - c);
    __m512 y = widen(x + c, some);
    if (mean) y = _mm512_sub_ps(y, _mm512_maskz_loadu_ps(some, mean + c));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(y));
  }
  return _mm512_reduce_max_ps(largest);
}

// The keys and values of one head as the inner loops read them.
template <bool INT8>
struct Keys {
  int64_t blocks = 0;
  // int8: k8[key][K], v8[block][K][BLOCK / 4 groups of 4 keys]; fp32: the caller's rows are read as they are.
  std::vector<int8_t> k8, v8;
  std::vector<int32_t> offset;      // -128 sum(k8[key]): the queries are stored as q + 128
  std::vector<float> k_scale, v_scale;  // one a block; one a channel

  template <typename T>
  void pack(const Rows<T>& k, const Rows<T>& v, const Shape& s) {
    blocks = (s.keys + BLOCK - 1) / BLOCK;
    if constexpr (!INT8) return;
    const int64_t width = s.width, padded = blocks * BLOCK;
    k8.assign(padded * width, 0);
    v8.assign(padded * width, 0);
    offset.assign(padded, 0);
    k_scale.assign(blocks, 1.0f);
    v_scale.assign(width, 1e-30f);
    std::vector<float> mean(width, 0.0f);
    for (int64_t j = 0; j < s.keys; ++j)
      for (int64_t c = 0; c < width; ++c) {
        mean[c] += static_cast<float>(k[j][c]);
        v_scale[c] = std::max(v_scale[c], std::fabs(static_cast<float>(v[j][c])));
      }
    for (int64_t c = 0; c < width; ++c) {
      mean[c] /= static_cast<float>(s.keys);
      v_scale[c] /= 127.0f;
    }
    std::vector<float> v_up(width);
    for (int64_t c = 0; c < width; ++c) v_up[c] = 1.0f / v_scale[c];
    std::vector<int8_t> row(width);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * BLOCK, end = std::min(begin + BLOCK, s.keys);
      float largest = 1e-30f;
      for (int64_t j = begin; j < end; ++j) largest = std::max(largest, magnitude(k[j], mean.data(), width));
      k_scale[block] = largest / 127.0f;
      for (int64_t j = begin; j < end; ++j) {
        offset[j] = -128 * quantise(k[j], mean.data(), nullptr, 127.0f / largest, width, k8.data() + j * width);
        quantise(v[j], nullptr, v_up.data(), 1.0f, width, row.data());
        int8_t* column = v8.data() + begin * width + (j - begin);
        for (int64_t c = 0; c < width; ++c) column[c * BLOCK] = row[c];
      }
    }
  }
};

// One thread's tile: 64 queries, transposed, and what they have gathered.
template <bool INT8, typename T>
struct Tile {
  const Shape& s;
  const float to_log2;  // log2(e) / sqrt(K)
  std::vector<float> buffer;
  float* q;        // fp32: [K][TILE]; int8: [K / 4][TILE] groups of four bytes
  float* scores;   // [BLOCK][TILE], then the probabilities in fp32
  int32_t* p8;     // [BLOCK / 4][TILE] groups of four bytes
  float* out;      // [K][TILE]
  alignas(64) float q_scale[TILE], highest[TILE], total[TILE];

  Tile(const Shape& shape, float log2_scale) : s(shape), to_log2(log2_scale) {
    buffer.resize(2 * s.width * TILE + BLOCK * TILE + BLOCK / 4 * TILE + LANES);
    auto address = reinterpret_cast<uintptr_t>(buffer.data());
    float* start = reinterpret_cast<float*>((address + 63) / 64 * 64);
    q = start;
    out = q + s.width * TILE;
    scores = out + s.width * TILE;
    p8 = reinterpret_cast<int32_t*>(scores + BLOCK * TILE);
  }

  void load(const Rows<T>& rows, int64_t count) {
    std::fill(out, out + s.width * TILE, 0.0f);
    std::fill(total, total + TILE, 0.0f);
    std::fill(highest, highest + TILE, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < TILE; ++i) {
      const T* row = rows[std::min(i, count - 1)];  // lanes past the end repeat the last query
      if constexpr (INT8) {
        const float largest = magnitude(row, nullptr, s.width);
        q_scale[i] = largest / 127.0f;
        quantise(row, nullptr, nullptr, 127.0f / largest, s.width, reinterpret_cast<int8_t*>(scores));
        const auto* bytes = reinterpret_cast<const uint32_t*>(scores);
        auto* groups = reinterpret_cast<uint32_t*>(q);
        for (int64_t g = 0; g < s.width / 4; ++g) groups[g * TILE + i] = bytes[g] ^ 0x80808080u;  // + 128
      } else {
        q_scale[i] = 1.0f;
        for (int64_t c = 0; c < s.width; ++c) q[c * TILE + i] = static_cast<float>(row[c]);
      }
    }
  }

  // scores[n] = q . k[first + n] for N keys; top = max(top, scores). Kept apart, or the sums leave the registers.
  template <int N>
  [[gnu::noinline]] void score(const Keys<INT8>& keys, const Rows<T>& k, int64_t first, float* to, __m512 (&top)[VECTORS]) {
    __m512 value[N][VECTORS];
    if constexpr (INT8) {
      __m512i sum[N][VECTORS];
      const int8_t* row = keys.k8.data() + first * s.width;
      const int32_t* offset = keys.offset.data() + first;
      each<N>([&](auto n) { each<VECTORS>([&](auto r) { sum[n][r] = _mm512_set1_epi32(offset[n]); }); });
      const int64_t width = s.width;
      const auto* queries = reinterpret_cast<const int32_t*>(q);
      for (int64_t g = 0; g < width / 4; ++g) {
        __m512i x[VECTORS];
        each<VECTORS>([&](auto r) { x[r] = _mm512_load_si512(queries + g * TILE + r * LANES); });
        each<N>([&](auto n) {
          const __m512i y = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(row + n * width + 4 * g));
          each<VECTORS>([&](auto r) { sum[n][r] = dot(sum[n][r], x[r], y); });
        });
      }
      each<N>([&](auto n) { each<VECTORS>([&](auto r) { value[n][r] = _mm512_cvtepi32_ps(sum[n][r]); }); });
    } else {
      each<N>([&](auto n) { each<VECTORS>([&](auto r) { value[n][r] = _mm512_setzero_ps(); }); });
      const T* row = k[first];
      const int64_t width = s.width, stride = k.stride;
      for (int64_t c = 0; c < width; ++c) {
        __m512 x[VECTORS];
        each<VECTORS>([&](auto r) { x[r] = _mm512_load_ps(q + c * TILE + r * LANES); });
        each<N>([&](auto n) {
          const __m512 y = _mm512_set1_ps(row[n * stride + c]);
          each<VECTORS>([&](auto r) { value[n][r] = _mm512_fmadd_ps(x[r], y, value[n][r]); });
        });
      }
    }
    each<VECTORS>([&](auto r) {
      __m512 highest = top[r];
      each<N>([&](auto n) {
        highest = _mm512_max_ps(highest, value[n][r]);
        _mm512_store_ps(to + n * TILE + r * LANES, value[n][r]);
      });
      top[r] = highest;
    });
  }

  // out[c] = out[c] * fade + gain * sum_j p[j] v[j][c] for N channels from c.
  template <int N>
  [[gnu::noinline]] void gather(const Keys<INT8>& keys, const Rows<T>& v, int64_t block, int64_t count, int64_t c, bool fades,
              const __m512 (&fade)[VECTORS], const __m512 (&gain)[VECTORS]) {
    __m512 sum[N][VECTORS];
    if constexpr (INT8) {
      __m512i whole[N][VECTORS];
      each<N>([&](auto n) { each<VECTORS>([&](auto r) { whole[n][r] = _mm512_setzero_si512(); }); });
      const int8_t* values = keys.v8.data() + block * BLOCK * s.width + c * BLOCK;
      for (int64_t g = 0; g < (count + 3) / 4; ++g) {
        __m512i p[VECTORS];
        each<VECTORS>([&](auto r) { p[r] = _mm512_load_si512(p8 + g * TILE + r * LANES); });
        each<N>([&](auto n) {
          const __m512i y = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(values + n * BLOCK + 4 * g));
          each<VECTORS>([&](auto r) { whole[n][r] = dot(whole[n][r], p[r], y); });
        });
      }
      each<N>([&](auto n) { each<VECTORS>([&](auto r) { sum[n][r] = _mm512_cvtepi32_ps(whole[n][r]); }); });
    } else {
      each<N>([&](auto n) { each<VECTORS>([&](auto r) { sum[n][r] = _mm512_setzero_ps(); }); });
      const T* row = v[block * BLOCK] + c;
      const int64_t stride = v.stride;
      for (int64_t j = 0; j < count; ++j) {
        __m512 p[VECTORS];
        each<VECTORS>([&](auto r) { p[r] = _mm512_load_ps(scores + j * TILE + r * LANES); });
        each<N>([&](auto n) {
          const __m512 y = _mm512_set1_ps(row[j * stride + n]);
          each<VECTORS>([&](auto r) { sum[n][r] = _mm512_fmadd_ps(p[r], y, sum[n][r]); });
        });
      }
    }
    each<N>([&](auto n) {
      each<VECTORS>([&](auto r) {
        float* place = out + (c + n) * TILE + r * LANES;
        __m512 before = _mm512_load_ps(place);
        if (fades) before = _mm512_mul_ps(before, fade[r]);
        _mm512_store_ps(place, _mm512_fmadd_ps(sum[n][r], gain[r], before));
      });
    });
  }

  void meet(const Keys<INT8>& keys, const Rows<T>& k, const Rows<T>& v, int64_t block) {
    const int64_t first = block * BLOCK, count = std::min<int64_t>(BLOCK, s.keys - first);
    __m512 top[VECTORS];
    for (auto& t : top) t = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    int64_t j = 0;
    for (; j + 6 <= count; j += 6) score<6>(keys, k, first + j, scores + j * TILE, top);
    for (; j + 2 <= count; j += 2) score<2>(keys, k, first + j, scores + j * TILE, top);
    for (; j < count; ++j) score<1>(keys, k, first + j, scores + j * TILE, top);
    for (; j < (count + 3) / 4 * 4; ++j)  // to whole groups of four
      std::fill(scores + j * TILE, scores + (j + 1) * TILE, -std::numeric_limits<float>::infinity());

    const float block_scale = to_log2 * (INT8 ? keys.k_scale[block] : 1.0f);
    __m512 fade[VECTORS], gain[VECTORS];
    __mmask16 moved = 0;
    for (int r = 0; r < VECTORS; ++r) {
      const __m512 scale = _mm512_mul_ps(_mm512_load_ps(q_scale + r * LANES), _mm512_set1_ps(block_scale));
      const __m512 own = _mm512_mul_ps(top[r], scale);
      const __m512 before = _mm512_load_ps(highest + r * LANES), now = _mm512_max_ps(before, own);
      _mm512_store_ps(highest + r * LANES, now);
      moved |= _mm512_cmp_ps_mask(before, now, _CMP_NEQ_OQ);
      fade[r] = exp2_<6>(_mm512_max_ps(_mm512_sub_ps(before, now), _mm512_set1_ps(-200.0f)));
      gain[r] = exp2_<6>(_mm512_sub_ps(own, now));
      __m512 sum = _mm512_setzero_ps();
      if constexpr (INT8) {
        const __m512 shift = _mm512_sub_ps(own, _mm512_set1_ps(7.9943534f));  // log2(255)
        __m512i counts = _mm512_setzero_si512();
        for (int64_t i = 0; i < (count + 3) / 4; ++i) {
          __m512i p[4];
          each<4>([&](auto n) {
            p[n] = _mm512_cvtps_epi32(exp2_<2>(
                _mm512_fmsub_ps(_mm512_load_ps(scores + (4 * i + n) * TILE + r * LANES), scale, shift)));
          });
          const __m512i low = _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 8));
          const __m512i third = _mm512_slli_epi32(p[2], 16), fourth = _mm512_slli_epi32(p[3], 24);
          const __m512i bytes = _mm512_ternarylogic_epi32(low, third, fourth, 0xfe);  // or
          counts = dot(counts, bytes, _mm512_set1_epi8(1));
          _mm512_store_si512(p8 + i * TILE + r * LANES, bytes);
        }
        sum = _mm512_cvtepi32_ps(counts);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          float* place = scores + i * TILE + r * LANES;
          const __m512 p = exp2_<6>(_mm512_fmsub_ps(_mm512_load_ps(place), scale, own));
          sum = _mm512_add_ps(sum, p);
          _mm512_store_ps(place, p);
        }
      }
      const __m512 sums = _mm512_mul_ps(_mm512_load_ps(total + r * LANES), fade[r]);
      _mm512_store_ps(total + r * LANES, _mm512_fmadd_ps(sum, gain[r], sums));
    }
    int64_t c = 0;
    const bool fades = moved != 0;
    for (; c + 6 <= s.width; c += 6) gather<6>(keys, v, block, count, c, fades, fade, gain);
    for (; c + 2 <= s.width; c += 2) gather<2>(keys, v, block, count, c, fades, fade, gain);
    for (; c < s.width; ++c) gather<1>(keys, v, block, count, c, fades, fade, gain);
  }

  void store(const Keys<INT8>& keys, T* to, int64_t stride, int64_t count) const {
    const __m512i apart = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(TILE));
    for (int64_t i = 0; i < count; ++i) {
      const __m512 down = _mm512_set1_ps(1.0f / total[i]);
      for (int64_t c = 0; c < s.width; c += LANES) {
        const __mmask16 some = first(s.width - c);
        __m512 y = _mm512_mask_i32gather_ps(down, some, apart, out + c * TILE + i, 4);
        if constexpr (INT8) y = _mm512_mul_ps(y, widen(keys.v_scale.data() + c, some));
        narrow(_mm512_mul_ps(y, down), to + i * stride + c, some);
      }
    }
  }
};

template <bool INT8, typename T>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& out, const Shape& s) {
  const int64_t heads = s.batch * s.heads, tiles = (s.queries + TILE - 1) / TILE;
  std::vector<Keys<INT8>> keys(heads);
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      keys[h].pack(head_of<T>(k, h / s.heads, h % s.heads), head_of<T>(v, h / s.heads, h % s.heads), s);
  });
  const float to_log2 = 1.4426950408889634f / std::sqrt(static_cast<float>(s.width));
  T* data = out.mutable_data_ptr<T>();
  at::parallel_for(0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    Tile<INT8, T> tile(s, to_log2);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / tiles, b = h / s.heads, m = h % s.heads, first = i % tiles * TILE;
      const int64_t count = std::min<int64_t>(TILE, s.queries - first);
      const Rows<T> rows = head_of<T>(q, b, m), k_rows = head_of<T>(k, b, m), v_rows = head_of<T>(v, b, m);
      tile.load({rows[first], rows.stride}, count);
      for (int64_t block = 0; block < keys[h].blocks; ++block) tile.meet(keys[h], k_rows, v_rows, block);
      tile.store(keys[h], data + ((b * s.queries + first) * s.heads + m) * s.width, s.heads * s.width, count);
    }
  });
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool int8) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes(), "q is (B, M, Nq, K); k and v are (B, M, N, K)");
  for (const auto& x : {q, k, v}) {
    TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == q.scalar_type() &&
                    (x.scalar_type() == at::kFloat || (int8 && x.scalar_type() == at::kBFloat16)),
                "attention on the CPU is for fp32 tensors, or in int8 for bf16 ones too");
    TORCH_CHECK(x.stride(3) == 1, "the last dimension must be dense");
  }
  const Shape s{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
  TORCH_CHECK(k.size(0) == s.batch && k.size(1) == s.heads && k.size(3) == s.width, "q and k do not fit");
  TORCH_CHECK(s.width % 4 == 0, "a head's width must be a multiple of 4");
  TORCH_CHECK(s.keys > 0, "there must be a key");
  at::Tensor out = at::empty({s.batch, s.queries, s.heads, s.width}, q.options());
  if (!int8)
    attend<false, float>(q, k, v, out, s);
  else if (q.scalar_type() == at::kFloat)
    attend<true, float>(q, k, v, out, s);
  else
    attend<true, at::BFloat16>(q, k, v, out, s);
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastsd_cpu, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, bool int8) -> Tensor");
}
TORCH_LIBRARY_IMPL(fastsd_cpu, CPU, library) { library.impl("attention", &attention); }
