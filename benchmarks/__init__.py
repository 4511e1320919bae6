"""Speed and memory of operations and models beside other implementations, interleaved in one run.

measure, machine, products   interleaved times; what the machine can do; the products that a call cannot be faster than
suite                        one benchmark: implementations warm, measured, and what they are shares of
op, recurrences, models      the benchmarks: of retention's op; of every op family beside a loop over tokens; of whole
                             models that are trained, read and decode
learn                        what small models reach on a text, and in what time
peers/                       the models: ours, the same hand-written, and a file for each other project
report                       a table's cells, JSON, Markdown, plot
gpu                          all that needs a GPU, in one go
"""
