"""Everything that trains, measures or looks into models to answer a question; most commands have a folder.

study/      `seqmix compare`: models trained under identical conditions; studies/ has those that come with the package
suite/      `seqmix suite`: tasks that separate mixers, each a study
paper/      `seqmix paper`: the claims of the RetNet paper, each a study
bench/      `seqmix bench`: speed and memory; peers/ has one file per other library
linearize/  `seqmix linearize`: other mixers for a trained model
inspect/    `seqmix inspect`: what a trained model does with a text
precision/  `seqmix precision`: the loss of a model whose state has fewer bits
playground/ `seqmix playground`: a page that runs trained models in a browser
figures/    figures as values, and their drawing as HTML, SVG, PNG and PDF
coordinates `seqmix coordinates`: the coordinate check of muP
pages       Markdown pages with generated regions
units       numbers with units
"""
