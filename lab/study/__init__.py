"""Studies: models trained under identical conditions, several runs at once, and the comparison of their results.

study, entries, plan        the YAML file; configurations of its entries; its runs, and the check that they are fair
equal_cost, equal_options   models of equal cost; options that are equal in all mixers
confounders, conclusion     what else differs between entries; the answer, and what it can be attributed to
runner, worker, lock        processes of runs: start, stop, resume; the process of one run; the lock of a study's folder
run_results, summary, results   measurements of runs; statistics over seeds; values and results.json
speed, scaling              speed of the entries, measured by the benchmarks; power law of the loss over model size
report, study_figures, config_differences, tables   report.html: its parts, figures and tables; differences of models
run_figures                 figures of runs, for `seqmix plot`
"""
