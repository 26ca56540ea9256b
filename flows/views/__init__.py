"""What a person reads about runs and artifacts. Nothing here writes to the store.

runs      a run's artifacts: manifests, lineage, and helpers that every view uses
show      `qrpo ls` and `qrpo show`
inspect/  `qrpo inspect`: rows, numbers, one prompt, differences, exports
browse/   `qrpo browse`: the same as web pages
report/   `qrpo report`: a run as one HTML page
plan      `qrpo plan`: what a run would compute
results   what `qrpo theory`, `run`, `evaluate` and `compare` found
text      text that models wrote, made harmless
"""
