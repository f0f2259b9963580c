"""Faults in the kernels, and the tests that must notice them."""

from faults.table import under

ROWS = (
    "api/test_functional api/test_functional_images -k 'outputs_and_gradients or many_windows or "
    "test_images or volumes'"
)

LARGE = "backends/test_large_windows"
EIGHT = "runtime/test_fp8_kernels"

# fmt: off
FAULTS = under(
    "kernels/triton",
    ("pointwise.py", "patches_ptr + out_offs, out, mask=inside", "patches_ptr + out_offs, out, mask=real",
     "runtime/test_fused_products"),
    ("pointwise_bwd.py", "branch_sums += grad", "branch_sums += total", "runtime/test_fused_products"),
    ("pointwise_bwd.py", "grad.to(grad_x_ptr.dtype.element_ty), mask=real", "grad, mask=inside",
     "runtime/test_fused_products"),
    ("pointwise_bwd.py", "for first in tl.range(0, parts, ROWS):", "for first in tl.range(0, ROWS, ROWS):",
     "runtime/test_fused_products"),
    ("linear.py", "_finish(right, row, col + HALF", "_finish(left, row, col + HALF", "runtime/test_fused_products"),
    ("linear_few.py", "tl.minimum(offs_m, rows - 1)", "(offs_m * 0)", "runtime/test_linear -k few"),
    ("linear_few.py", "offs_k = part * LENGTH + tl", "offs_k = tl", "runtime/test_linear -k parts"),
    ("linear_few.py", "    wait_for_inputs(DEPENDENT)\n", "", "runtime/test_linear -k wait"),
    ("pointwise.py", "branch_ptr += tl.cast(rows, tl.int64) * C", "pass", "runtime/test_linear -k parts"),
    ("pointwise.py", "source += load_channels(more_bias_ptr, offs_c, C)", "pass", "runtime/test_linear -k parts"),
    ("linear.py", "tile += added_desc.load([row, col]).to(tl.float32)", "pass",
     "runtime/test_linear -k 'sum or blocks'"),
    ("run.py", "copy.copy(compiled)[grid]", "compiled[grid]", "backends/test_triton_interface"),
    ("run.py", "lambda: not self._is_loading and not self._builders", "lambda: True", "backends/test_triton_interface"),
    # Packages of AOTInductor.
    ("traced.py", "isinstance(one, type) and issubclass(one, tuple)", "False", "runtime/test_packages"),
    ("traced.py", "isinstance(one, JITFunction) and", "False and", "runtime/test_packages"),
    ("pointwise.py", "tl.cast(eps, tl.float32)", "eps", "runtime/test_packages"),
    ("tiles.py", "q.to(tl.float32) * tl.cast(scale, tl.float32)", "q.to(tl.float32) * scale", "runtime/test_packages"),
    ("tiles.py", "tl.cast(dropout.probability, tl.float32)", "dropout.probability", "runtime/test_packages"),
    ("sequence_fwd.py", "scale = tl.cast(scale, tl.float32)  #", "scale = scale  #", "runtime/test_packages"),
    # Products of 8 bits.
    ("quantise.py", "tl.maximum(tl.max(tl.abs(tile), axis=1), SMALLEST)", "tl.max(tl.abs(tile), axis=1)", EIGHT),
    ("quantise.py", "scale = largest / 448.0", "scale = largest / 449.0", EIGHT),
    ("quantise.py", "scale_ptr + QKV + HIDDEN", "scale_ptr + QKV", EIGHT),
    ("quantise.py", "norm_ptr, fc1_ptr, pid", "None, fc1_ptr, pid", EIGHT),
    ("quantise.py", "SLACK = tl.constexpr(1 + 2**-6)", "SLACK = tl.constexpr(1.0)", EIGHT),
    ("quantise.py", "tl.sum(eighth * eighth, axis=1)", "tl.max(eighth * eighth, axis=1)", EIGHT),
    ("quantise.py", "tl.store(limits_ptr, tl.max(", "tl.store(limits_ptr, tl.sum(", EIGHT),
    ("quantise.py", " + tl.load(limits_ptr + 1)", "", EIGHT),
    ("quantise.py", "tl.max(tl.abs(tl.load(bias_ptr", "tl.max((tl.load(bias_ptr", EIGHT),
    ("quantise.py", "tl.where(bound < SMALLEST, SMALLEST, bound)", "bound", EIGHT),
    ("quantise.py", "tl.where(bound > LARGEST, LARGEST, ", "tl.where(bound != bound, LARGEST, ", EIGHT),
    ("linear8.py", "tl.minimum(offs, N - 1)", "offs * 0", EIGHT),
    ("linear8.py", "tile += tl.load(bias_ptr + offs).to(tl.float32)[None, :]", "pass", EIGHT),
    ("linear8.py", "tl.load(out_scale_ptr + row + offs_m", "tl.load(out_scale_ptr + offs_m", EIGHT),
    ("linear8.py", "tile += added_desc.load([row, col]).to(tl.float32)", "pass", EIGHT),
    ("linear8.py", "_finish_half(right, row, col + HALF", "_finish_half(right, row, col", EIGHT),
    # Biases of rows of windows.
    ("tiles.py", "window.number // geometry.windows[2] % BIAS_ROWS", "window.number % BIAS_ROWS",
     ROWS),
    ("tiles.py", "number = (position // columns * BIAS_ROWS + row) * columns + position % columns",
     "number = position * BIAS_ROWS + row", ROWS),
    ("window_bwd.py", "bias_row = group % BIAS_ROWS", "bias_row = 0", ROWS),
    ("window_bwd_bias.py", "bias_row = tl.program_id(1) % BIAS_ROWS", "bias_row = 0", ROWS),
    ("window_bwd_bias.py", "geometry, num_heads, BIAS_ROWS)\n", "geometry, num_heads, 1)\n", ROWS),
    # The kernel of two images.
    ("window_fwd_large.py", "k_ptr + stride_next,", "k_ptr,", "api/test_gaps -k two_images"),
    ("window_fwd_large.py", "v_ptr + stride_next,", "v_ptr,", "api/test_gaps -k two_images"),
    ("window_fwd_large.py", "tl.minimum(image + IMAGES - 1, batch - 1)", "image", "api/test_gaps -k two_images"),
    ("window_fwd_large.py", "next_state, next_scores, next_v, dropout, next_instance,",
     "next_state, next_scores, next_v, dropout, instance,", "api/test_gaps -k two_images"),
    # Weights below a bound, and masks in the bias.
    ("softmax.py", "(offs >= N)).to(tl.int32), axis=0) != 0", "(offs >= N)).to(tl.int32), axis=0) >= 0", LARGE),
    ("softmax.py", " & (tl.sum(out * 0.0, axis=1) == 0.0)", "", LARGE),
    ("softmax.py", "tl.log2(N * 1.0) - 12.0", "-15.0", LARGE),
    ("window_fwd_large.py", "enough = enough & are_enough", "enough = enough | are_enough", LARGE),
    ("window_fwd_large.py", "p = _weights_below(products, k, below)", "p = _weights_below(products, v, below)", LARGE),
    ("window_fwd_large.py", "state = _gather(state, p, v, dropout", "state = _gather(state, p, k, dropout", LARGE),
    ("tiles.py", "mask_kind(window, geometry) % KINDS", "0", LARGE),
    ("tiles.py", "(place[1] == windows[1] - 1).to(tl.int32) * 2", "(place[1] == 0).to(tl.int32) * 2", LARGE),
    ("bias.py", "            if KIND:", "            if KIND > 1:", LARGE),
    ("window_bwd_bias.py", "num_heads, BIAS_ROWS, KINDS)\n", "num_heads, BIAS_ROWS)\n", LARGE),
    # Windows, shifts and masks.
    ("tiles.py", "& (shift[1] > 0)) | ((place[2]", "& (shift[1] > 1)) | ((place[2]", "api/test_gaps -k shifted"),
    ("tiles.py", "n % WINDOW[2] >= WINDOW[2] - shift[2]", "n % WINDOW[2] > WINDOW[2] - shift[2]",
     "fuzz/test_fuzz_functions -k quick"),
    ("softmax.py", "tl.minimum(tl.maximum(narrow, -LIMIT), LIMIT), narrow)", "narrow, narrow)",
     "api/test_gaps -k lowest"),
    ("tiles.py", "at = tl.where(at >= length, at - length, at)", "at = tl.where(at > length, at - length, at)",
     "fuzz/test_fuzz_functions -k quick"),
    ("tiles.py", "(n < WINDOW[0] * WINDOW[1] * WINDOW[2]) & (real == 0)", "real == 0",
     "backends/test_nonfinite -k padding"),
    ("tiles.py", "tl.load(logit_scale_ptr + head).to(tl.float32), LOG_100)",
     "tl.load(logit_scale_ptr + head).to(tl.float32), 9.0)", "backends/test_backward -k clamped"),
    ("tiles.py", "1.0 / tl.maximum(1.0 - probability, 1e-6)", "1.0", "backends/test_operator_gradients -k dropout"),
    ("bias.py", '0.0, float("-inf")))', "0.0, 0.0))", "api/test_gaps -k 'not two'"),
    ("softmax.py", 'mask=offs < N, other=float("inf"))', "mask=offs < N, other=0.0)", "api/test_gaps -k 'not two'"),
    # The last tile of a window that is no multiple of one.
    ("window_fwd_large.py", "tl.range(0, N, BLOCK_N)", "tl.range(0, N - BLOCK_N + 1, BLOCK_N)",
     "api/test_gaps -k 'not two'"),
    ("window_bwd_large.py", "tl.range(0, N, BLOCK_M)", "tl.range(0, N - BLOCK_M + 1, BLOCK_M)",
     "api/test_gaps -k 'not two'"),
    ("window_bwd_large.py", "tl.range(0, N, BLOCK_N)", "tl.range(0, N - BLOCK_N + 1, BLOCK_N)",
     "api/test_gaps -k 'not two'"),
    ("bias.py", "tl.range(0, N, BLOCK)", "tl.range(0, N - BLOCK + 1, BLOCK)", "backends/test_backward -k table"),
    ("softmax.py", "return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)", "return tl.minimum(x, limit)",
     "backends/test_nonfinite"),
    ("softmax.py", "return tl.maximum(x, limit, propagate_nan=tl.PropagateNan.ALL)", "return tl.maximum(x, limit)",
     "backends/test_nonfinite"),
    ("softmax.py", " + grad_out * 0.0, axis=1", ", axis=1", "backends/test_nonfinite"),
    ("softmax.py", 'return tl.abs(x) < float("inf")', 'return x < float("inf")', "backends/test_nonfinite"),
    # Gradients.
    ("softmax.py", "(scores - maximum) * exponent - log_sum", "scores * exponent - (log_sum + maximum * exponent)",
     "api/test_gaps -k 'not two'"),
    ("window_bwd.py", "clamped = inverse > 0.9999e12", "clamped = inverse > 1e38", "backends/test_backward -k tiny"),
    ("window_bwd.py", "<= LOG_100, grad_scale, 0.0)", "<= 90.0, grad_scale, 0.0)", "backends/test_backward -k clamped"),
    ("window_bwd_large.py", "residual[:, None] * mean_key", "0.0 * mean_key", "backends/test_backward"),
    ("window_bwd_large.py", "delta + residual, mask", "delta, mask", "backends/test_backward -k sum_to_zero"),
    ("sequence_fwd.py", "seen = total != 0", "seen = total >= 0", "backends/test_sequence"),
    ("sequence_bwd.py", "ds = only_visible(ds, offs_m, visible, 0.0)", "ds = ds", "backends/test_nonfinite"),
    ("sequence_fwd.py", "(block + window_blocks) * block_size, num_tokens",
     "(block + window_blocks) * block_size - 1, num_tokens", "backends/test_sequence -k any_block"),
)
# fmt: on
