"""Support of the training tests: one call that trains, and what the tests run in other processes.

Run as a script this is a server that forks training runs. Importing torch and transformers takes
seconds, and the kill test starts 22 runs: the server imports once, starts no thread, and forks a
process for each run.

    {"folder": ..., "shards": ..., "output": ..., "settings": {...}, "reports": ..., "full_from": null}   ->  {"pid": ...}
    "wait"                                                                                              ->  {"status": ...}
"""

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from qrpo.errors import QRPOError, TrainingError

SETTINGS = {
    "beta": 0.5,
    "learning_rate": 1e-2,
    "prompts_per_step": 4,
    "warmup_steps": 0.0,
    "lr_scheduler_type": "constant",
    "token_budget": 128,
}


class Stopped(Exception):
    """Raised by `train` at the step `stop_at`, as a kill would end the run."""


def train(folder, rows, output, *, stop_at=None, eval_rows=None, **settings):
    """The final weights of a policy trained with `SETTINGS` and these, and what was reported."""
    from safetensors.torch import load_file

    from qrpo.training.runs import train_policy
    from qrpo.training.settings import PolicyConfig

    progress = []

    def report(entry):
        progress.append(entry)
        if entry["step"] == stop_at:
            raise Stopped

    config = PolicyConfig(**{**SETTINGS, **settings})
    final = train_policy(folder, rows, config, output, eval_rows=eval_rows, on_progress=report)
    return load_file(final / "model.safetensors"), progress


def metrics(output):
    """The metrics of a run by column, each without nulls."""
    import polars

    table = polars.read_parquet(output / "metrics.parquet")
    return {name: table[name].drop_nulls().to_list() for name in table.columns}


def same_weights(weights, expected):
    """Whether two sets of weights are equal to the bit."""
    import torch

    return weights.keys() == expected.keys() and all(
        torch.equal(weights[name], weight) for name, weight in expected.items()
    )


def plain_logprobs(model, prompts, completions):
    """Log-probabilities of completions one by one, unpadded, from all logits."""
    import torch

    sums = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        sums.append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :].sum())
    return torch.stack(sums)


def value_and_gradients(compute, model, *arguments, weights=1.0, **options):
    """The log-probabilities that `compute` gives, and the gradients of their weighted squares."""
    model.zero_grad()
    logprob_B = compute(model, *arguments, **options)
    (weights * logprob_B**2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprob_B.detach(), gradients


def fail_on_the_second():
    """Raise an error on the second rank; the first one waits."""
    if os.environ["RANK"] == "1":
        raise TrainingError("rank 1 cannot")
    time.sleep(1000)
    yield


def train_runs(runs):
    """Train one run after the other in these processes. Yields for each its reports, the dtypes of
    the log-probabilities that its loss got, and whether its weights were sharded; or its error.

    A run has `folder`, `rows`, `output` and `settings`, and may have `eval_rows`, `iterable` rows,
    the `checkpoint` of another run to continue from, `sft` to fine-tune instead, and a step
    `sigterm_after` which rank 0 sends itself a SIGTERM.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from qrpo.training import runs as module
    from qrpo.training.settings import PolicyConfig, SftConfig

    torch.set_num_threads(1)
    seen = {}

    class Watched(module.QRPOTrainer):
        def logprobs(self, model, *arguments):
            logprob_B = super().logprobs(model, *arguments)
            sharded = any(isinstance(weight, DTensor) for weight in model.parameters())
            seen.update(sharded=sharded, dtypes={*seen["dtypes"], logprob_B.dtype})
            return logprob_B

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self, rows):
            self.rows = rows

        def __iter__(self):
            return iter(self.rows)

    module.QRPOTrainer = Watched

    def report(entry):
        seen["reports"].append(entry)
        if entry["step"] == run.get("sigterm_after"):
            os.kill(os.getpid(), signal.SIGTERM)

    for run in runs:
        seen = {"reports": [], "dtypes": set(), "sharded": False}
        if (checkpoint := run.get("checkpoint")) and os.environ.get("RANK", "0") == "0":
            shutil.copytree(checkpoint, run["output"] / checkpoint.name)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        rows = Stream(run["rows"]) if run.get("iterable") else run["rows"]
        try:
            settings = run["settings"]
            config = SftConfig(**settings) if run.get("sft") else PolicyConfig(**{**SETTINGS, **settings})
            options = {"eval_rows": run.get("eval_rows"), "on_progress": report}
            module.train_policy(run["folder"], rows, config, run["output"], **options)
        except QRPOError as error:
            seen["error"] = str(error)
        yield seen


def start_ranks(processes, folder):
    """Start ranks that wait forever; yields this process's id."""
    from qrpo.training.ranks import stream_ranks

    yield from stream_ranks(f"{__file__}:leave_pid_and_wait", folder, processes=processes)


def leave_pid_and_wait(folder):
    """Write this process's id to a file named after its rank, yield the parent's, and wait
    forever."""
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    yield os.getppid()
    time.sleep(1000)


def _run(request):
    from qrpo.training.runs import train_policy
    from qrpo.training.settings import PolicyConfig
    from storage import ShardReader, Store

    records = pickle.loads(Path(request["shards"], "records").read_bytes())  # noqa: S301
    reader = ShardReader(Store(request["shards"]), records, seed=3)
    with open(request["reports"], "a", buffering=1) as reports:

        def on_progress(report):
            reports.write(json.dumps(report) + "\n")
            if report["step"] == request["full_from"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        config = PolicyConfig(**request["settings"])
        train_policy(request["folder"], reader, config, request["output"], seed=5, on_progress=on_progress)


def serve():
    """Answer requests from standard input until it ends."""
    import torch

    import qrpo.training.runs  # noqa: F401
    import storage  # noqa: F401

    torch.set_num_threads(1)
    pid = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request == "wait":
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
        elif pid := os.fork():
            answer = {"pid": pid}
        else:
            status = 0
            try:
                _run(request)
            except BaseException as error:
                status = 1
                text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                Path(request["reports"]).with_suffix(".error").write_text(text)
            os._exit(status)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
