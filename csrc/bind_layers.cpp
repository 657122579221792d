// Binds the CPU kernels of a model's layers to the PyTorch dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/after_attention.hpp"
#include "core/before_attention.hpp"
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
  const int64_t pairs = (num_features + 1) / 2;
  if (panels.size(0) != outputs || panels.size(1) != pairs || panels.size(2) != kPanelOutputs ||
      panels.size(3) != 2) {
    fail("%s: %spanels of a weight [%ld, %ld] must be [%ld, %ld, 16, 2], got [%ld, %ld, %ld, %ld]",
         op, name, num_outputs, num_features, outputs, pairs, panels.size(0), panels.size(1),
         panels.size(2), panels.size(3));
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

auto packed_linear_cpu(const Tensor& x, const Tensor& panels, int64_t num_outputs,
                       OptionalTensor bias) {
  check_shapes("packed_linear", {x, panels, bias});
  check_panels("packed_linear", "", panels, num_outputs, x.size(1), bias);
  const Tensor rows = with_unit_stride(x);
  const Tensor packed_panels = packed(panels);
  const OptionalTensor packed_bias = packed(bias);
  Output out({x.size(0), num_outputs}, ScalarType::BFloat16);
  const TensorView out_view{
      out.data<Bfloat16>(), DType::kBfloat16, {x.size(0), num_outputs}, {num_outputs, 1}};
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

  PackedLayer layer() const {
    return {data<Bfloat16>(panels), data<Bfloat16>(bias), int32(num_outputs)};
  }
};

auto before_attention_cpu(const Tensor& x, const Tensor& norm_weight, double epsilon,
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
  const Tensor rows = packed(x), scale = packed(norm_weight);
  const OptionalTensor q_scale = packed(q_norm_weight), k_scale = packed(k_norm_weight);
  const Tensor cosines = with_unit_stride(cos), sines = with_unit_stride(sin);
  Output q_out({batch, num_heads, nodes, dim}, ScalarType::BFloat16);
  Output k_out({batch, num_groups, nodes, dim}, ScalarType::BFloat16);
  // In the order of its product.
  const int64_t v_strides[] = {nodes * num_groups * dim, dim, num_groups * dim, 1};
  Output v_out({batch, num_groups, nodes, dim}, v_strides, ScalarType::BFloat16);
  cpu_kernels().before_attention({
      .x = data<Bfloat16>(rows),
      .norm_weight = data<Bfloat16>(scale),
      .q = q.layer(),
      .k = k.layer(),
      .v = v.layer(),
      .q_norm_weight = data<Bfloat16>(q_scale),
      .k_norm_weight = data<Bfloat16>(k_scale),
      .cos = data<Bfloat16>(cosines),
      .sin = data<Bfloat16>(sines),
      .q_out = q_out.data<Bfloat16>(),
      .k_out = k_out.data<Bfloat16>(),
      .v_out = v_out.data<Bfloat16>(),
      .stride_cos_b = cosines.stride(0),
      .stride_cos_n = cosines.stride(1),
      .stride_sin_b = sines.stride(0),
      .stride_sin_n = sines.stride(1),
      .batch = int32(batch),
      .nodes = int32(nodes),
      .features = int32(features),
      .heads = int32(num_heads),
      .groups = int32(num_groups),
      .head_dim = int32(dim),
      .epsilon = static_cast<float>(epsilon),
  });
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
  Output out({batch, nodes, features}, ScalarType::BFloat16);
  cpu_kernels().after_attention({
      .attended = data<Bfloat16>(values),
      .residual = data<Bfloat16>(rows),
      .norm_weight = data<Bfloat16>(scale),
      .o = o.layer(),
      .gate = gate.layer(),
      .up = up.layer(),
      .down = down.layer(),
      .out = out.data<Bfloat16>(),
      .stride_attended_b = values.stride(0),
      .stride_attended_h = values.stride(1),
      .stride_attended_n = values.stride(2),
      .batch = int32(batch),
      .nodes = int32(nodes),
      .features = int32(features),
      .heads = int32(heads),
      .value_dim = int32(value_dim),
      .epsilon = static_cast<float>(epsilon),
  });
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
}
