// A vector of floats and windows of channels-last maps, for loops that name their registers.
// Include it after setting the target and defining FUSEDCONVBN_VECTOR, the floats in a vector.
namespace fusedconvbn::cpu {
namespace {

constexpr int64_t lanes = FUSEDCONVBN_VECTOR;

typedef float Vector __attribute__((vector_size(FUSEDCONVBN_VECTOR * sizeof(float)),
                                    aligned(sizeof(float)), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

alignas(64) constexpr float zeros[most_channels] = {};

// Pointers to the positions of a window of a sample; to zeros for positions outside the sample.
template <int64_t rows, int64_t columns>
struct Window {
  const float* at[rows][columns];

  Window(const float* sample, int64_t height, int64_t width, int64_t channels, int64_t top,
         int64_t left) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        at[i][j] = inside ? sample + (y * width + x) * channels : zeros;
      }
  }
};

}  // namespace
}  // namespace fusedconvbn::cpu
