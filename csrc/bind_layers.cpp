// Binds the CPU kernels of a model's layers to the PyTorch dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "core/after_attention.hpp"
#include "core/before_attention.hpp"
#include "core/layer_stack.hpp"
#include "cpu/error.hpp"
#include "cpu/kernels.hpp"
#include "shape_table.hpp"
#include "tensor.hpp"

namespace specdec {
namespace {

// Of a weight [num_outputs, num_features], and its bias.
void check_panels(const char* op, const char* name, const Tensor& panels, int64_t num_outputs,
                  int64_t num_features, const OptionalTensor& bias) {
  const int64_t outputs = num_outputs > 0 ? (num_outputs + kPanelOutputs - 1) / kPanelOutputs : 0;
  int64_t width = 0;
  with_dtype(dtype_of(panels), [&](auto tag) { width = kPanelFeatures<decltype(tag)>; });
  const int64_t features = (num_features + width - 1) / width;
  if (panels.size(0) != outputs || panels.size(1) != features || panels.size(2) != kPanelOutputs ||
      panels.size(3) != width) {
    fail(
        "%s: %spanels of a weight [%ld, %ld] must be [%ld, %ld, %d, %ld], got [%ld, %ld, %ld, %ld]",
        op, name, num_outputs, num_features, outputs, features, kPanelOutputs, width,
        panels.size(0), panels.size(1), panels.size(2), panels.size(3));
  }
  if (bias && bias->size(0) != num_outputs) {
    fail("%s: %sbias must be [%ld], got [%ld]", op, name, num_outputs, bias->size(0));
  }
}

// The tensor, or a copy with unit stride in its last dimension.
Tensor with_unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

const void* pointer(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

auto packed_linear_cpu(const Tensor& x, const Tensor& panels, int64_t num_outputs,
                       OptionalTensor bias) {
  check_shapes("packed_linear", {x, panels, bias});
  check_panels("packed_linear", "", panels, num_outputs, x.size(1), bias);
  const Tensor rows = with_unit_stride(x);
  const Tensor packed_panels = packed(panels);
  const OptionalTensor packed_bias = packed(bias);
  Output out({x.size(0), num_outputs}, x.scalar_type());
  const TensorView out_view{
      out.data<void>(), dtype_of(x), {x.size(0), num_outputs}, {num_outputs, 1}};
  cpu_kernels().packed_linear(packed_linear_params(view(rows), view(packed_panels), num_outputs,
                                                   view(packed_bias), out_view));
  return released(out);
}

auto rms_norm_cpu(const Tensor& x, const Tensor& weight, double epsilon) {
  check_shapes("rms_norm", {x, weight});
  const Tensor rows = with_unit_stride(x), scale = packed(weight);
  const TensorView rows_view = view(rows);
  Output out({x.size(0), x.size(1)}, x.scalar_type());
  const TensorView out_view{
      out.data<void>(), rows_view.dtype, {x.size(0), x.size(1)}, {x.size(1), 1}};
  cpu_kernels().rms_norm(rms_norm_params(rows_view, view(scale), epsilon, out_view));
  return released(out);
}

auto rope_cpu(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_shapes("rope", {q, k, cos, sin});
  if (q.size(3) % 2 != 0) {
    fail("rope: D must be even, got %ld", q.size(3));
  }
  const Tensor queries = with_unit_stride(q), keys = with_unit_stride(k);
  const Tensor cosines = with_unit_stride(cos), sines = with_unit_stride(sin);
  Output q_out({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
  Output k_out({k.size(0), k.size(1), k.size(2), k.size(3)}, q.scalar_type());
  cpu_kernels().rope(rope_params(view(queries), view(keys), view(cosines), view(sines),
                                 q_out.data<void>(), k_out.data<void>()));
  return released(q_out, k_out);
}

// A packed linear layer; keeps the copies alive.
struct PackedTensors {
  Tensor panels;
  OptionalTensor bias;
  int64_t num_outputs;

  PackedTensors(const char* op, const char* name, const Tensor& panels, const OptionalTensor& bias,
                int64_t num_outputs, int64_t num_features)
      : panels(packed(panels)), bias(packed(bias)), num_outputs(num_outputs) {
    check_panels(op, name, panels, num_outputs, num_features, bias);
  }

  PackedLayer layer() const { return {panels.const_data_ptr(), pointer(bias), int32(num_outputs)}; }
};

// What does not change from layer to layer of a model.
BeforeAttentionParams before_attention_params(const Tensor& cos, const Tensor& sin,
                                              int64_t features, int64_t num_heads,
                                              int64_t num_groups, double epsilon) {
  BeforeAttentionParams params{};
  params.cos = cos.const_data_ptr();
  params.sin = sin.const_data_ptr();
  params.stride_cos_b = cos.stride(0);
  params.stride_cos_n = cos.stride(1);
  params.stride_sin_b = sin.stride(0);
  params.stride_sin_n = sin.stride(1);
  params.batch = int32(cos.size(0));
  params.nodes = int32(cos.size(1));
  params.features = int32(features);
  params.heads = int32(num_heads);
  params.groups = int32(num_groups);
  params.head_dim = int32(cos.size(2));
  params.epsilon = static_cast<float>(epsilon);
  params.dtype = dtype_of(cos);
  return params;
}

AfterAttentionParams after_attention_params(const TensorView& attended, int64_t features,
                                            double epsilon) {
  AfterAttentionParams params{};
  params.attended = attended.data;
  params.stride_attended_b = attended.stride(0);
  params.stride_attended_h = attended.stride(1);
  params.stride_attended_n = attended.stride(2);
  params.batch = int32(attended.size(0));
  params.nodes = int32(attended.size(2));
  params.features = int32(features);
  params.heads = int32(attended.size(1));
  params.value_dim = int32(attended.size(3));
  params.epsilon = static_cast<float>(epsilon);
  params.dtype = attended.dtype;
  return params;
}

auto before_attention_cpu(const Tensor& x, OptionalTensor norm_weight, double epsilon,
                          const Tensor& q_panels, const Tensor& k_panels, const Tensor& v_panels,
                          const Tensor& cos, const Tensor& sin, int64_t num_heads,
                          int64_t num_groups, OptionalTensor q_bias, OptionalTensor k_bias,
                          OptionalTensor v_bias, OptionalTensor q_norm_weight,
                          OptionalTensor k_norm_weight) {
  const char* op = "before_attention";
  check_shapes(op, {x, norm_weight, q_panels, k_panels, v_panels, cos, sin, q_bias, k_bias, v_bias,
                    q_norm_weight, k_norm_weight});
  const int64_t batch = x.size(0), nodes = x.size(1), features = x.size(2), dim = cos.size(2);
  if (dim % 2 != 0) fail("%s: D must be even, got %ld", op, dim);
  const PackedTensors q(op, "q_", q_panels, q_bias, num_heads * dim, features);
  const PackedTensors k(op, "k_", k_panels, k_bias, num_groups * dim, features);
  const PackedTensors v(op, "v_", v_panels, v_bias, num_groups * dim, features);
  const Tensor rows = packed(x);
  const OptionalTensor scale = packed(norm_weight);
  const OptionalTensor q_scale = packed(q_norm_weight), k_scale = packed(k_norm_weight);
  const Tensor cosines = with_unit_stride(cos), sines = with_unit_stride(sin);
  Output q_out({batch, num_heads, nodes, dim}, x.scalar_type());
  Output k_out({batch, num_groups, nodes, dim}, x.scalar_type());
  // In the order of its product.
  const int64_t v_strides[] = {nodes * num_groups * dim, dim, num_groups * dim, 1};
  Output v_out({batch, num_groups, nodes, dim}, v_strides, x.scalar_type());
  BeforeAttentionParams params =
      before_attention_params(cosines, sines, features, num_heads, num_groups, epsilon);
  params.x = rows.const_data_ptr();
  params.norm_weight = pointer(scale);
  params.q = q.layer(), params.k = k.layer(), params.v = v.layer();
  params.q_norm_weight = pointer(q_scale);
  params.k_norm_weight = pointer(k_scale);
  params.q_out = q_out.data<void>();
  params.k_out = k_out.data<void>();
  params.v_out = v_out.data<void>();
  cpu_kernels().before_attention(params);
  return released(q_out, k_out, v_out);
}

auto after_attention_cpu(const Tensor& attended, const Tensor& residual, const Tensor& o_panels,
                         const Tensor& norm_weight, double epsilon, const Tensor& gate_panels,
                         const Tensor& up_panels, const Tensor& down_panels, int64_t num_hidden,
                         OptionalTensor o_bias, OptionalTensor gate_bias, OptionalTensor up_bias,
                         OptionalTensor down_bias) {
  const char* op = "after_attention";
  check_shapes(op, {attended, residual, o_panels, norm_weight, gate_panels, up_panels, down_panels,
                    o_bias, gate_bias, up_bias, down_bias});
  const int64_t batch = residual.size(0), nodes = residual.size(1), features = residual.size(2);
  const int64_t heads = attended.size(1), value_dim = attended.size(3);
  const PackedTensors o(op, "o_", o_panels, o_bias, features, heads * value_dim);
  const PackedTensors gate(op, "gate_", gate_panels, gate_bias, num_hidden, features);
  const PackedTensors up(op, "up_", up_panels, up_bias, num_hidden, features);
  const PackedTensors down(op, "down_", down_panels, down_bias, features, num_hidden);
  const Tensor values = with_unit_stride(attended), rows = packed(residual);
  const Tensor scale = packed(norm_weight);
  Output out({batch, nodes, features}, residual.scalar_type());
  AfterAttentionParams params = after_attention_params(view(values), features, epsilon);
  params.residual = rows.const_data_ptr();
  params.norm_weight = scale.const_data_ptr();
  params.o = o.layer(), params.gate = gate.layer(), params.up = up.layer();
  params.down = down.layer();
  params.out = out.data<void>();
  cpu_kernels().after_attention(params);
  return released(out);
}

// Lists of so many tensors, or where they may be left out, of none.
void check_count(const char* name, size_t got, size_t wanted, size_t num_layers,
                 bool is_optional = false) {
  if (got == wanted || (is_optional && got == 0)) return;
  fail("layer_stack: %s must be %s%zu for %zu layers, got %zu", name, is_optional ? "0 or " : "",
       wanted, num_layers, got);
}

// Where the nodes of each request begin in x [1, T, F], which holds the T of all; none of x [B, N,
// F].
std::vector<int64_t> firsts_in(const Tensor& x, const Tensor& depths, const Tensor& num_nodes) {
  const int64_t batch = depths.size(0), nodes = depths.size(1);
  if (x.size(0) == batch && x.size(1) == nodes) return {};
  std::vector<int64_t> firsts;
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    firsts.push_back(total);
    total += std::clamp<int64_t>(num_nodes.const_data_ptr<int32_t>()[b], 0, nodes);
  }
  if (x.size(0) != 1 || x.size(1) != total || nodes > kMostJoined) {
    fail(
        "layer_stack: x must be [B, N, F] = [%ld, %ld, F], or [1, T, F] with the T = %ld nodes of "
        "trees of N <= %ld, got [%ld, %ld, F]",
        batch, nodes, total, kMostJoined, x.size(0), x.size(1));
  }
  return firsts;
}

auto layer_stack_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin,
                     std::vector<Tensor> k_caches, std::vector<Tensor> v_caches,
                     const Tensor& ancestors, const Tensor& depths, const Tensor& lengths,
                     const Tensor& num_nodes, std::vector<Tensor> norm_weights,
                     std::vector<Tensor> panels, std::vector<Tensor> biases,
                     std::vector<Tensor> head_norm_weights, std::vector<int64_t> windows,
                     int64_t num_heads, int64_t num_hidden, double epsilon, double scale,
                     double softcap, OptionalTensor entry) {
  const char* op = "layer_stack";
  check_shapes(op, {x, cos, sin, k_caches, v_caches, ancestors, depths, lengths, num_nodes,
                    norm_weights, panels, biases, head_norm_weights, entry});
  const size_t num = k_caches.size();
  if (num == 0) fail("%s: k_caches must be of one layer or more, got none", op);
  check_count("v_caches", v_caches.size(), num, num);
  check_count("norm_weights", norm_weights.size(), 2 * num, num);
  check_count("panels", panels.size(), 7 * num, num);
  check_count("biases", biases.size(), 7 * num, num, true);
  check_count("head_norm_weights", head_norm_weights.size(), 2 * num, num, true);
  check_count("windows", windows.size(), num, num);
  const int64_t batch = x.size(0), nodes = x.size(1), features = x.size(2), dim = cos.size(2);
  const int64_t num_groups = k_caches[0].size(1), trees = depths.size(0), most = depths.size(1);
  if (dim % 2 != 0) fail("%s: D must be even, got %ld", op, dim);
  if (num_groups == 0 || num_heads % num_groups != 0) {
    fail("%s: num_heads must be a multiple of key/value heads, got %ld and %ld", op, num_heads,
         num_groups);
  }
  const Tensor rows = packed(x), cosines = with_unit_stride(cos), sines = with_unit_stride(sin);
  const Tensor bits = packed(ancestors), levels = packed(depths);
  const Tensor starts = packed(lengths), sizes = packed(num_nodes);
  const std::vector<int64_t> firsts = firsts_in(x, depths, sizes);
  std::vector<Tensor> kept;  // copies of what is not contiguous
  const auto values = [&](const Tensor& tensor) {
    return kept.emplace_back(packed(tensor)).const_data_ptr();
  };

  // Each layer finds in `out` what the one before it left there.
  Output q({batch, num_heads, nodes, dim}, x.scalar_type());
  Output k({batch, num_groups, nodes, dim}, x.scalar_type());
  Output v({batch, nodes, num_groups, dim}, x.scalar_type());
  Output attended({batch, nodes, num_heads, dim}, x.scalar_type());
  Output out({batch, nodes, features}, x.scalar_type());
  const DType dtype = dtype_of(x);
  // As the trees see them: the strides are those of all nodes.
  const auto by_head = [&](const Output& heads, int64_t count) -> TensorView {
    return {heads.data<void>(),
            dtype,
            {trees, count, most, dim},
            {count * nodes * dim, nodes * dim, dim, 1}};
  };
  const auto by_node = [&](const Output& heads, int64_t count, int64_t rows,
                           int64_t columns) -> TensorView {
    return {heads.data<void>(),
            dtype,
            {rows, count, columns, dim},
            {count * nodes * dim, dim, count * dim, 1}};
  };
  const TensorView attended_view{attended.data<void>(), dtype, {trees, most, num_heads, dim}, {}};
  const BeforeAttentionParams before =
      before_attention_params(cosines, sines, features, num_heads, num_groups, epsilon);
  const AfterAttentionParams after =
      after_attention_params(by_node(attended, num_heads, batch, nodes), features, epsilon);
  std::vector<StackedLayer> layers;
  layers.reserve(num);
  for (size_t i = 0; i < num; ++i) {
    const auto linear = [&](size_t j, const char* name, int64_t outputs, int64_t inputs) {
      const bool has_bias = !biases.empty() && biases[7 * i + j].size(0) > 0;
      const OptionalTensor bias = has_bias ? OptionalTensor(biases[7 * i + j]) : std::nullopt;
      const Tensor& weight = panels[7 * i + j];
      check_panels(op, ("layer " + std::to_string(i) + ": " + name).c_str(), weight, outputs,
                   inputs, bias);
      return PackedLayer{values(weight), bias ? values(*bias) : nullptr, int32(outputs)};
    };
    const TensorView k_cache = mutable_view(k_caches[i]), v_cache = mutable_view(v_caches[i]);
    StackedLayer& layer = layers.emplace_back(StackedLayer{
        before,
        write_kv_params(by_head(k, num_groups), by_node(v, num_groups, trees, most), k_cache,
                        v_cache, view(starts), view(sizes), std::nullopt),
        tree_attention_params(by_head(q, num_heads), k_cache, v_cache, view(bits), view(levels),
                              view(starts), view(sizes), std::nullopt, std::nullopt, attended_view,
                              std::nullopt, scale, windows[i], softcap),
        after,
    });
    const void* hidden = i == 0 ? rows.const_data_ptr() : out.data<void>();
    const int64_t width = num_heads * dim, narrow = num_groups * dim;
    const bool enters = i == 0 && entry;
    const int64_t inputs = enters ? entry->size(2) : features;
    layer.before.features = int32(inputs);
    layer.before.x = enters ? values(*entry) : hidden;
    layer.before.norm_weight = enters ? nullptr : values(norm_weights[2 * i]);
    layer.before.q = linear(0, "q_", width, inputs);
    layer.before.k = linear(1, "k_", narrow, inputs);
    layer.before.v = linear(2, "v_", narrow, inputs);
    if (!head_norm_weights.empty()) {
      layer.before.q_norm_weight = values(head_norm_weights[2 * i]);
      layer.before.k_norm_weight = values(head_norm_weights[2 * i + 1]);
    }
    layer.before.q_out = q.data<void>();
    layer.before.k_out = k.data<void>();
    layer.before.v_out = v.data<void>();
    layer.after.residual = hidden;
    layer.after.norm_weight = values(norm_weights[2 * i + 1]);
    layer.after.o = linear(3, "o_", features, width);
    layer.after.gate = linear(4, "gate_", num_hidden, features);
    layer.after.up = linear(5, "up_", num_hidden, features);
    layer.after.down = linear(6, "down_", features, num_hidden);
    layer.after.out = out.data<void>();
  }
  check_lengths(layers[0].attention);
  cpu_kernels().layer_stack(
      {layers.data(), static_cast<int64_t>(num), firsts.empty() ? nullptr : firsts.data()});
  return released(out);
}

}  // namespace
}  // namespace specdec

STABLE_TORCH_LIBRARY_IMPL(specdec_kernels, CPU, library) {
  library.impl("packed_linear", TORCH_BOX(&specdec::packed_linear_cpu));
  library.impl("rms_norm", TORCH_BOX(&specdec::rms_norm_cpu));
  library.impl("rope", TORCH_BOX(&specdec::rope_cpu));
  library.impl("before_attention", TORCH_BOX(&specdec::before_attention_cpu));
  library.impl("after_attention", TORCH_BOX(&specdec::after_attention_cpu));
  library.impl("layer_stack", TORCH_BOX(&specdec::layer_stack_cpu));
}
