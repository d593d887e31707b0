"""Where a model's layers lie on devices: a plan, what it comes to, and what would have room if it has none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qjax.errors import QjaxError
from qjax.evaluate.shapes import SHAPES
from qjax.formats.headers import located_headers
from qjax.formats.source import Source, open_source
from qjax.models import ModelConfig
from qjax.models.load import checked_config
from qjax.pipeline import Device, Plan, make_plan, read_plan, write_plan
from qjax.pipeline.devices import parse_devices
from qjax.pipeline.local import local_devices
from qjax.pipeline.make import check_plan
from qjax.pipeline.plan_file import as_data
from qjax.pipeline.report import MOST_BATCH, InfeasibleError, Report, report
from qjax.pipeline.sizes import model_sizes
from qjax.runs.console import emit, megabytes, show_table

SHORT_NAMES = {"1b": "tinyllama-1.1b", "7b": "llama-7b", "13b": "llama-13b"}


@contextmanager
def model_of(name: str) -> Iterator[Source | ModelConfig]:
    """The open headers of a path or Hub id, or the config of a shape such as "7b".

    Raises:
      QjaxError: there is neither.
    """
    shape = SHAPES.get(SHORT_NAMES.get(name.lower(), name.lower()))
    if shape is not None and not Path(name).exists():
        yield shape.config
    else:
        with located_headers(name) as path:
            yield open_source(path)


def plan_model(name: str, **options: Any) -> dict[str, Any]:
    """A plan and what it comes to, as JSON has it; it is written to `output` if it has room.

    Args:
      name: see `model_of`. options: see `_planned`.

    Returns:
      "feasible" tells whether it has room; if not, "error" says what lacks and "nearest" what would have.

    Raises:
      QjaxError: options that do not go together, or see `make_plan` and `read_plan`.
    """
    with model_of(name) as model:
        return _planned(name, model, **options)


def _planned(
    name: str,
    model: Source | ModelConfig,
    *,
    devices: str | None = None,
    plan_file: str | Path | None = None,
    output: str | Path | None = None,
    mode: str | None = None,
    objective: Any = None,
    context: int | None = None,
    batch: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`plan_model` of an open model.

    Args:
      devices: "cuda:0=8GiB,cpu:0=16GiB"; None for those of this process, or of the file.
      plan_file: a plan to look at, in which what is given here is replaced. options: see `make_plan`.
    """
    given = None if devices is None else parse_devices(devices)
    if plan_file is not None and (mode is not None or objective is not None):
        raise QjaxError("--plan says where each layer lies: --mode and --objective are for plans that are made")
    options = {key: value for key, value in options.items() if value is not None}
    error, nearest = None, ()
    try:
        if plan_file is None:
            found: Sequence[Device] = local_devices() if given is None else given
            wish = {
                "context": context,
                "batch": batch or 1,
                "mode": mode or "auto",
                "objective": objective or "latency",
            }
            plan = make_plan(model, found, name=name, **wish, **options)
        else:
            layers = (model if isinstance(model, ModelConfig) else checked_config(model)).layers
            plan = read_plan(plan_file, layers, devices=given, context=context, batch=batch, **options)
            plan = check_plan(plan, model, name=name)
        made = report(plan, model_sizes(model, plan.type, name=name))
        if output is not None:
            write_plan(output, plan)
    except InfeasibleError as refused:
        made, error, nearest = refused.report, str(refused), refused.nearest
    return _facts(name, made, error, nearest)


def _facts(name: str, made: Report, error: str | None, nearest: Sequence[tuple[str, Plan]]) -> dict[str, Any]:
    return {
        "model": name,
        "feasible": error is None,
        "plan": as_data(made.plan),
        "devices": [
            {
                "device": use.device.name,
                "units": use.units,
                "weights": use.held.weights,
                "kv_cache": use.held.cache,
                "work": use.held.work,
                "host": use.host,
                "used": use.used,
                "free": use.free,
                "memory": use.device.memory,
                "share": use.share,
            }
            for use in made.uses
        ],
        "tokens_per_second": made.tokens_per_second,
        "link_bytes_per_token": made.moved,
        "largest_batch": made.largest_batch,
        "largest_context": made.largest_context,
        "limits": made.limits,
        "lacks": made.lacks,
        "error": error,
        "nearest": [{"change": change, "plan": as_data(plan)} for change, plan in nearest],
    }


def show(facts: dict[str, Any]) -> None:
    """The plan as a table, with what it comes to below."""
    plan = facts["plan"]
    title = f"{facts['model']}{' as ' + plan['type'] if plan['type'] else ''}: context {plan['context']}, batch "
    title += f"{plan['batch']}, {plan['cache']} cache"
    title += f", {plan['microbatches']} microbatches" if plan["microbatches"] > 1 else ""
    columns = ["device", "units", "weights", "KV cache", "activations", "used", "free", "time"]
    rows = [
        (
            use["device"],
            use["units"],
            megabytes(use["weights"] + use["host"]),
            megabytes(use["kv_cache"]),
            megabytes(use["work"]),
            megabytes(use["used"]),
            megabytes(use["free"]) if use["free"] >= 0 else f"lacks {megabytes(-use['free'])}",
            f"{100 * use['share']:.0f} %",
        )
        for use in facts["devices"]
    ]
    show_table(title, columns, rows)
    if not facts["feasible"]:
        return
    batch, context = facts["largest_batch"], facts["largest_context"]
    emit(
        f"decode: {facts['tokens_per_second']:.1f} tokens/s predicted, {facts['link_bytes_per_token'] / 1024:.1f} KiB "
        f"over links a token\nlargest batch at this context: {'any' if batch >= MOST_BATCH else batch}; "
        f"largest context at this batch: {context}\nlimits: {facts['limits']}\n"
    )
