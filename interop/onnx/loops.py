"""Loops over tokens as ONNX functions: an operator Scan whose body is one token's step.

Inputs of a function are the state [B ..], constants, then tensors with one entry per token [B T ..]; its outputs are
the final state and the output of every token.
"""

import onnx
import onnx.parser
from onnx import ModelProto
from onnx.inliner import inline_local_functions

LOOPS = "seqmix"
"""Domain of the functions."""

DPLR = """
<domain: "seqmix", opset_import: ["" : 21]>
Dplr (state, q, k, v, a, b, log_decay) => (final, output) {
    final, output = Scan <num_scan_inputs = 6, scan_input_axes = [1, 1, 1, 1, 1, 1], scan_output_axes = [1],
    body = token (S, q_t, k_t, v_t, a_t, b_t, log_decay_t) => (S_t, o_t) {
        last = Constant <value_ints = [-1]> ()
        row = Constant <value_ints = [-2]> ()
        factor = Exp (log_decay_t)
        factors = Unsqueeze (factor, last)
        P = Mul (factors, S)
        a_row = Unsqueeze (a_t, row)
        read = MatMul (a_row, P)
        b_column = Unsqueeze (b_t, last)
        moved = Mul (b_column, read)
        k_column = Unsqueeze (k_t, last)
        v_row = Unsqueeze (v_t, row)
        written = Mul (k_column, v_row)
        changed = Add (P, moved)
        S_t = Add (changed, written)
        q_row = Unsqueeze (q_t, row)
        o_row = MatMul (q_row, S_t)
        o_t = Squeeze (o_row, row)
    }> (state, q, k, v, a, b, log_decay)
}
"""
"""S_t = (I + b_t a_t^T) P_t + k_t v_t^T with P_t = exp(log_decay_t) S_{t-1}, o_t = q_t S_t."""

LOG_SCAN = """
<domain: "seqmix", opset_import: ["" : 21]>
LogScan (state, x, log_decay) => (final, output) {
    final, output = Scan <num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1],
    body = token (h, x_t, log_decay_t) => (h_t, o_t) {
        decayed = Add (h, log_decay_t)
        largest = Max (decayed, x_t)
        old_distance = Sub (decayed, largest)
        new_distance = Sub (x_t, largest)
        old_share = Exp (old_distance)
        new_share = Exp (new_distance)
        total = Add (old_share, new_share)
        log_total = Log (total)
        h_t = Add (largest, log_total)
        o_t = Identity (h_t)
    }> (state, x, log_decay)
}
"""
"""h_t = log(exp(log_decay_t + h_{t-1}) + exp(x_t)), the output is h_t; x is finite, h_{t-1} may be -inf."""

DIAGONAL_SCAN = """
<domain: "seqmix", opset_import: ["" : 21]>
DiagonalScan (state, real, imaginary, weight_real, weight_imaginary, x) => (final, output) {
    last = Constant <value_ints = [-1]> ()
    halves = Constant <value_ints = [1, 1]> ()
    keys = Constant <value_ints = [1]> ()
    first_pair, second_pair = Split <axis = -1> (state, halves)
    h_real = Squeeze (first_pair, last)
    h_imaginary = Squeeze (second_pair, last)
    final_real, final_imaginary, output = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1],
    body = token (u, w, x_t) => (u_t, w_t, o_t) {
        x_row = Unsqueeze (x_t, keys)
        real_u = Mul (real, u)
        imaginary_w = Mul (imaginary, w)
        rotated_real = Sub (real_u, imaginary_w)
        u_t = Add (rotated_real, x_row)
        real_w = Mul (real, w)
        imaginary_u = Mul (imaginary, u)
        w_t = Add (real_w, imaginary_u)
        weighted_real = Mul (weight_real, u_t)
        weighted_imaginary = Mul (weight_imaginary, w_t)
        weighted = Sub (weighted_real, weighted_imaginary)
        o_t = ReduceSum <keepdims = 0> (weighted, keys)
    }> (h_real, h_imaginary, x)
    final_first = Unsqueeze (final_real, last)
    final_second = Unsqueeze (final_imaginary, last)
    final = Concat <axis = -1> (final_first, final_second)
}
"""
"""Complex h_t = (real + i imaginary) h_{t-1} + x_t, the output is Re(sum_k weight h_t), with h = u + i w."""


def grouped_linear(groups: int) -> str:
    """Return the function that multiplies the rows of each of some groups with the group's matrix."""
    matrices = [f"w_{n}" for n in range(groups)]
    rows = [f"x_{n}" for n in range(groups)]
    products = [f"y_{n}" for n in range(groups)]
    lines = [f"{y} = MatMul ({x}, {w})" for x, w, y in zip(rows, matrices, products, strict=True)]
    return f"""
<domain: "seqmix", opset_import: ["" : 21]>
GroupedLinear{groups} (x, ends, {", ".join(matrices)}) => (y) {{
    start = Constant <value_ints = [0]> ()
    without_last = Constant <value_ints = [-1]> ()
    stops = Cast <to = 7> (ends)
    stops_before = Slice (stops, start, without_last)
    starts = Concat <axis = 0> (start, stops_before)
    sizes = Sub (stops, starts)
    {", ".join(rows)} = Split <axis = 0> (x, sizes)
    {" ".join(lines)}
    y = Concat <axis = 0> ({", ".join(products)})
}}
"""


def inline_loops(model: ModelProto) -> ModelProto:
    """Return the model with the functions' bodies in the place of the nodes that call them."""
    used = {node.op_type for node in model.graph.node if node.domain == LOOPS}
    groups = [int(name.removeprefix("GroupedLinear")) for name in used if name.startswith("GroupedLinear")]
    texts = (DPLR, LOG_SCAN, DIAGONAL_SCAN, *map(grouped_linear, groups))
    functions = [onnx.parser.parse_function(text) for text in texts]
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    for function in functions:
        if function.name in used:
            function.opset_import[0].version = opset
            model.functions.append(function)
    inlined = inline_local_functions(model)
    kept = [entry for entry in inlined.opset_import if entry.domain != LOOPS]
    del inlined.opset_import[:]
    inlined.opset_import.extend(kept)
    return inlined
