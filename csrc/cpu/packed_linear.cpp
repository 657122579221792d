// A few rows times weights that lie in panels of 16 outputs: a slice of a panel holds one feature
// of each. Of bfloat16 two, side by side: one 32-bit lane is a pair of weights of one output,
// multiplied as it is where the CPU multiplies such pairs, else widened by a shift and a mask.
//
// A task owns some panels and all rows, so that every weight of few rows comes from memory once; of
// more rows than its cache holds, a task takes as many as that at a time. It goes through its
// panels in groups of register columns (kLanes outputs each), and through each group once for every
// block of rows, while it prefetches the next group. Products accumulate in float over all features
// in order: a row's result does not depend on the other rows, nor on the number of threads. Bytes
// moved: the panels.
#include "packed_linear.hpp"

#include "parallel.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tile.hpp"

namespace specdec::SPECDEC_ISA {
namespace {

template <class T>
struct Panels : FloatQuanta<T> {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Into the register of the total. GCC 12 takes any of the three, and has to move every second
  // result back: 50 instead of 44 instructions for 20 products.
  static Float multiply_add(Float a, Float b, Float total) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(total) : "x"(a), "x"(b));
    return total;
  }
#endif
};
#if defined(__AVX512BF16__)
template <>
struct Panels<Bfloat16> : Bfloat16Pairs {};
#endif
template <class T>
constexpr int32_t kQuantaPerSlice = kPanelFeatures<T> / Panels<T>::kElements;
template <class T>
constexpr int64_t kSliceSize = kPanelOutputs * kPanelFeatures<T>;
template <class T>
constexpr int64_t kSliceBytes = kSliceSize<T> * sizeof(T);
// How far ahead to prefetch: measured on CPUs with these instructions, and on others.
#if defined(__AVX512BF16__)
constexpr int64_t kNearAhead = 2048;
#else
constexpr int64_t kNearAhead = 1024;
#endif
constexpr int32_t kColumnsPerPanel = kPanelOutputs / kLanes;
constexpr int64_t kMinBytes = 32768;  // of weights that are worth a thread
#if defined(__AVX512F__)
constexpr int kAccumulators = 24, kMaxColumns = 8;  // of 32 registers
#elif defined(__AVX2__)
constexpr int kAccumulators = 10, kMaxColumns = 4;  // of 16
#else
constexpr int kAccumulators = 8, kMaxColumns = 2;
#endif
constexpr int kBlockRows = kAccumulators / 2;  // so that a load of x serves two columns
constexpr int64_t kRowsBytes = 262144;         // of rows in quanta that stay in a core's cache
constexpr int64_t kPackedByThread = 32768;     // quanta of rows that are worth a thread

// As many as there are accumulators for, in whole panels if that is one or more.
constexpr int columns_for(int rows) {
  const int columns = kAccumulators / rows;
  if (columns > kMaxColumns) return kMaxColumns;
  return columns < kColumnsPerPanel ? columns : columns / kColumnsPerPanel * kColumnsPerPanel;
}

template <class T>
int64_t panels_of(const PackedWeight<T>& weight) {
  return (int64_t{weight.outputs} + kPanelOutputs - 1) / kPanelOutputs;
}

// Of so many features.
template <class T>
constexpr int32_t slices_of(int32_t features) {
  return (features + kPanelFeatures<T> - 1) / kPanelFeatures<T>;
}

// The weights of one register column.
template <class T>
struct Column {
  const T* weights;  // in the first slice
  int32_t first;     // output in lane 0
};

// Bytes between the weights in use and those to prefetch: at the first slice, and more at each
// next.
struct Ahead {
  int64_t first, step;
};

// A register column of a slice.
template <class T>
void load_slice(const T* weights, Float* quanta) {
  if constexpr (kQuantaPerSlice<T> == 1) {
    quanta[0] = Panels<T>::load_quanta(weights);
  } else {
    const Uint pairs = reinterpret_cast<Uint>(load(reinterpret_cast<const float*>(weights)));
    quanta[0] = reinterpret_cast<Float>(pairs << 16);
    quanta[1] = reinterpret_cast<Float>(pairs & 0xFFFF0000u);
  }
}

// out[r, column] for kRows rows of x [quanta of features, kRows] and kColumns columns, neighbours.
template <class T, int kRows, int kColumns>
void multiply_columns(const PackedWeight<T>& weight, int32_t features, const float* x,
                      int32_t first_row, const Column<T>* columns, Ahead ahead) {
  constexpr int32_t kQuanta = kQuantaPerSlice<T>;
  Float sums[kRows][kColumns];  // in registers: every loop over it is unrolled
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sums[r][c] = Float{};
  }
  const T* weights[kColumns];
  for (int c = 0; c < kColumns; ++c) weights[c] = columns[c].weights;
  const int32_t num_slices = slices_of<T>(features);
  for (int32_t k = 0; k < num_slices; ++k, x += kQuanta * kRows, ahead.first += ahead.step) {
    Float quanta[kColumns][kQuanta];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      if (c % kColumnsPerPanel == 0)
        __builtin_prefetch(reinterpret_cast<const char*>(weights[c]) + ahead.first, 0, kCache);
      load_slice(weights[c] + k * kSliceSize<T>, quanta[c]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      Float row[kQuanta];
      for (int i = 0; i < kQuanta; ++i) row[i] = splat(x[i * kRows + r]);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        for (int i = 0; i < kQuanta; ++i)
          sums[r][c] = Panels<T>::multiply_add(row[i], quanta[c][i], sums[r][c]);
      }
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const int32_t first = columns[c].first;
    const int32_t left = weight.outputs - first;
    for (int r = 0; r < kRows; ++r) {
      T* target = weight.out + int64_t{first_row + r} * weight.outputs + first;
      if (left >= kLanes) {
        store(target, weight.bias == nullptr ? sums[r][c] : sums[r][c] + load(weight.bias + first));
        continue;
      }
      T bias[kLanes], lanes[kLanes];
      std::memset(bias, 0, sizeof bias);
      if (weight.bias != nullptr)
        std::memcpy(bias, weight.bias + first, static_cast<size_t>(left) * sizeof *bias);
      store(lanes, sums[r][c] + load(bias));
      std::memcpy(target, lanes, static_cast<size_t>(left) * sizeof *lanes);
    }
  }
}

template <class T>
using MultiplyColumns = void (*)(const PackedWeight<T>&, int32_t, const float*, int32_t,
                                 const Column<T>*, Ahead);

template <class T, int kRows, int... kColumns>
MultiplyColumns<T> choose_columns(int columns, std::integer_sequence<int, kColumns...>) {
  static constexpr MultiplyColumns<T> kKernels[] = {multiply_columns<T, kRows, kColumns + 1>...};
  return kKernels[columns - 1];
}

template <class T, int... kRows>
MultiplyColumns<T> choose(int rows, int columns, std::integer_sequence<int, kRows...>) {
  using Choose = MultiplyColumns<T> (*)(int);
  static constexpr Choose kByRows[] = {[](int c) {
    return choose_columns<T, kRows + 1>(c,
                                        std::make_integer_sequence<int, columns_for(kRows + 1)>());
  }...};
  return kByRows[rows - 1](columns);
}

// Rows [first, first + rows) as x [quanta of features, in whole slices, rows]; up to kLanes floats
// behind them may change, too.
template <class T>
void pack_rows(const PackedRows<T>& input, int32_t first, int32_t rows, float* x) {
  constexpr int32_t kElements = Panels<T>::kElements, kWidth = kLanes * kElements;
  const T* source = input.x + first * input.stride_row;
  const int32_t whole = input.features / kWidth * kWidth;
  for (int32_t top = 0; top < rows; top += kLanes) {
    const int32_t count = rows - top < kLanes ? rows - top : kLanes;
    float* target = x + top;
    for (int32_t f = 0; f < whole; f += kWidth) {
      Float lanes[kLanes];
      for (int32_t r = 0; r < kLanes; ++r) {
        lanes[r] =
            r < count ? Panels<T>::load_quanta(source + (top + r) * input.stride_row + f) : Float{};
      }
      transpose(lanes);
      for (int32_t i = 0; i < kLanes; ++i, target += rows) {
        if (count == kLanes || rows == count) {  // what is behind the last row comes later
          store(target, lanes[i]);
        } else {
          std::memcpy(target, &lanes[i], static_cast<size_t>(count) * sizeof *target);
        }
      }
    }
  }
  T last[kElements];  // behind the last feature zeros
  for (int32_t f = whole; f < slices_of<T>(input.features) * kPanelFeatures<T>; f += kElements) {
    for (int32_t r = 0; r < rows; ++r) {
      const T* row = source + r * input.stride_row;
      for (int32_t i = 0; i < kElements; ++i) last[i] = f + i < input.features ? row[f + i] : T{};
      Panels<T>::pack(last, kElements, x + int64_t{f / kElements} * rows + r);
    }
  }
}

}  // namespace

template <class T>
void multiply_packed(const PackedRows<T>& input, const PackedWeight<T>* weights, int num_weights) {
  int64_t num_panels = 0;
  for (int i = 0; i < num_weights; ++i) num_panels += panels_of(weights[i]);
  if (input.rows == 0 || num_panels == 0) return;
  // Blocks of about equal size: 17 rows are 9 and 8.
  const int32_t num_blocks = (input.rows + kBlockRows - 1) / kBlockRows;
  const auto block_begin = [&](int32_t block) {
    return static_cast<int32_t>(int64_t{input.rows} * block / num_blocks);
  };
  thread_local Scratch<float> scratch;
  const int64_t num_slices = slices_of<T>(input.features);
  const int64_t num_quanta = num_slices * kQuantaPerSlice<T>;  // of a row
  float* x = scratch.reserve(num_quanta * input.rows + int64_t{num_blocks} * kLanes);
  const auto rows_of = [&](int32_t block) {
    return x + num_quanta * block_begin(block) + int64_t{block} * kLanes;
  };
  parallel_for(num_blocks, 1 + kPackedByThread / (num_quanta * kBlockRows + 1),
               [&](int64_t first, int64_t last) {
                 for (auto block = static_cast<int32_t>(first); block < last; ++block) {
                   const int32_t begin = block_begin(block);
                   pack_rows(input, begin, block_begin(block + 1) - begin, rows_of(block));
                 }
               });
  const int64_t panel_bytes = num_slices * kSliceBytes<T>;
  const auto num_near = static_cast<int32_t>(1 + kRowsBytes / (num_quanta * kBlockRows * 4 + 1));
  const int32_t step = columns_for((input.rows + num_blocks - 1) / num_blocks);
  const int64_t group_bytes = (step + kColumnsPerPanel - 1) / kColumnsPerPanel * panel_bytes;
  // Every block of rows prefetches an equal share of the next group, so that memory never rests;
  // where there is one block, or a group that nothing has prefetched, it is what comes soon.
  const auto ahead_of = [&](bool is_first_group, int32_t block, int32_t blocks) -> Ahead {
    if (blocks == 1 || (is_first_group && block == 0)) return {kNearAhead, kSliceBytes<T>};
    const int64_t share = (kSliceBytes<T> + blocks - 1) / blocks;  // of a slice's bytes
    return {group_bytes + block * share * num_slices, share};
  };
  // Panels [begin, end) of one weight and blocks [near, far) of rows.
  const auto multiply = [&](const PackedWeight<T>& weight, int64_t begin, int64_t end, int32_t near,
                            int32_t far) {
    const int64_t first_column = begin * kColumnsPerPanel;
    int64_t end_column = (int64_t{weight.outputs} + kLanes - 1) / kLanes;
    if (end * kColumnsPerPanel < end_column) end_column = end * kColumnsPerPanel;
    Column<T> columns[kMaxColumns];
    for (int64_t at = first_column; at < end_column; at += step) {
      const int64_t left = end_column - at;
      const int32_t count = left < step ? static_cast<int32_t>(left) : step;
      for (int32_t c = 0; c < count; ++c) {
        const int64_t column = at + c, panel = column / kColumnsPerPanel;
        const int64_t lane = column % kColumnsPerPanel * kLanes;
        columns[c] = {weight.panels + panel * num_slices * kSliceSize<T> + lane * kPanelFeatures<T>,
                      static_cast<int32_t>(column * kLanes)};
      }
      for (int32_t block = near; block < far; ++block) {
        const int32_t first = block_begin(block), rows = block_begin(block + 1) - first;
        choose<T>(rows, count, std::make_integer_sequence<int, kBlockRows>())(
            weight, input.features, rows_of(block), first, columns,
            ahead_of(at == first_column, block - near, far - near));
      }
    }
  };
  parallel_for(num_panels, 1 + kMinBytes / (panel_bytes + 1), [&](int64_t begin, int64_t end) {
    for (int i = 0; i < num_weights; ++i) {
      const int64_t panels = panels_of(weights[i]);
      for (int32_t near = 0; near < num_blocks; near += num_near) {
        const int32_t far = num_blocks - near < num_near ? num_blocks : near + num_near;
        multiply(weights[i], begin < 0 ? 0 : begin, end < panels ? end : panels, near, far);
      }
      begin -= panels;
      end -= panels;
    }
  });
}

void packed_linear(const PackedLinearParams& params) {
  with_dtype(params.dtype, [&](auto tag) {
    using T = decltype(tag);
    const PackedWeight<T> weight{static_cast<const T*>(params.panels),
                                 static_cast<const T*>(params.bias), static_cast<T*>(params.out),
                                 params.outputs};
    multiply_packed<T>(
        {static_cast<const T*>(params.x), params.stride_row, params.rows, params.features}, &weight,
        1);
  });
}

template void multiply_packed(const PackedRows<float>&, const PackedWeight<float>*, int);
template void multiply_packed(const PackedRows<Half>&, const PackedWeight<Half>*, int);
template void multiply_packed(const PackedRows<Bfloat16>&, const PackedWeight<Bfloat16>*, int);

}  // namespace specdec::SPECDEC_ISA
