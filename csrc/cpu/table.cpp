// Lists the kernels compiled for one instruction set.
#include "kernels.hpp"

namespace specdec::SPECDEC_ISA {

void after_attention(const AfterAttentionParams&);
void before_attention(const BeforeAttentionParams&);
void build_tree(const BuildTreeParams&);
void commit(const CommitParams&);
uint64_t fingerprint(const void*, int64_t);
void layer_stack(const LayerStackParams&);
int64_t multiply_registers(int64_t);
void packed_linear(const PackedLinearParams&);
void rms_norm(const RmsNormParams&);
void rope(const RopeParams&);
void sample(const SampleParams&);
void topk_logprobs(const TopkLogprobsParams&);
void tree_attention(const TreeAttentionParams&);
void tree_mask(const TreeMaskParams&);
void verify(const VerifyParams&);
void write_kv(const WriteKvParams&);

extern const CpuKernels kernels;
const CpuKernels kernels{
    SPECDEC_ISA_NAME, after_attention,    before_attention, build_tree, commit,  fingerprint,
    layer_stack,      multiply_registers, packed_linear,    rms_norm,   rope,    sample,
    topk_logprobs,    tree_attention,     tree_mask,        verify,     write_kv};

}  // namespace specdec::SPECDEC_ISA
