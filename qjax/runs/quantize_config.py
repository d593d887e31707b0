"""A YAML run of kind "quantize": what `qjax quantize` does, from a file."""

from pathlib import Path

from qjax.calibrate.data import Calibration
from qjax.calibrate.recipes import recipe_for
from qjax.errors import QjaxError
from qjax.formats.gguf.plan import Wish, overrides
from qjax.formats.gguf.types import type_named
from qjax.formats.yaml_file import YAML_ENDINGS
from qjax.runs.budget import Budget, quantize_within
from qjax.runs.config import QuantizeConfig, load_config
from qjax.runs.console import progress_bar
from qjax.runs.quantize import quantize_file
from qjax.runs.quantize_blocks import Job, output_at, quantize_model
from qjax.sizes import parse_size


def quantize_from_config(path: Path, *, fresh: bool = False) -> Path:
    """Does the run of a config file of kind "quantize"; returns the path of the file that it made.

    Raises:
      QjaxError: a mistake in the config, or see `quantize_file` and `quantize_within`.
    """
    config: QuantizeConfig = load_config(path)
    base = path.parent
    budget = _budget(config, base)
    source = base / config.source if (base / config.source).exists() else config.source
    output = base / config.output
    if config.method is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        return _by_method(config, base, source, budget, output, fresh=fresh)
    if config.type is None and budget is None:
        raise QjaxError(f"{path}: give a type, a method, or a budget by target_bpw or target_size")
    mix = config.type or "q4_k_m"
    wish = Wish(
        str(base / mix) if mix.lower().endswith(YAML_ENDINGS) else mix,
        pure=config.pure,
        output_type=config.output_tensor_type,
        embedding_type=config.token_embedding_type,
        overrides=overrides(config.tensor_types),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    imatrix = None if config.imatrix is None else base / config.imatrix
    if budget is not None:
        quantize_within(source, output, wish, budget, imatrix=imatrix, requantize=config.allow_requantize, fresh=fresh)
        return output
    with progress_bar(f"writing {output}") as advance:
        quantize_file(
            source,
            output,
            wish,
            imatrix=imatrix,
            requantize=config.allow_requantize,
            fresh=fresh,
            progress=lambda name: advance(note=name),
        )
    return output


def _by_method(
    config: QuantizeConfig, base: Path, source: str | Path, budget: Budget | None, output: Path, *, fresh: bool
) -> Path:
    assert config.method is not None
    recipe = recipe_for(
        config.method,
        scheme=config.scheme,
        rules=config.rules,
        act_order=config.act_order,
        damp=config.damp,
        steps=config.steps,
        seed=config.seed,
    )
    data = None if config.data is None else str(base / config.data if (base / config.data).exists() else config.data)
    job = Job(
        source,
        recipe,
        Calibration(data, config.samples, config.seq_len, config.seed),
        batch=config.batch,
        evaluate=None if config.evaluate is None else base / config.evaluate,
        budget=budget,
    )
    quantize_model(job, output_at(output, config.format, fresh=fresh))
    return output


def _budget(config: QuantizeConfig, base: Path) -> Budget | None:
    if config.target_bpw is None and config.target_size is None:
        return None
    if config.target_bpw is not None and config.target_size is not None:
        raise QjaxError("target_bpw and target_size are two budgets: give one of them")
    return Budget(
        config.target_bpw,
        None if config.target_size is None else parse_size(config.target_size),
        None if config.data is None else str(base / config.data),
        config.chunks,
        [kind if config.method is not None else type_named(kind) for kind in config.types] or None,
    )
