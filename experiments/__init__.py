"""Studies: models that are trained under identical conditions, several runs at once, and what they found.

study, match, plan     the YAML file; models of equal cost; from a study to its runs, and whether they are fair
runner, worker, lock   processes that are resumed, stopped and locked; one of them
measurements, collect, summary, results   what runs measured; over seeds; as values and results.json
speed, timings         the entries' speed, by the benchmarks; the charts of a benchmark
report, plots, differences, tables   the page that shows it: its parts, its charts, what configurations share; tables
curves                 the curves of runs at hand, for `seqmix plot`
chart, palette, svg, page, markup, files, drawing   charts as values, and how they are drawn: SVG, HTML, PNG and PDF
pages                  Markdown that programs write
studies/, retnet_paper/   studies that come with the package; the claims of the RetNet paper
suite/                 tasks that tell mixers apart, a study each
"""
