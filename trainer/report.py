"""`report.html`: a run on one page that stands alone, from the files of its run directory."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from sharding.errors import UserError
from trainer.metrics import FILE_NAME, read_metrics, replace_file
from trainer.report_charts import Series, Style, line_chart, question_chart, short
from trainer.report_experts import heat_map, scale
from trainer.report_page import figure, legend, page, row, section, tile
from trainer.report_scores import CONDITIONS, AttributeScores, question_scores
from trainer.report_text import compact, count, duration, percent, without_targets
from trainer.rundir import RunDirectory, read_json

Records = Sequence[Mapping[str, Any]]


def write_report(workdir: Path) -> Path:
    """Writes `<workdir>/report.html` whole or not at all, and returns its path.

    A run that has not been evaluated gets a report that says so. Raises `UserError` where there is no run, or its files
    cannot be read.
    """
    run = RunDirectory(workdir)
    config = read_json(run.config, "a run directory made by `drover train`")
    facts = read_json(run.facts, "the facts that `drover train` writes when it starts") if run.facts.exists() else {}
    evaluation = read_json(run.evaluation, "held-out scores") if run.evaluation.exists() else None
    records = read_metrics(run.metrics / FILE_NAME) if (run.metrics / FILE_NAME).exists() else []
    try:
        replace_file(run.report, render(config, facts, records, evaluation))
    except OSError as error:
        raise UserError(
            f"{run.report}: cannot be written ({error.strerror}); expected a writable directory with free space. "
            "Free some space and write the report again"
        ) from error
    return run.report


def render(
    config: Mapping[str, Any], facts: Mapping[str, Any], records: Records, evaluation: Mapping[str, Any] | None
) -> str:
    """The page. `config`, `facts` and `evaluation` are the contents of the JSON files, `records` the metrics."""
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    step = train[-1]["step"] if train else 0
    scores = question_scores(evaluation) if evaluation else []
    if not train:
        body = '<p class="notice">No step has been recorded yet.</p>'
    else:
        body = "\n".join(
            [
                _tiles(train, held_out, scores, evaluation),
                _losses(train, held_out),
                _questions(scores, (evaluation or {}).get("samples", [])),
                _teacher(train, facts),
                _experts(train, _moe_layers(config)),
                _optimizer(train),
                _speed(train, facts),
            ]
        )
    steps = config["steps"]
    parts = [
        _header(config["name"], step, steps, train),
        _notice(step, steps, evaluation),
        body,
        _facts(facts),
        _config(config),
    ]
    return page(f"{config['name']}: training report", "\n".join(parts))


def _header(name: str, step: int, steps: int, train: Records) -> str:
    spent = _elapsed(train)
    took = f" in {duration(spent)}" if spent else ""
    return f'<header><h1>{escape(name)}</h1><span class="status">{step:,} of {steps:,} steps{took}</span></header>'


def _elapsed(train: Records) -> float:
    """Seconds of all starts together: `time/elapsed` begins again when a run is resumed."""
    spent = previous = 0.0
    for now in _column(train, "time/elapsed"):
        spent += now - previous if now >= previous else now
        previous = now
    return spent


def _notice(step: int, steps: int, evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is not None and evaluation["step"] >= steps:
        return ""
    if evaluation is None:
        text = "This run has not been evaluated: its held-out questions are asked after the last step."
    else:
        text = f"The held-out scores are those of step {evaluation['step']:,}."
    unfinished = f"Unfinished: {step:,} of {steps:,} steps. " if step < steps else ""
    return f'<p class="notice">{unfinished}{text} The same command goes on with it.</p>'


def _tiles(
    train: Records, held_out: Records, scores: Sequence[AttributeScores], evaluation: Mapping[str, Any] | None
) -> str:
    tiles = []
    bits = (evaluation or {}).get("text_bits_per_byte")
    bits = bits if bits is not None else _last(held_out, "text_bits_per_byte")
    if bits is not None:
        tiles.append(tile(f"{bits:.3f}", "bits/byte", "held-out text"))
    elif (loss := _last(train, "loss")) is not None:
        tiles.append(tile(f"{loss:.3f}", "nats/token", "training loss"))
    named = [one for one in scores if one.attribute != "all"]
    chosen = [one for one in named if one.attribute in ("colour", "shape", "motion", "digit")] or named[:2]
    for one in [*chosen, *(one for one in scores if one.attribute == "all")]:
        score = one.novel or one.seen
        if score is not None:
            kind = "new combinations" if one.novel else "held-out files"
            what = f"{one.attribute} questions" if one.attribute == "all" else one.attribute
            tiles.append(tile(f"{100 * score.share:.0f}", "%", f"{what}, {kind}; chance {percent(one.chance, 0)}"))
    for key, write, label in (
        ("time/tokens_per_s", compact, "tokens per second, median"),
        ("time/mfu", percent, "of peak FLOP/s, median"),
    ):
        values = _column(train, key)
        if values:
            value, _, unit = write(median(values)).partition(" ")
            tiles.append(tile(value, unit, label))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _losses(train: Records, held_out: Records) -> str:
    names = sorted({key for record in train for key in record if key.startswith("loss/")}) or ["loss"]
    series = []
    for i, key in enumerate(names):
        colour, name = f"c{i % 4 + 1}", key.removeprefix("loss/")
        series.append(_series(train, key, name, colour))
        if any(key in record for record in held_out):
            series.append(_series(held_out, key, f"{name}, held out", colour, "points"))
    keys = legend(("raw", "training, as recorded"), ("smooth", "training, smoothed"), ("held", "held out"))
    chart = line_chart(series, _plain, width=1160, height=360, log=True)
    return section(
        "Loss by source",
        "Cross-entropy in nats per predicted token, on a logarithmic scale. Image tokens are never predicted.",
        f"<figure>{keys}{chart}{_not_finite(train, names)}</figure>",
    )


def _questions(scores: Sequence[AttributeScores], samples: Sequence[Mapping[str, Any]]) -> str:
    if not scores and not samples:
        return ""
    keys = legend(
        *((name, f"{shown} combination" if ", " in shown else f"{shown} file") for name, shown in CONDITIONS),
        ("line", "chance"),
    )
    chart = f"<figure>{keys}{question_chart(scores)}</figure>" if scores else ""
    grid = ""
    if samples:
        right = sum(sample["correct"] for sample in samples)
        grid = (
            f'<h3 style="margin-top:30px">Answers to held-out questions <small>{right} of these {len(samples)} are right'
            f'</small></h3><div class="samples">{"".join(map(_sample, samples))}</div>'
        )
    return section(
        "Held-out questions",
        "Answers are generated and compared with the accepted ones. With another question's file (picture, clip or sound), or "
        "a blank one, a model that looks and listens falls to chance. Lines through the bars are 95 % intervals.",
        chart,
        grid,
    )


def _sample(sample: Mapping[str, Any]) -> str:
    verdict, mark = ("right", "✓") if sample["correct"] else ("wrong", "✗")
    predicted = sample["predicted"].strip() or "(no answer)"
    accepted = " / ".join(sample["answers"])
    tag = " · ".join(str(sample[key]) for key in ("attribute", "combination") if key in sample)
    picture = re.sub(r"[^A-Za-z0-9+/=]", "", sample["image"])
    return (
        f'<div class="sample"><img alt="held-out file" src="data:image/png;base64,{picture}"><div>{escape(sample["question"])}'
        f'<div class="answer {verdict}" title="{verdict}">{mark} {escape(predicted)}</div>'
        f'<div class="accepted">accepted: {escape(accepted)}</div><div class="tag">{escape(tag)}</div></div></div>'
    )


def _teacher(train: Records, facts: Mapping[str, Any]) -> str:
    if not any("taught" in record or "sampled/soft" in record for record in train):
        return ""
    return section(
        "Teacher",
        f"{', '.join(facts[name] for name in ('teacher', 'teacher_place') if facts.get(name)) or 'Unknown'}. "
        f"{_lessons(train, facts.get('teacher_cache'))}",
        row(
            _curve(train, "soft", "Divergence from the teacher", _plain, "nats per token with its target", zero=True),
            _curve(train, "teacher_loss", "The teacher's own loss", _plain, "on the same tokens"),
            _curve(
                train, "soft_weight", "Weight of the divergence", _plain, "the next-token loss has the rest", zero=True
            ),
            _curve(train, "sampled/soft", "On what the student wrote", _plain, "divergence, nats per token", zero=True),
            _curve(train, "time/teacher_wait", "Wait for the teacher", _percent_tick, "of the step", zero=True),
            _curve(train, "time/teacher_mfu", "The teacher's utilisation", _percent_tick, "of its devices", zero=True),
            columns="three",
        ),
    )


def _lessons(train: Records, cache: Mapping[str, Any] | None) -> str:
    """How many of the tokens of the data the teacher spoke of, and what that cost: in this run, or before it."""
    taught = [record for record in train if "taught" in record]
    if not taught:
        return "It judged what the student wrote, and nothing else."
    tokens = sum(record["tokens"] for record in taught)
    share = percent(sum(record["taught"] * record["tokens"] for record in taught) / max(tokens, 1))
    if cache is None:
        text = f"{share} of the tokens had targets from the teacher beside the student"
        run, own = (sum(record.get(name, 0) for record in train) for name in ("flops", "teacher_flops"))
        return f"{text}, which took {percent(own / run)} of the FLOPs of the run." if run else f"{text}."
    text = f"{share} of the tokens had targets from the cache, where one takes {cache['bytes_per_token']:.1f} bytes"
    if lacking := without_targets(taught[-1]):
        text = f"{lacking}; {text}"
    known, seconds = cache["tokens_of_known_cost"], cache["device_seconds"]
    if not known:
        return f"{text}; what teaching cost is not known."
    those = "making them" if known == cache["tokens"] else f"making {count(known)} of its {count(cache['tokens'])}"
    return f"{text}; {those} took {duration(seconds)} of device time ({compact(known / seconds)} tokens/s a device)."


def _experts(train: Records, layers: Sequence[int] | None) -> str:
    loaded = [record for record in train if record.get("experts/load")]
    if not loaded:
        return ""
    loads = [record["experts/load"] for record in loaded]
    if layers is None or len(layers) != len(loads[0]):
        layers = range(len(loads[0]))
    experts = len(loads[0][0])
    picture = scale(experts) + heat_map([record["step"] for record in loaded], loads, layers)
    return section(
        "Expert load",
        f"Share of the tokens that each of the {experts} experts of a layer receives, over the run. Every expert has a row; "
        "the colour of the page is the ideal share.",
        f"<figure>{picture}</figure>",
        row(
            _curve(train, "experts/imbalance", "Busiest expert", lambda x: f"{x:.3g} ×", "most loaded over mean, worst layer",
                   ideal=(1.0, "balanced")),
            _curve(train, "aux/load_balance", "Load-balance loss", _plain, "1 when balanced", ideal=(1.0, "balanced")),
            _curve(train, "aux/router_z", "Router z-loss", _plain, "", zero=True),
            columns="three",
        ),
    )  # fmt: skip


def _optimizer(train: Records) -> str:
    skipped = _last(train, "skipped") or 0
    detail = "before clipping" + (f"; {skipped} steps were skipped as not finite" if skipped else "")
    return section(
        "Optimisation",
        "",
        row(
            _curve(
                train, "learning_rate", "Learning rate", lambda x: f"{x:.2g}", "", width=480, zero=True, style="exact"
            ),
            _curve(train, "grad_norm", "Gradient norm", _plain, detail, width=480, log=True),
            columns="two",
        ),
    )


def _speed(train: Records, facts: Mapping[str, Any]) -> str:
    def middle(key: str, write: Callable[[float], str]) -> str:
        values = _column(train, key)
        return f"median {write(median(values))}" if values else ""

    parts = [facts.get("mfu_formula")]
    if "peak_flops" in facts:
        parts.append(f"Peak {compact(facts['peak_flops'], 'FLOP/s')}: {facts['peak_source']}.")
    note = ". ".join(str(part).rstrip(".") for part in parts if part)
    return section(
        "Speed",
        "",
        row(
            _curve(train, "time/tokens_per_s", "Tokens per second", short, middle("time/tokens_per_s", compact), zero=True),
            _curve(train, "time/mfu", "Model FLOP utilisation", _percent_tick, middle("time/mfu", percent), zero=True),
            _curve(train, "time/data_wait", "Data wait", _percent_tick,
                   middle("time/data_wait", percent) + " of the step", zero=True),
            columns="three",
        ),
        f'<p class="note">{escape(note)}.</p>' if note else "",
    )  # fmt: skip


_FACTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("command", "command", str),
    ("initialised_from", "started from", str),
    ("devices", "devices", str),
    ("parameters", "parameters", lambda n: f"{count(n)} ({n:,})"),
    ("active_parameters", "active per token", lambda n: f"{count(n)} ({n:,})"),
    ("flops_per_token", "training FLOPs per token", compact),
    ("peak_flops", "peak", lambda x: compact(x, "FLOP/s")),
    ("time_to_first_step_s", "time to first step", duration),
    ("compile_s", "compile time", duration),
    ("data_digest", "data digest", str),
)
_ELSEWHERE = ("peak_source", "mfu_formula", "teacher_cache")


def _facts(facts: Mapping[str, Any]) -> str:
    shown = [(label, write(facts[key])) for key, label, write in _FACTS if facts.get(key) is not None]
    known = {key for key, _, _ in _FACTS} | set(_ELSEWHERE)
    for key, value in facts.items():
        if key not in known and value is not None:
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
            shown.append((key.replace("_", " "), text))
    items = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in shown)
    return section("The run", "", f"<dl>{items}</dl>" if items else "")


def _config(config: Mapping[str, Any]) -> str:
    groups: dict[str, list[tuple[str, Any]]] = {}

    def gather(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                gather(f"{prefix}{key}.", value)
            else:
                groups.setdefault(prefix.rstrip("."), []).append((key, value))

    gather("", config)
    sections = "".join(
        f"<section><h4>{escape(name or 'run')}</h4>"
        + "".join(
            f"<div><i>{escape(key)}</i> {escape(json.dumps(value, ensure_ascii=False))}</div>" for key, value in values
        )
        + "</section>"
        for name, values in groups.items()
    )
    return f'<details><summary>Resolved configuration</summary><div class="config">{sections}</div></details>'


def _moe_layers(config: Mapping[str, Any]) -> list[int] | None:
    """Indices of the mixture layers among all layers, if the config tells."""
    model = config.get("model", {})
    if model.get("moe_layers") is not None:
        return list(model["moe_layers"])
    step, total = model.get("moe_layer_step"), model.get("num_layers")
    return list(range(step - 1, total, step)) if step and total else None


def _curve(
    train: Records,
    key: str,
    title: str,
    label: Callable[[float], str],
    detail: str,
    *,
    width: int = 400,
    style: Style = "noisy",
    **options: Any,
) -> str:
    if not any(key in record for record in train):
        return ""
    return figure(
        title,
        detail,
        line_chart([_series(train, key, title, "c1", style)], label, width=width, **options)
        + _not_finite(train, [key]),
    )


def _series(records: Records, key: str, name: str, colour: str, style: Style = "noisy") -> Series:
    present = [record for record in records if record.get(key) is not None]
    return Series(name, colour, [r["step"] for r in present], [float(r[key]) for r in present], style)


def _not_finite(records: Records, keys: Sequence[str]) -> str:
    missing = sum(not math.isfinite(r[key]) for r in records for key in keys if r.get(key) is not None)
    return f'<p class="note">Recorded as not finite, and not drawn: {missing}.</p>' if missing else ""


def _column(records: Records, key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None and math.isfinite(record[key])]


def _last(records: Records, key: str) -> Any:
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _percent_tick(share: float) -> str:
    return f"{100 * share:.3g} %"
