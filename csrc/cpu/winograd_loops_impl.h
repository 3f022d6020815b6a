// The loops of Winograd convolutions. winograd_loops_{avx2,avx512}.cpp include this file, each with
// its own target, FUSEDCONVBN_ISA and FUSEDCONVBN_VECTOR.
#include "vector.h"

namespace fusedconvbn::cpu {
namespace {

constexpr int64_t panel = 2 * lanes;
// Rows of a product. Each takes two vectors, so together they take half of the registers.
constexpr int64_t rows_at_a_time = lanes / 2;

// c[i·c_row + j] (+)= Σ_k a[i·row + k·step]·b[k·b_row + j] for rows_at_a_time rows i and the
// columns j of one panel.
template <bool add>
inline void multiply(int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                     int64_t b_row, float* c, int64_t c_row) {
  Vector sums[rows_at_a_time][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector b0 = load(b), b1 = load(b + lanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows_at_a_time; ++i) {
      sums[i][0] += a[i * row] * b0;
      sums[i][1] += a[i * row] * b1;
    }
    a += step;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows_at_a_time; ++i) {
    float* const to = c + i * c_row;
    store(to, add ? load(to) + sums[i][0] : sums[i][0]);
    store(to + lanes, add ? load(to + lanes) + sums[i][1] : sums[i][1]);
  }
}

struct Tile {
  Vector at[4][4];
};

inline Tile input_tile(const Tile& d) {  // Bᵀ d B
  Tile t, v;
  for (int64_t j = 0; j < 4; ++j) {
    t.at[0][j] = d.at[0][j] - d.at[2][j];
    t.at[1][j] = d.at[1][j] + d.at[2][j];
    t.at[2][j] = d.at[2][j] - d.at[1][j];
    t.at[3][j] = d.at[1][j] - d.at[3][j];
  }
  for (int64_t i = 0; i < 4; ++i) {
    v.at[i][0] = t.at[i][0] - t.at[i][2];
    v.at[i][1] = t.at[i][1] + t.at[i][2];
    v.at[i][2] = t.at[i][2] - t.at[i][1];
    v.at[i][3] = t.at[i][1] - t.at[i][3];
  }
  return v;
}

// The position of a tile in the map.
struct Position {
  int64_t sample, row, column;
  Position(const WinogradShape& s, int64_t tile)
      : sample(tile / (s.tile_rows() * s.tile_columns())),
        row(tile / s.tile_columns() % s.tile_rows()),
        column(tile % s.tile_columns()) {}
};

// v[p·plane + c] = (Bᵀ d B)_p
inline void spread_input(const WinogradShape& s, int64_t tile, const float* in, float* v,
                         int64_t plane) {
  const Position position(s, tile);
  const Window<4, 4> window(in + position.sample * s.height * s.width * s.channels, s.height,
                            s.width, s.channels, 2 * position.row - s.pad_height,
                            2 * position.column - s.pad_width);
  for (int64_t c = 0; c < s.channels; c += lanes) {
    Tile d;
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) d.at[i][j] = load(window.at[i][j] + c);
    const Tile t = input_tile(d);
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) store(v + (4 * i + j) * plane + c, t.at[i][j]);
  }
}

// z[p·plane + k] = (A dy Aᵀ)_p
inline void spread_gradient(const WinogradShape& s, int64_t tile, const float* dout, float* z,
                            int64_t plane) {
  const Position position(s, tile);
  const Window<2, 2> window(dout + position.sample * s.out_height() * s.out_width() * s.all_filters,
                            s.out_height(), s.out_width(), s.all_filters, 2 * position.row,
                            2 * position.column);
  for (int64_t k = 0; k < s.filters; k += lanes) {
    Vector t[4][2];
    for (int64_t j = 0; j < 2; ++j) {
      const Vector top = load(window.at[0][j] + k), bottom = load(window.at[1][j] + k);
      t[0][j] = top;
      t[1][j] = top + bottom;
      t[2][j] = top - bottom;
      t[3][j] = -bottom;
    }
    for (int64_t i = 0; i < 4; ++i) {
      float* const to = z + 4 * i * plane + k;
      store(to, t[i][0]);
      store(to + plane, t[i][0] + t[i][1]);
      store(to + 2 * plane, t[i][0] - t[i][1]);
      store(to + 3 * plane, -t[i][1]);
    }
  }
}

// y = Aᵀ m A of m[p·plane + k]
inline void gather_output(const WinogradShape& s, int64_t tile, const float* m, int64_t plane,
                          float* out) {
  const Position position(s, tile);
  const int64_t top = 2 * position.row, left = 2 * position.column, height = s.out_height(),
                width = s.out_width();
  float* const corner = out + ((position.sample * height + top) * width + left) * s.all_filters;
  const bool right = left + 1 < width, below = top + 1 < height;
  for (int64_t k = 0; k < s.filters; k += lanes) {
    Vector t[2][4];
    for (int64_t j = 0; j < 4; ++j) {
      const float* const from = m + j * plane + k;
      const Vector m0 = load(from), m1 = load(from + 4 * plane), m2 = load(from + 8 * plane),
                   m3 = load(from + 12 * plane);
      t[0][j] = m0 + m1 + m2;
      t[1][j] = m1 - m2 - m3;
    }
    for (int64_t i = 0; i < 2; ++i) {
      if (i == 1 && !below) break;
      float* const to = corner + i * width * s.all_filters + k;
      store(to, t[i][0] + t[i][1] + t[i][2]);
      if (right) store(to + s.all_filters, t[i][1] - t[i][2] - t[i][3]);
    }
  }
}

void outputs(const WinogradShape& s, int64_t begin, int64_t end, const float* in, const float* u,
             float* scratch, float* out) {
  const int64_t count = end - begin, C = s.channels, K = s.filters;
  // Rows beyond `count` are computed from whatever the scratch memory holds, and not read.
  const int64_t rows = (count + rows_at_a_time - 1) / rows_at_a_time * rows_at_a_time;
  constexpr int64_t most = 256;  // channels in one running sum, as in `products`
  // One more vector per plane, so that the planes do not all fall into the same cache sets.
  const int64_t v_plane = rows * C + lanes, m_plane = rows * K + lanes;
  float *const v = scratch, *const m = scratch + winograd_positions * v_plane;
  for (int64_t t = 0; t < count; ++t) spread_input(s, begin + t, in, v + t * C, v_plane);
  for (int64_t p = 0; p < winograd_positions; ++p)
    for (int64_t k = 0; k < K; k += panel)
      for (int64_t t = 0; t < count; t += rows_at_a_time)
        for (int64_t c = 0; c < C; c += most) {
          const auto add_up = c == 0 ? multiply<false> : multiply<true>;
          add_up(C - c < most ? C - c : most, v + p * v_plane + t * C + c, C, 1,
                 u + (p * K + k) * C + c * panel, panel, m + p * m_plane + t * K + k, K);
        }
  for (int64_t t = 0; t < count; ++t) gather_output(s, begin + t, m + t * K, m_plane, out);
}

void spread(const WinogradShape& s, int64_t first, int64_t begin, int64_t end, int64_t stride,
            const float* in, const float* dout, float* v, float* z) {
  for (int64_t t = begin; t < end; ++t) {
    spread_input(s, first + t, in, v + t * s.channels, stride * s.channels);
    spread_gradient(s, first + t, dout, z + t * s.filters, stride * s.filters);
  }
}

void products(const WinogradShape& s, int64_t p, int64_t begin, int64_t end, int64_t count,
              int64_t stride, const float* v, const float* z, float* du) {
  constexpr int64_t most = 64;  // products in one running sum; longer sums lose digits
  const int64_t C = s.channels, K = s.filters;
  v += p * stride * C;
  z += p * stride * K;
  for (int64_t t = 0; t < count; t += most)
    for (int64_t c = 0; c < C; c += panel)
      for (int64_t k = begin; k < end; k += rows_at_a_time)
        multiply<true>(count - t < most ? count - t : most, z + t * K + k, 1, K, v + t * C + c, C,
                       du + (p * K + k) * C + c, C);
}

// G g Gᵀ of g[(3i + j)·step]
inline Tile filter_tile(const float* g, int64_t step) {
  Vector t[4][3];
  for (int64_t j = 0; j < 3; ++j) {
    const Vector g0 = load(g + j * step), g1 = load(g + (3 + j) * step),
                 g2 = load(g + (6 + j) * step);
    t[0][j] = g0;
    t[1][j] = 0.5f * (g0 + g1 + g2);
    t[2][j] = 0.5f * (g0 - g1 + g2);
    t[3][j] = g2;
  }
  Tile u;
  for (int64_t i = 0; i < 4; ++i) {
    u.at[i][0] = t[i][0];
    u.at[i][1] = 0.5f * (t[i][0] + t[i][1] + t[i][2]);
    u.at[i][2] = 0.5f * (t[i][0] - t[i][1] + t[i][2]);
    u.at[i][3] = t[i][2];
  }
  return u;
}

void filters(WinogradWeight w, int64_t first, int64_t count, int64_t begin, int64_t end, float* u) {
  constexpr int64_t block = 8;  // channels gathered at a time, so that u is written in long runs
  // The order of the rows and columns of G g Gᵀ for a rotated g.
  constexpr int64_t mirrored[4] = {3, 1, 2, 0};
  const int64_t channels = w.rotated ? w.filters : w.channels;
  for (int64_t k = begin; k < end; k += panel)
    for (int64_t c = 0; c < channels; c += block) {
      float g[9][block][panel], tiles[winograd_positions][block][panel];
      for (int64_t q = 0; q < 9; ++q)
        for (int64_t i = 0; i < block; ++i)
          for (int64_t j = 0; j < panel; ++j)
            g[q][i][j] = w.rotated ? w.data[((c + i) * 9 + q) * w.channels + first + k + j]
                                   : w.data[((first + k + j) * 9 + q) * w.channels + c + i];
      for (int64_t i = 0; i < block; ++i)
        for (int64_t j = 0; j < panel; j += lanes) {
          const Tile t = filter_tile(&g[0][i][j], block * panel);
          for (int64_t y = 0; y < 4; ++y)
            for (int64_t x = 0; x < 4; ++x)
              store(&tiles[4 * y + x][i][j],
                    w.rotated ? t.at[mirrored[y]][mirrored[x]] : t.at[y][x]);
        }
      for (int64_t p = 0; p < winograd_positions; ++p)
        __builtin_memcpy(u + (p * count + k) * channels + c * panel, tiles[p], sizeof tiles[p]);
    }
}

void filter_gradients(const WinogradShape& s, int64_t begin, int64_t end, int64_t count,
                      int64_t stride, const float* du, float* dweight) {
  const int64_t C = s.channels, K = s.filters;
  for (int64_t k = begin; k < end; ++k)
    for (int64_t c = 0; c < C; c += lanes) {
      Vector t[3][4];
      for (int64_t j = 0; j < 4; ++j) {
        const auto at = [&](int64_t i) {
          Vector sum = {};
          for (int64_t n = 0; n < count; ++n)
            sum += load(du + n * stride + ((4 * i + j) * K + k) * C + c);
          return sum;
        };
        const Vector u0 = at(0), u1 = at(1), u2 = at(2), u3 = at(3);
        t[0][j] = u0 + 0.5f * (u1 + u2);
        t[1][j] = 0.5f * (u1 - u2);
        t[2][j] = 0.5f * (u1 + u2) + u3;
      }
      for (int64_t i = 0; i < 3; ++i) {
        float* const to = dweight + (k * 9 + i * 3) * C + c;
        store(to, t[i][0] + 0.5f * (t[i][1] + t[i][2]));
        store(to + C, 0.5f * (t[i][1] - t[i][2]));
        store(to + 2 * C, 0.5f * (t[i][1] + t[i][2]) + t[i][3]);
      }
    }
}

}  // namespace

template <>
WinogradLoops winograd_loops<FUSEDCONVBN_ISA>() {
  return {panel, filters, outputs, spread, products, filter_gradients};
}

}  // namespace fusedconvbn::cpu
