// Schemas of the raw ops that C++ implements, made by csrc/schemas.py from what the ops register.
#pragma once

namespace sora {

struct Schemas {
  const char *name, *forward, *backward;
};

namespace schemas {

constexpr Schemas bias_gelu{
    "bias_gelu",
    "(Tensor x, Tensor? bias) -> Tensor",
    "(Tensor dy, Tensor x, Tensor? bias, bool need_dbias) -> (Tensor, Tensor)"};

constexpr Schemas causal_conv_pad{
    "causal_conv_pad",
    "(Tensor x, Tensor? cache, SymInt pad_t, SymInt top, SymInt bottom, SymInt left, SymInt "
    "right, bool replicate, SymInt keep) -> (Tensor, Tensor)",
    "(Tensor dpadded, Tensor dkept, SymInt cache_frames, SymInt pad_t, SymInt top, SymInt "
    "bottom, SymInt left, SymInt right, bool replicate, int needs) -> (Tensor, Tensor)"};

constexpr Schemas gate_residual{
    "gate_residual",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? gate_table, Tensor? weight, Tensor? index, "
    "SymInt tokens_per_row, bool tanh, int norm, float eps, int law) -> (Tensor, Tensor, "
    "Tensor)",
    "(Tensor dout, Tensor? y, Tensor mean, Tensor rstd, Tensor? gate, Tensor? gate_table, "
    "Tensor? weight, Tensor? index, Tensor? order, Tensor? offsets, SymInt tokens_per_row, bool "
    "tanh, int norm, int law, ScalarType y_dtype, int needs) -> (Tensor, Tensor, Tensor)"};

constexpr Schemas gate_residual_norm_modulate{
    "gate_residual_norm_modulate",
    "(Tensor x, Tensor y, Tensor? y2, Tensor? gate, Tensor? gate2, Tensor? weight, Tensor? "
    "bias, Tensor? shift, Tensor? scale, Tensor? gate_table, Tensor? shift_table, Tensor? "
    "scale_table, Tensor? index, SymInt tokens_per_row, float eps, bool rms, int law, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "(Tensor? dresidual, Tensor dnormed, Tensor x, Tensor? y, Tensor? y2, Tensor mean, Tensor "
    "rstd, Tensor? gate, Tensor? gate2, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? "
    "scale, Tensor? gate_table, Tensor? shift_table, Tensor? scale_table, Tensor? index, "
    "Tensor? order, Tensor? offsets, SymInt tokens_per_row, bool rms, int law, ScalarType "
    "y_dtype, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)"};

constexpr Schemas guided_step{
    "guided_step",
    "(Tensor x, Tensor cond, Tensor? uncond, Tensor guidance, Tensor weight, Tensor? index, "
    "SymInt tokens_per_row) -> Tensor",
    "(Tensor dout, Tensor guidance, Tensor weight, Tensor? index, SymInt tokens_per_row, "
    "ScalarType dtype, bool guided, int needs) -> (Tensor, Tensor)"};

constexpr Schemas norm_modulate{
    "norm_modulate",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, Tensor? "
    "shift_table, Tensor? scale_table, Tensor? shift2, Tensor? scale2, Tensor? index, SymInt "
    "tokens_per_row, float eps, bool rms, int law, ScalarType out_dtype) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    "(Tensor dy, Tensor? dy2, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "Tensor? shift, Tensor? scale, Tensor? shift_table, Tensor? scale_table, Tensor? shift2, "
    "Tensor? scale2, Tensor? index, Tensor? order, Tensor? offsets, SymInt tokens_per_row, bool "
    "rms, int law, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"};

constexpr Schemas norm_silu{
    "norm_silu",
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, float floor, bool silu, "
    "bool channels_last) -> (Tensor, Tensor, Tensor)",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int groups, "
    "float floor, bool silu, bool channels_last, int needs) -> (Tensor, Tensor, Tensor)"};

constexpr Schemas patchify{
    "patchify",
    "(Tensor[] videos, SymInt[] grids, SymInt[] tiles, SymInt[] patch) -> Tensor",
    "(Tensor tokens, SymInt[] grids, SymInt[] tiles, SymInt[] patch, SymInt channels) -> "
    "Tensor[]"};

constexpr Schemas qk_norm_rope{
    "qk_norm_rope",
    "(Tensor[] q, Tensor[] k, Tensor[]? v, Tensor[]? q_weight, Tensor[]? k_weight, Tensor[]? "
    "q_bias, Tensor[]? k_bias, Tensor[]? index, SymInt tokens, Tensor? cos, Tensor? sin, "
    "Tensor? positions, Tensor? parts, Tensor? k_cos, Tensor? k_sin, Tensor? k_positions, "
    "Tensor? k_parts, int part_size, SymInt first_token, int k_part_size, SymInt k_first_token, "
    "int[] axes, int norm, float eps, int pairing, int law) -> (Tensor, Tensor, Tensor)",
    "(Tensor? dyq, Tensor? dyk, Tensor? dyv, Tensor[] q, Tensor[] k, Tensor[]? v, Tensor[]? "
    "q_weight, Tensor[]? k_weight, Tensor[]? q_bias, Tensor[]? k_bias, Tensor[]? index, SymInt "
    "tokens, Tensor? cos, Tensor? sin, Tensor? positions, Tensor? parts, Tensor? k_cos, Tensor? "
    "k_sin, Tensor? k_positions, Tensor? k_parts, int part_size, SymInt first_token, int "
    "k_part_size, SymInt k_first_token, int[] axes, int norm, float eps, int pairing, int law, "
    "int[] needs) -> Tensor[]"};

}  // namespace schemas
}  // namespace sora
