// One head of a key or value cache, tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cache.hpp"
#include "tile.hpp"

namespace specdec::SPECDEC_ISA {

// As one request sees it.
template <class T>
struct HeadCache {
  const CacheView& cache;
  const SlotMap& slots;
  int32_t b, g;

  // Elements of the buffer that `rows` needs.
  int64_t buffer_size() const { return int64_t{kTileKeys + 1} * cache.head_dim; }

  // Rows of the slots from `first` on whose bit is set in `used`, made contiguous in `buffer` if
  // they are not; the other rows are zeros.
  void rows(int32_t first, uint64_t used, T* buffer, TileRows<T>& out) const {
    const T* data = static_cast<const T*>(cache.data) + g * cache.stride_g;
    const bool is_paged = slots.page_table != nullptr;
    if (!is_paged && cache.stride_d == 1 && used == ~uint64_t{0}) {
      data += b * cache.stride_c + first * cache.stride_s;
      for (int32_t j = 0; j < kTileKeys; ++j) out[j] = data + j * cache.stride_s;
      return;
    }
    T* zeros = buffer + int64_t{kTileKeys} * cache.head_dim;
    std::memset(zeros, 0, static_cast<size_t>(cache.head_dim) * sizeof(T));
    int64_t page = b;
    int32_t page_slot = 0;  // first slot of the page
    bool has_page = !is_paged;
    for (int32_t j = 0; j < kTileKeys; ++j) {
      out[j] = zeros;
      if (!(used >> j & 1)) continue;
      const int32_t slot = first + j;
      if (!has_page || (is_paged && slot - page_slot >= slots.page_size)) {
        page_slot = slot / slots.page_size * slots.page_size;
        page = std::clamp<int64_t>(slots.page(b, slot), 0, slots.pages - 1);
        has_page = true;
      }
      out[j] = data + page * cache.stride_c + (slot - page_slot) * cache.stride_s;
      if (cache.stride_d != 1) out[j] = gather(out[j], buffer + int64_t{j} * cache.head_dim);
    }
  }

  const T* gather(const T* row, T* target) const {
    for (int32_t d = 0; d < cache.head_dim; ++d) target[d] = row[d * cache.stride_d];
    return target;
  }
};

// Asks memory for the rows of the next tile while one is computed.
template <class T>
class TilePrefetch {
 public:
  TilePrefetch(const HeadCache<T>& k, const HeadCache<T>& v, T* k_buffer, T* v_buffer)
      : heads_{&k, &v}, buffers_{k_buffer, v_buffer} {}

  // From now on the tile at `slot`; of it, the slots before `end_slot`.
  void aim(int32_t slot, int32_t end_slot) {
    key_ = 0;
    end_ = std::clamp(end_slot - slot, 0, kTileKeys);
    for (int i = 0; i < 2 && end_ > 0; ++i) {
      if (heads_[i]->cache.stride_d == 1)
        heads_[i]->rows(slot, ~uint64_t{0} >> (kTileKeys - end_), buffers_[i], rows_[i]);
    }
  }

  // The next `num` rows.
  void operator()(int32_t num) {
    for (; num > 0 && key_ < end_; --num, ++key_) {
      for (int i = 0; i < 2; ++i) {
        if (heads_[i]->cache.stride_d == 1) prefetch(rows_[i][key_], heads_[i]->cache.head_dim);
      }
    }
  }

 private:
  const HeadCache<T>* heads_[2];
  T* buffers_[2];
  TileRows<T> rows_[2];
  int32_t key_ = 0, end_ = 0;
};

}  // namespace specdec::SPECDEC_ISA
