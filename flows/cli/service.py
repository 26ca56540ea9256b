"""Commands that hand runs to a Prefect server and its workers."""

from typing import Annotated, Any, Literal

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
    print_result,
)


@command()
def serve(
    config: ConfigPath,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets other machines connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 4200,
    gpus: Gpus = 1,
    notify: Notify = None,
    overrides: Overrides = None,
    store: StoreUrl = "artifacts",
    as_json: AsJson = False,
) -> None:
    """Start server, worker and schedule on this machine. The schedule, the browser or `prefect deployment run` starts runs.

    Examples:

      qrpo serve config.yaml

      qrpo serve config.yaml --cron "0 3 * * *" --timezone Europe/Zurich
    """
    from flows.service.serve import serve, serving_lines
    from tasks.config import load_config

    def ready(served: dict[str, Any]) -> None:
        print_json(served) if as_json else err.print("\n".join(serving_lines(served)))

    options = {"cron": cron, "timezone": timezone, "gpus": gpus, "notify": notify}
    loaded = load_config(config, overrides or ())
    serve(loaded, store, host=host, port=port, console=err, ready=ready, **options)


@command()
def deploy(
    config: ConfigPath,
    pool: Annotated[
        str, typer.Option("--pool", help="Name of the work pool, which is created if it does not exist.")
    ] = "qrpo",
    pool_type: Annotated[
        Literal["process", "docker", "kubernetes"], typer.Option("--type", help="Where runs happen.")
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
    """Create deployments of the pipeline and of every stage on the Prefect server that PREFECT_API_URL names.

    Examples:

      qrpo deploy config.yaml --store s3://bucket/qrpo --cron "0 3 * * *"

      qrpo deploy config.yaml --type kubernetes --image registry/qrpo:1 --store s3://bucket/qrpo
    """
    from flows.service.deploy import DeployOptions, deploy, deployed_lines
    from tasks.config import load_config

    pairs = [secret.partition("=") for secret in secrets or ()]
    if not all(variable and block for variable, _, block in pairs):
        raise typer.BadParameter(
            "--secret takes VARIABLE=BLOCK, such as AWS_SECRET_ACCESS_KEY=qrpo-s3-secret-key"
        )
    blocks = {variable: block for variable, _, block in pairs}
    options = DeployOptions(pool, pool_type, cron, timezone, gpus, image, blocks, notify)
    deployed = deploy(load_config(config, overrides or ()), store, options)
    print_result(deployed, "\n".join(deployed_lines(deployed)), as_json)
