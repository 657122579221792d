// Bank conflicts: how often lanes of a warp wait for one another in shared memory.
//
// An access of a warp takes a turn for each 128 bytes of its lanes, of which a bank gives one word;
// lanes that ask a bank for other words wait, those that ask for the same word do not. Lanes do not
// meet at their accesses here, so these are noted: the i-th of each lane in one place of the source
// and one group of cp.async, since the last barrier, are taken for one access of the warp. A loop
// that turns more often for some lanes than for their neighbours is therefore told wrong.
#pragma once

#include <cstddef>
#include <source_location>
#include <vector>

namespace specdec::emu {

struct Block;

// Of one lane.
struct SharedAccess {
  const void* address;
  size_t bytes;
  int copy_group;
  std::source_location where;
};

// Turns beyond the first that lanes take whose 4-byte words lie at `addresses`, in 128 bytes at
// most.
int turns_beyond_first(std::vector<const void*> addresses, size_t bytes);

// Notes an access of the current thread.
void note_shared(const void* address, size_t bytes, std::source_location where);

// Counts the conflicts of what was noted, and forgets it.
void count_conflicts(const Block& block);

}  // namespace specdec::emu
