// The CPU kernels of one instruction set, and the choice of the set.
#pragma once

#include <cstdint>

namespace specdec {

struct AfterAttentionParams;
struct BeforeAttentionParams;
struct BuildTreeParams;
struct CommitParams;
struct LayerStackParams;
struct PackedLinearParams;
struct RmsNormParams;
struct RopeParams;
struct SampleParams;
struct TopkLogprobsParams;
struct TreeAttentionParams;
struct TreeMaskParams;
struct VerifyParams;
struct WriteKvParams;

struct CpuKernels {
  const char* name;
  void (*after_attention)(const AfterAttentionParams&);
  void (*before_attention)(const BeforeAttentionParams&);
  void (*build_tree)(const BuildTreeParams&);
  void (*commit)(const CommitParams&);
  uint64_t (*fingerprint)(const void* values, int64_t num_bytes);
  void (*layer_stack)(const LayerStackParams&);
  int64_t (*multiply_registers)(int64_t rounds);  // on each thread; how many operations that was
  void (*packed_linear)(const PackedLinearParams&);
  void (*rms_norm)(const RmsNormParams&);
  void (*rope)(const RopeParams&);
  void (*sample)(const SampleParams&);
  void (*topk_logprobs)(const TopkLogprobsParams&);
  void (*tree_attention)(const TreeAttentionParams&);
  void (*tree_mask)(const TreeMaskParams&);
  void (*verify)(const VerifyParams&);
  void (*write_kv)(const WriteKvParams&);
};

// Those of the widest instruction set that this CPU and SPECDEC_CPU_CAPABILITY allow.
const CpuKernels& cpu_kernels();

}  // namespace specdec
