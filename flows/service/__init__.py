"""What connects the flows to a Prefect server.

server        start a server as a child process
deploy        `qrpo deploy`: deployments, work pool, schedule
automations   what the server does about failed runs
serve         `qrpo serve`: server, deployments and worker in one command
pool_runs     the runs that `qrpo serve` shows and ends
flow_runs     run a flow so that its server may fail; end it on Ctrl-C or on Cancel in the UI
logs          keep the log lines of libraries in a file
"""
