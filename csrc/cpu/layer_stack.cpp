// Decoder layers in turn, by the kernels of their parts. Nothing but these runs between two layers:
// of a small model's few rows, what an interpreter does there takes a fifth of the time. Bytes
// moved: the panels, and the keys and values of visible slots, once.
#include "../core/layer_stack.hpp"

namespace specdec::SPECDEC_ISA {

void after_attention(const AfterAttentionParams&);
void before_attention(const BeforeAttentionParams&);
void tree_attention(const TreeAttentionParams&);
void write_kv(const WriteKvParams&);

void layer_stack(const LayerStackParams& params) {
  for (int64_t i = 0; i < params.num_layers; ++i) {
    const StackedLayer& layer = params.layers[i];
    before_attention(layer.before);
    write_kv(layer.write);
    tree_attention(layer.attention);
    after_attention(layer.after);
  }
}

}  // namespace specdec::SPECDEC_ISA
