// Winograd's F(2×2, 3×3) for channels-last maps, on raw pointers: a 3×3 convolution of stride 1
// with 2.25 times fewer products.
//
//   tile of 4×4 inputs d, of 2×2 outputs y:   y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A
//   gradient of g from that of y:             dg = Gᵀ[(A dy Aᵀ) ⊙ (Bᵀ d B)]G
//
//       ⎛1  0 −1  0⎞       ⎛ 1   0   0⎞        ⎛1  1  1  0⎞
//   Bᵀ =⎜0  1  1  0⎟   G = ⎜ ½   ½   ½⎟   Aᵀ = ⎝0  1 −1 −1⎠
//       ⎜0 −1  1  0⎟       ⎜ ½  −½   ½⎟
//       ⎝0  1  0 −1⎠       ⎝ 0   0   1⎠
//
// Over channels, ⊙ is one matrix product for each of the 16 places of a tile. Lavin and Gray,
// arXiv:1509.09308.
//
// winograd_loops_impl.h is compiled once per instruction set; winograd_loops returns the table of
// one.
#pragma once

#include <cstdint>

#include "isa.h"
#include "most_channels.h"

namespace fusedconvbn::cpu {

constexpr int64_t winograd_places = 16;

// Of the map that is read (`channels`) and of the filters at hand, `filters` of the `all_filters`
// channels that the other map has. The input gradient reads dout, and writes what was read in
// forward.
struct WinogradShape {
  int64_t batch, channels, filters, all_filters, height, width, pad_height, pad_width;

  int64_t out_height() const { return height + 2 * pad_height - 2; }
  int64_t out_width() const { return width + 2 * pad_width - 2; }
  int64_t tile_rows() const { return (out_height() + 1) / 2; }
  int64_t tile_columns() const { return (out_width() + 1) / 2; }
  int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
};

// A weight (filters, 3, 3, channels) in memory, and whether its two channel dimensions are
// exchanged and g is turned around, as in the input gradient.
struct WinogradWeight {
  const float* data;
  int64_t filters, channels;
  bool turned;
};

struct WinogradLoops {
  int64_t
      panel;  // filters that a product has at a time: u is (16, filters / panel, channels, panel)

  // u = G g Gᵀ of the filters [first + begin, first + end), of which u has `count`; begin and end
  // are multiples of `panel`.
  void (*filters)(WinogradWeight, int64_t first, int64_t count, int64_t begin, int64_t end,
                  float* u);
  // Outputs of tiles [begin, end). scratch: 16·((end − begin)·(channels + filters) + 2·panel)
  // values, end − begin rounded up to a multiple of 8
  void (*outputs)(const WinogradShape&, int64_t begin, int64_t end, const float* in, const float* u,
                  float* scratch, float* out);
  // v = Bᵀ d B, (16, stride, channels), of tiles [first + begin, first + end), and z = A dy Aᵀ,
  // (16, stride, filters)
  void (*spread)(const WinogradShape&, int64_t first, int64_t begin, int64_t end, int64_t stride,
                 const float* in, const float* dout, float* v, float* z);
  // du += Σ_tiles z·v, (16, filters, channels), for `count` tiles at place p and filters [begin,
  // end)
  void (*products)(const WinogradShape&, int64_t p, int64_t begin, int64_t end, int64_t count,
                   int64_t stride, const float* v, const float* z, float* du);
  // dweight = Gᵀ du G, (filters, 3, 3, channels), for filters [begin, end), of the sum of `count`
  // du that lie `stride` apart
  void (*filter_gradients)(const WinogradShape&, int64_t begin, int64_t end, int64_t count,
                           int64_t stride, const float* du, float* dweight);
};

template <Isa isa>  // avx2 or avx512
WinogradLoops winograd_loops();

}  // namespace fusedconvbn::cpu
