"""`qrpo browse`: the store in a web page, read-only.

    server     who may ask: loopback or a token, GET alone, and headers under which a browser runs and fetches nothing
    pages      what each address shows, as values for a template; everything that is chosen stands in the address
    drawings   histograms, empirical distributions and the lineage as SVG
    tokens     a completion's tokens coloured by model against reference, where both log-probabilities are stored
    templates/ static/

There is no script: links, forms and `<details>` do all of it, so the page works with scripts forbidden, and they are.
"""
