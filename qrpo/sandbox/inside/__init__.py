"""Code that runs inside the jail. It imports only the standard library and this folder.

zygote       the interpreter that is forked for every job
isolation    namespaces, limits and capabilities of a forked process
seccomp      the system-call filter
judge        runs tests against a proxy of the solution
solution     runs the solution
codec        values as inert data
framing      messages on a pipe
"""
