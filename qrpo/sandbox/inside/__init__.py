"""Code that runs inside the jail. It imports only the standard library and this folder.

zygote       the interpreter that is forked for every job
isolation    namespaces, limits and capabilities of a forked process
seccomp      the system-call filter
judge        runs tests
suite        reads tests: their form, and what they use of the solution
statements   what a statement of tests is, and how it is rewritten
remote       the solution's functions, classes and objects, as the tests see them
pytest       the part of pytest that such tests use
solution     runs the solution
codec        values as inert data
framing      messages on a pipe
"""
