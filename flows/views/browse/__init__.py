"""`qrpo browse`: the store in a web page, read-only.

server     routes; who may ask (this machine, or a token; GET only); headers under which a browser
           runs nothing
pages      what each address shows, as values for a template; the address holds everything that was
           chosen
drawings   histograms and empirical distributions as SVG
tokens     a completion's tokens coloured by model against reference
templates/ static/

There is no script: links, forms and `<details>` do all of it, and the page's policy forbids
scripts.
"""
