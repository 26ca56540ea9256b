"""Commands that hand runs to a Prefect server and its workers."""

from typing import Annotated, Any

import typer

from flows.cli.app import (
    AsJson,
    ConfigPath,
    Cron,
    Gpus,
    Notify,
    Overrides,
    StoreUrl,
    Timezone,
    command,
    err,
    print_json,
    tell,
)


@command()
def serve(
    config: ConfigPath,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 opens it to everybody.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 4200,
    gpus: Gpus = 1,
    notify: Notify = None,
    overrides: Overrides = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Server, worker and schedule on this machine, in one command. Runs are started by the schedule, in the browser or by hand.

    Examples:

      qrpo serve config.yaml

      qrpo serve config.yaml --cron "0 3 * * *" --timezone Europe/Zurich
    """
    from flows.service.serve import serve, serving_lines
    from tasks.config import load_config

    def ready(served: dict[str, Any]) -> None:
        print_json(served) if as_json else err.print("\n".join(serving_lines(served)))

    serve(
        load_config(config, overrides or ()),
        store,
        cron=cron,
        timezone=timezone,
        host=host,
        port=port,
        gpus=gpus,
        notify=notify,
        console=err,
        ready=ready,
    )


@command()
def deploy(
    config: ConfigPath,
    pool: Annotated[
        str, typer.Option("--pool", help="The work pool's name; it is made where missing.")
    ] = "qrpo",
    pool_type: Annotated[
        str, typer.Option("--type", help="Where runs happen: process, docker or kubernetes.")
    ] = "process",
    image: Annotated[
        str | None, typer.Option("--image", help="The image of docker and kubernetes jobs.")
    ] = None,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    gpus: Gpus = 1,
    secrets: Annotated[
        list[str] | None,
        typer.Option(
            "--secret",
            metavar="VARIABLE=BLOCK",
            help="Environment variable that jobs take from a Secret block.",
        ),
    ] = None,
    notify: Notify = None,
    overrides: Overrides = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Put the pipeline and every stage as deployments on the Prefect server that PREFECT_API_URL names.

    Examples:

      qrpo deploy config.yaml --store s3://bucket/qrpo --cron "0 3 * * *"

      qrpo deploy config.yaml --type kubernetes --image registry/qrpo:1 --store s3://bucket/qrpo
    """
    from flows.service.deploy import DeployOptions, deploy, deployed_lines, pool_type_of
    from tasks.config import load_config

    pairs = [secret.partition("=") for secret in secrets or ()]
    if not all(variable and block for variable, _, block in pairs):
        raise typer.BadParameter(
            "--secret takes VARIABLE=BLOCK, such as AWS_SECRET_ACCESS_KEY=qrpo-s3-secret-key"
        )
    options = DeployOptions(
        pool=pool,
        pool_type=pool_type_of(pool_type),
        image=image,
        cron=cron,
        timezone=timezone,
        gpus=gpus,
        secrets={variable: block for variable, _, block in pairs},
        notify=notify,
    )
    deployed = deploy(load_config(config, overrides or ()), store, options)
    tell(deployed, "\n".join(deployed_lines(deployed)), as_json)
