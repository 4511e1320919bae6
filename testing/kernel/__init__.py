"""Cases for kernel checks: each op's definition in float64, drawn and fixed calls, and trials of a kernel on them."""
