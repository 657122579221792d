#include "ptx.hpp"

#include <cstring>

namespace specdec::emu {
namespace {

bool is_aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

void check_shared16(const char* name, const void* address, Location where) {
  if (!machine.current->block->shared.contains(address, 16)) {
    fail(where, "%s: %p is not in shared memory", name, address);
  }
  if (!is_aligned(address, 16)) fail(where, "%s: %p is not aligned to 16 bytes", name, address);
}

using RowTable = const void* [32];

// Lane i brings the address of row i % 8 of matrix i / 8; the 8 rows of a matrix are read in a
// turn.
void exchange_rows(Thread* const* lanes, unsigned) {
  ++counters.matrix_loads;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::vector<const void*> rows;
    for (int i = 0; i < 8; ++i) rows.push_back(lanes[8 * matrix + i]->input);
    counters.bank_conflicts += static_cast<uint64_t>(turns_beyond_first(rows, 16));
  }
  for (int i = 0; i < 32; ++i) {
    auto& table = *static_cast<RowTable*>(lanes[i]->output);
    for (int j = 0; j < 32; ++j) table[j] = lanes[j]->input;
  }
}

struct ProductOperands {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
  float (*widen)(uint16_t);

  float element(uint32_t pair, int half) const {
    return widen(static_cast<uint16_t>(pair >> (16 * half)));
  }
};

// PTX ISA, "matrix fragments for mma.m16n8k16": with g = lane / 4 and t = lane % 4, register q of A
// holds row g + 8 (q % 2), columns 2t + 8 (q / 2) and the next; of B rows 2t + 8q and the next,
// column g; of D row g + 8 (q / 2), column 2t + q % 2.
void multiply(Thread* const* lanes, unsigned) {
  ++counters.matrix_products;
  counters.matrix_flops += 2 * 16 * 8 * 16;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const ProductOperands*>(lanes[lane]->input);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int q = 0; q < 4; ++q) {
        a[g + 8 * (q % 2)][2 * t + 8 * (q / 2) + half] = own.element(own.a[q], half);
      }
      for (int q = 0; q < 2; ++q) b[2 * t + 8 * q + half][g] = own.element(own.b[q], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const ProductOperands*>(lanes[lane]->input);
    for (int q = 0; q < 4; ++q) {
      const int row = lane / 4 + 8 * (q / 2), column = 2 * (lane % 4) + q % 2;
      float total = 0.0f;
      for (int k = 0; k < 16; ++k) total += a[row][k] * b[k][column];
      own.d[q] += total;
    }
  }
}

}  // namespace

void count_access(const void* address, size_t bytes, uint64_t& counter, Location where) {
  Unchecked unchecked;
  if (!is_aligned(address, bytes)) {
    fail(where, "global access: %p is not aligned to %zu bytes", address, bytes);
  }
  counter += bytes;
}

void note_access(const void* address, size_t bytes, Location where) {
  Unchecked unchecked;
  if (!is_aligned(address, bytes)) {
    fail(where, "shared access: %p is not aligned to %zu bytes", address, bytes);
  }
  if (!machine.current->block->shared.contains(address, bytes)) {
    fail(where, "shared access: %p is not in shared memory", address);
  }
  note_shared(address, bytes, where);
}

// As the compiler makes small fills and copies into stores that ThreadSanitizer does not see.
void store16(void* target, uint64_t low, uint64_t high) {
  using Word [[gnu::may_alias]] = uint64_t;
  auto* words = static_cast<Word*>(target);
  words[0] = low;
  words[1] = high;
}

// Nothing arrives before it is waited for: until then the target holds poison. To ThreadSanitizer
// another thread writes it, so whoever reads without the wait, or has read without a barrier since,
// races with that.
void async_copy16(void* shared, const void* global, int bytes, Location where) {
  check_shared16("cp.async", shared, where);
  if (bytes > 0) {
    if (!is_aligned(global, 16)) fail(where, "cp.async: %p is not aligned to 16 bytes", global);
    if (!is_readable(global, static_cast<size_t>(bytes))) {
      fail(where, "cp.async: reads outside of allocated memory");
    }
  }
  Thread* self = machine.current;
  {
    const AsAnotherThread engine(self->copy_engine, &self->copy_tags[self->copy_group % 64]);
    store16(shared, ~uint64_t{0}, ~uint64_t{0});
  }
  Unchecked unchecked;
  note_shared(shared, 16, where);
  self->copies.push_back({shared, global, bytes, self->copy_group, where});
  counters.copied_bytes += static_cast<uint64_t>(bytes);
}

void async_commit() {
  Unchecked unchecked;
  ++machine.current->copy_group;
}

void async_wait(int groups_under_way) {
  Thread* self = machine.current;
  size_t kept = 0;
  for (const AsyncCopy& copy : self->copies) {
    if (copy.group >= self->copy_group - groups_under_way) {
      self->copies[kept++] = copy;
      continue;
    }
    acquire(&self->copy_tags[copy.group % 64]);
    uint64_t words[2] = {0, 0};
    std::memcpy(words, copy.source, static_cast<size_t>(copy.source_bytes));
    store16(copy.target, words[0], words[1]);
  }
  self->copies.resize(kept);
}

void load_matrices(uint32_t (&registers)[4], const void* row, bool is_transposed, Location where) {
  check_shared16("ldmatrix", row, where);
  RowTable rows;
  warp_operation(is_transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, row, &rows, exchange_rows,
                 where);
  // For sanitizers. PTX does not say who reads what: perhaps a lane reads the row that it brought,
  // perhaps its own elements.
  for (int i = 0; i < 8; ++i) static_cast<const volatile uint16_t*>(row)[i];
  const int g = current_lane() / 4, t = current_lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const void* const* of = rows + 8 * matrix;
    const auto element = [&](int i, int j) { return static_cast<const uint16_t*>(of[i])[j]; };
    const uint32_t low = is_transposed ? element(2 * t, g) : element(g, 2 * t);
    const uint32_t high = is_transposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
    registers[matrix] = low | high << 16;
  }
}

void matrix_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    float (*widen)(uint16_t), Location where) {
  const ProductOperands operands{a, b, d, widen};
  warp_operation("mma.sync", ~0u, &operands, nullptr, multiply, where);
}

}  // namespace specdec::emu
