"""Studies: models that are trained alike, several runs at once, and what they found.

study, match, plan     the YAML file; models of equal cost; from a study to its runs, and whether they are fair
runner, worker         processes that are resumed, stopped and locked; one of them
collect, summary, results   figures out of runs' folders; over seeds; as values and results.json
speed                  the entries' speed, by the benchmarks
report, plots, differences   the page that shows it: its parts, its charts, what configurations share
curves, plot_command   the curves of runs at hand, `seqmix plot`
chart, palette, svg, image, page, markup   charts as values, and how they are drawn: SVG, PNG, HTML
progress, tables, command   the terminal, tables, `seqmix compare`
studies/               studies that come with the package
"""
