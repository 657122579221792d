#pragma once

#include "after_attention.hpp"
#include "before_attention.hpp"
#include "tree_attention.hpp"
#include "write_kv.hpp"

namespace specdec {

// One decoder layer. What a part writes is what the next one reads.
struct StackedLayer {
  BeforeAttentionParams before;
  WriteKvParams write;
  TreeAttentionParams attention;
  AfterAttentionParams after;
};

inline constexpr int64_t kMostJoined = 64;  // one word of ancestors

struct LayerStackParams {
  const StackedLayer* layers;
  int64_t num_layers;
  // [B], where the nodes of each request begin among those of all, one request behind the other; of
  // at most kMostJoined nodes each. Null where every request has a row of N of its own.
  const int64_t* firsts;
};

}  // namespace specdec
