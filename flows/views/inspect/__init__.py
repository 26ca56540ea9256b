"""Looking at data: what `qrpo inspect` prints and `qrpo browse` serves.

rows       an artifact's rows, by row group: only the columns and groups that are asked for
filters    SQL conditions from outside, which can look at the row at hand and at nothing else
query      which rows: condition, search, order, sample, page
summary    nulls, quantiles and a histogram of every numeric column
lookup     rows of given prompts in other stages, found through what their parts were made from
prompt     one prompt through every stage
diff       the same stage of two runs
export     rows into a file, or onto the Hugging Face hub
terminal   all of that as a person reads it; `text` makes what models wrote harmless
"""
