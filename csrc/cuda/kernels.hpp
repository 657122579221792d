// The CUDA kernels, as bindings see them: params whose pointers are device memory, and a stream.
// Nothing waits for the device and nothing is read back, so every call can be captured in a graph.
// The host cannot see tensor contents: what the references reject in them is clamped or dropped, as
// each operator documents. A failed launch throws.
#pragma once

#include <cstddef>

namespace specdec {

struct BuildTreeParams;
struct CommitParams;
struct TopkLogprobsParams;
struct TreeAttentionParams;
struct TreeMaskParams;
struct WriteKvParams;

namespace cuda {

using Stream = void*;  // cudaStream_t

void commit(const CommitParams& params, Stream stream);
void tree_mask(const TreeMaskParams& params, Stream stream);
void write_kv(const WriteKvParams& params, Stream stream);

// `scratch` is device memory of that many bytes, with contents that do not matter.
size_t build_tree_scratch_bytes(const BuildTreeParams& params);
void build_tree(const BuildTreeParams& params, void* scratch, Stream stream);
size_t topk_logprobs_scratch_bytes(const TopkLogprobsParams& params);
void topk_logprobs(const TopkLogprobsParams& params, void* scratch, Stream stream);
size_t tree_attention_scratch_bytes(const TreeAttentionParams& params);
void tree_attention(const TreeAttentionParams& params, void* scratch, Stream stream);

}  // namespace cuda
}  // namespace specdec
