"""Speed and memory of operations and models beside other implementations, side by side in one run.

measure, machine, products   times in turn; what the machine can do; the products that a call cannot be quicker than
suite                        one benchmark: contestants warm, measured, and what they are shares of
op, train, decode, prefill   the four benchmarks; contestants: what the last three share
peers/                       the models: ours, the same by hand, and a file for each other project
report, command              table, JSON, Markdown, plot; `seqmix bench`
gpu                          all that needs a GPU, in one command
small_budget, lengths        scripts of their own: what small models learn in a given time; what a token costs in
                             training over the length
presets                      every mixer at one size
"""
