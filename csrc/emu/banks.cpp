#include "banks.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <tuple>

#include "machine.hpp"

namespace specdec::emu {
namespace {

constexpr size_t kBanks = 32, kWordBytes = 4, kLanes = 32;

// Accesses of a warp in one place of the source, each lane's in its order.
using Lanes = std::array<std::vector<const SharedAccess*>, kLanes>;

void count_place(const Lanes& lanes) {
  size_t longest = 0, bytes = kWordBytes;
  for (const auto& own : lanes) {
    longest = std::max(longest, own.size());
    if (!own.empty()) bytes = std::max(bytes, own.front()->bytes);
  }
  const size_t lanes_of_turn = kBanks * kWordBytes / bytes;
  counters.shared_accesses += longest;
  for (size_t i = 0; i < longest; ++i) {
    for (size_t first = 0; first < kLanes; first += lanes_of_turn) {
      std::vector<const void*> addresses;
      for (size_t lane = first; lane < first + lanes_of_turn; ++lane) {
        if (i < lanes[lane].size()) addresses.push_back(lanes[lane][i]->address);
      }
      counters.bank_conflicts += static_cast<uint64_t>(turns_beyond_first(addresses, bytes));
    }
  }
}

}  // namespace

int turns_beyond_first(std::vector<const void*> addresses, size_t bytes) {
  std::vector<uintptr_t> words;
  for (const void* address : addresses) {
    for (size_t i = 0; i < bytes; i += kWordBytes) {
      words.push_back((reinterpret_cast<uintptr_t>(address) + i) / kWordBytes);
    }
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int of_bank[kBanks] = {};
  for (const uintptr_t word : words) ++of_bank[word % kBanks];
  return std::max(*std::max_element(of_bank, of_bank + kBanks) - 1, 0);
}

void note_shared(const void* address, size_t bytes, std::source_location where) {
  Thread* self = machine.current;
  self->shared_accesses.push_back({address, bytes, self->copy_group, where});
}

void count_conflicts(const Block& block) {
  for (size_t first = 0; first < block.threads.size(); first += kLanes) {
    std::map<std::tuple<const char*, unsigned, unsigned, int>, Lanes> places;
    for (size_t i = first; i < std::min(first + kLanes, block.threads.size()); ++i) {
      for (const SharedAccess& access : block.threads[i]->shared_accesses) {
        const auto& where = access.where;
        Lanes& lanes = places[{where.file_name(), where.line(), where.column(), access.copy_group}];
        lanes[i - first].push_back(&access);
      }
    }
    for (const auto& [place, lanes] : places) count_place(lanes);
  }
  for (Thread* thread : block.threads) thread->shared_accesses.clear();
}

}  // namespace specdec::emu
