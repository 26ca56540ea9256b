"""Commands that hand runs to a Prefect server and its workers."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from flows.cli.app import Answer, ConfigPath, Cron, Gpus, Notify, Overrides, Timezone, command

if TYPE_CHECKING:
    from storage import Store


@command()
def serve(
    config: ConfigPath,
    store: "Store",
    as_json: bool,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    host: Annotated[
        str, Option(help="Address to listen on; 0.0.0.0 lets other machines connect.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 4200,
    gpus: Gpus = 1,
    notify: Notify = None,
    overrides: Overrides = None,
) -> None:
    """Start server, worker and schedule on this machine. The schedule, the browser or
    `prefect deployment run` starts runs.

    Examples:

      qrpo serve config.yaml

      qrpo serve config.yaml --cron "0 3 * * *" --timezone Europe/Zurich
    """
    from flows.service.serve import serve, serving_lines
    from tasks.config import load_config

    def ready(served: dict[str, Any]) -> None:
        Answer(served, "\n".join(serving_lines(served))).print(as_json)

    options = {"cron": cron, "timezone": timezone, "gpus": gpus, "notify": notify}
    serve(load_config(config, overrides or ()), store, host=host, port=port, ready=ready, **options)


@command()
def deploy(
    config: ConfigPath,
    store: "Store",
    pool: Annotated[
        str, Option(help="Name of the work pool, which is created if it does not exist.")
    ] = "qrpo",
    pool_type: Annotated[
        Literal["process", "docker", "kubernetes"], Option("--type", help="Where runs happen.")
    ] = "process",
    image: Annotated[str | None, Option(help="The image of docker and kubernetes jobs.")] = None,
    cron: Cron = None,
    timezone: Timezone = "UTC",
    gpus: Gpus = 1,
    secrets: Annotated[
        list[str] | None,
        Option(
            "--secret",
            metavar="VARIABLE=BLOCK",
            help="Environment variable that jobs take from a Secret block.",
        ),
    ] = None,
    notify: Notify = None,
    overrides: Overrides = None,
) -> Answer:
    """Create deployments of the pipeline and of every stage on the Prefect server that
    PREFECT_API_URL names.

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
    return Answer(deployed, "\n".join(deployed_lines(deployed)))
