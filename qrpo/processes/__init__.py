"""Child processes and signals.

child         an object in a child process: calls, streams, time-outs, restarts
serving       the child's side of it
preemption    SIGTERM, noted for the training loop
"""
