"""Looking at data: what `qrpo inspect` prints and `qrpo browse` serves.

command    which answer the options of `qrpo inspect` ask for
stage      one artifact: schema, lineage, numbers and rows
rows       an artifact's rows by position: read them, find those that a query asks for
filters    SQL conditions from users, which see the row's own columns only
summary    nulls, quantiles and a histogram of every numeric column
lookup     rows of given prompts in other stages, found through the parts' parents
prompt     one prompt through every stage
diff       the same stage of two runs
export     rows into a file, or onto the Hugging Face hub
terminal   all of that in a terminal
"""
