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
// Over channels, ⊙ is one matrix product for each of the 16 positions in a tile. See Lavin and
// Gray, Fast Algorithms for Convolutional Neural Networks, arXiv:1509.09308.
//
// winograd_loops_impl.h is compiled once per instruction set. winograd_loops returns the table of
// one instruction set.
#pragma once

#include <cstdint>

#include "isa.h"
#include "most_channels.h"

namespace fusedconvbn::cpu {

constexpr int64_t winograd_positions = 16;  // in a tile

// The map that is read has `channels` channels and the other one `all_filters`; a call computes
// `filters` of those. For the input gradient, dout is the map that is read.
struct WinogradShape {
  int64_t batch, channels, filters, all_filters, height, width, pad_height, pad_width;

  int64_t out_height() const { return height + 2 * pad_height - 2; }
  int64_t out_width() const { return width + 2 * pad_width - 2; }
  int64_t tile_rows() const { return (out_height() + 1) / 2; }
  int64_t tile_columns() const { return (out_width() + 1) / 2; }
  int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
};

// A weight (filters, 3, 3, channels) in memory. If `rotated`, as for the input gradient, its
// channel dimensions are exchanged and g is rotated by 180°.
struct WinogradWeight {
  const float* data;
  int64_t filters, channels;
  bool rotated;
};

struct WinogradLoops {
  // Filters that one product computes at a time: u is (16, filters / panel, channels, panel).
  int64_t panel;

  // u = G g Gᵀ for filters [first + begin, first + end). u holds filters [first, first + count);
  // begin and end are multiples of `panel`.
  void (*filters)(WinogradWeight, int64_t first, int64_t count, int64_t begin, int64_t end,
                  float* u);
  // Computes the outputs of tiles [begin, end). scratch has 16·((end − begin)·(channels + filters)
  // + 2·panel) values, with end − begin rounded up to a multiple of 8.
  void (*outputs)(const WinogradShape&, int64_t begin, int64_t end, const float* in, const float* u,
                  float* scratch, float* out);
  // v = Bᵀ d B, (16, stride, channels), and z = A dy Aᵀ, (16, stride, filters), for tiles
  // [first + begin, first + end).
  void (*spread)(const WinogradShape&, int64_t first, int64_t begin, int64_t end, int64_t stride,
                 const float* in, const float* dout, float* v, float* z);
  // du += Σ_tiles z·v, (16, filters, channels), over `count` tiles, for position p and filters
  // [begin, end).
  void (*products)(const WinogradShape&, int64_t p, int64_t begin, int64_t end, int64_t count,
                   int64_t stride, const float* v, const float* z, float* du);
  // dweight = Gᵀ du G, (filters, 3, 3, channels), for filters [begin, end). du is the sum of
  // `count` arrays at a distance of `stride`.
  void (*filter_gradients)(const WinogradShape&, int64_t begin, int64_t end, int64_t count,
                           int64_t stride, const float* du, float* dweight);
};

template <Isa isa>  // avx2 or avx512
WinogradLoops winograd_loops();

}  // namespace fusedconvbn::cpu
