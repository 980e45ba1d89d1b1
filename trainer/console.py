"""What a run shows in the terminal: a live panel on a terminal, one aligned line per record anywhere else."""

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from rich import box
from rich.columns import Columns
from rich.console import Console as Terminal
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data.target_cache import Lack
from trainer.config import RunConfig
from trainer.report_scores import CONDITIONS, question_scores
from trainer.report_text import compact, count, duration, percent

LABEL_WIDTH = 11
SCORES_WIDTH = 66
MAX_STRIPS = 8
"""Rows of expert utilisation in the live panel; of more layers an even selection is shown."""


class _Terminal(Terminal):
    """That of rich, but what reads it may leave (`| head`): then the run saves and ends, as after a signal."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.raise_signal(signal.SIGTERM)


class Console:
    """Shows a run. `record` and `message` may be called from any thread.

    `facts` are those of `run.json`, as far as they are known; the banner leaves out the others. Within the context
    manager a terminal has the live panel; elsewhere, and on a terminal without cursor movement, every record is a line
    without control codes.
    """

    def __init__(
        self,
        run: RunConfig,
        workdir: Path,
        facts: Mapping[str, Any],
        file: IO[str] | None = None,
        terminal: bool | None = None,
        width: int | None = None,
    ) -> None:
        """`file`, `terminal` (whether it is one) and `width` are found out where they are None."""
        self._out = _Terminal(
            file=file, force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False
        )
        self._run, self._workdir, self._facts = run, workdir, facts
        self._layers = [i for i, kind in enumerate(run.model.layer_kinds()) if kind.moe]
        self._lock = threading.Lock()
        self._train: Mapping[str, Any] = {}
        self._eval: Mapping[str, Any] = {}
        self._saved: int | None = None
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._out.is_terminal and not self._out.is_dumb_terminal:
            self._live = Live(self._panel(), console=self._out, auto_refresh=False)
            self._live.start(refresh=True)
            self._out.show_cursor(True)  # A second Ctrl-C leaves at once, with no chance to bring a hidden one back.
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def banner(self) -> None:
        """What is about to run, on what, and how its utilisation is computed: all that is known before the compilation."""
        facts, mixture = self._facts, self._run.data.mixture
        total = sum(mixture.values())
        data = ", ".join(f"{percent(weight / total, 0)} {name}" for name, weight in sorted(mixture.items()) if weight)
        lines = {"run directory": str(self._workdir), "devices": facts.get("devices")}
        if "mesh" in facts:
            lines["mesh"] = f"{facts['mesh']}; {facts['mesh_memory']}"
        if "parameters" in facts:
            lines["parameters"] = f"{count(facts['parameters'])}, {count(facts['active_parameters'])} active per token"
        lines["teacher"] = facts.get("teacher")
        if facts.get("teacher_parameters"):
            lines["teacher"] = (
                f"{facts['teacher']}; {count(facts['teacher_parameters'])} parameters, "
                f"{compact(facts['teacher_flops_per_token'], 'FLOPs')} a token beside "
                f"{compact(facts['flops_per_token'], 'FLOPs')} of the student's step; {facts.get('teacher_place', '')}"
            )
        lines["data"] = f"{data}; digest {facts['data_digest']}" if "data_digest" in facts else data
        lines["starts from"] = facts.get("initialised_from")
        if "peak_flops" in facts:
            lines["peak"] = f"{compact(facts['peak_flops'], 'FLOP/s')} ({facts['peak_source']})"
        lines["utilisation"] = facts.get("mfu_formula")
        lines["compiler"] = facts.get("compiler_flags") or None
        self._print(Text(f"drover: {self._run.name}", style="bold"))
        known = {label: Text(str(value)) for label, value in lines.items() if value is not None}
        if self._out.is_terminal:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            for label, value in known.items():
                grid.add_row(f"  {label}", value)
            self._out.print(grid)
        else:
            for label, value in known.items():
                self._print(Text.assemble(f"  {label:<15}", value))
        self._print(Text())

    def record(self, record: Mapping[str, Any]) -> None:
        """Shows a record of the metrics logger (plain values)."""
        with self._lock:
            if record["kind"] == "train":
                self._train = record
                self._step_seconds.extend(_present(record, "time/step"))
            else:
                self._eval = record
            self._show(self._line(record))

    def saved(self, step: int) -> None:
        """Notes that the checkpoint of this step is on disk."""
        with self._lock:
            self._saved = step
            self._show(f"{self._step(step)}  checkpoint saved")

    def message(self, text: str) -> None:
        """Prints a line, above the panel if there is one."""
        self._print(Text(text))

    def scores(self, evaluation: Mapping[str, Any]) -> None:
        """The held-out scores: question accuracy per attribute beside chance, and text bits per byte."""
        scores = question_scores(evaluation)
        if scores:
            table = Table(title="Held-out questions answered right", title_justify="left", box=box.SIMPLE_HEAD)
            if self._out.width < SCORES_WIDTH:  # A terminal that wraps its lines is easier to read than cut headings.
                table.width = SCORES_WIDTH
            table.add_column("attribute", no_wrap=True)
            for heading in (*(shown.replace(", ", "\n") for _, shown in CONDITIONS), "chance", "asked"):
                table.add_column(heading, justify="right", no_wrap=True)
            for row in scores:
                cells = [getattr(row, name) for name, _ in CONDITIONS]
                shares = ["-" if cell is None else percent(cell.share, 0) for cell in cells]
                asked = sum(cell.count for cell in cells[:2] if cell is not None)
                style = "bold" if row.attribute == "all" else ""
                table.add_row(row.attribute, *shares, percent(row.chance, 0), str(asked), style=style)
            self._out.print(table, crop=False)
        if evaluation.get("text_bits_per_byte") is not None:
            self._print(Text(f"held-out text: {evaluation['text_bits_per_byte']:.3f} bits per byte"))

    def _print(self, text: Text) -> None:
        self._out.print(text, soft_wrap=True)

    def _show(self, line: str) -> None:
        if self._live is None:
            self._print(Text(line))
        else:
            self._live.update(self._panel(), refresh=True)

    def _step(self, step: int) -> str:
        total = str(self._run.steps)
        return f"step {step:>{len(total)}}/{total}"

    def _eta(self) -> str:
        if not self._step_seconds or not self._train:
            return ""
        left = self._run.steps - self._train["step"]
        return duration(left * sum(self._step_seconds) / len(self._step_seconds)) if left > 0 else "done"

    def _line(self, record: Mapping[str, Any]) -> str:
        losses = "  ".join(f"{name} {value:<8.4f}" for name, value in _losses(record))
        if record["kind"] != "train":
            bits = "".join(f"  {value:.4f} bits/byte" for value in _present(record, "text_bits_per_byte"))
            return f"{self._step(record['step'])}  held-out  {losses}{bits}".rstrip()
        # The fields stand in the same columns in every line, so that the eye can run down them.
        fields = [
            f"{self._step(record['step'])}  train     {losses}",
            *(f"from teacher {_divergence(record):<6}" for _ in _present(record, "taught")),
            *(f"lr {x:.2e}" for x in _present(record, "learning_rate")),
            *(f"grad {x:<7.3f}" for x in _present(record, "grad_norm")),
            *(f"{compact(x):>7} tok/s" for x in _present(record, "time/tokens_per_s")),
            *(f"MFU {percent(x):>6}" for x in _present(record, "time/mfu")),
            *(f"wait {percent(x):>6}" for x in _present(record, "time/data_wait")),
            *(f"for teacher {percent(x):>6}" for x in _present(record, "time/teacher_wait")),
            *(f"busiest expert {x:4.1f}x" for x in _present(record, "experts/imbalance")),
            *(f"skipped {x}" for x in _present(record, "skipped") if x),
            *(f"targets {kind} {x}" for kind in Lack for x in _present(record, f"cache/{kind}") if x),
            *([f"ETA {self._eta()}"] if self._eta() else []),
        ]
        return "  ".join(fields)

    def _panel(self) -> RenderableType:
        train, held_out = self._train, self._eval
        step, total = train.get("step", 0), self._run.steps
        rows: list[tuple[str, RenderableType]] = []

        def row(label: str, *parts: tuple[str, str] | str) -> None:
            if parts:  # Columns break between the parts on a narrow terminal, not inside one.
                texts = [Text(part) if isinstance(part, str) else Text(*part) for part in parts]
                rows.append((label, Columns(texts, padding=(0, 3))))

        row("train", *(f"{name} {value:.4f}" for name, value in _losses(train)))
        bits = [f"{value:.3f} bits/byte" for value in _present(held_out, "text_bits_per_byte")]
        at = [(f"at step {held_out['step']}", "dim")] if held_out else []
        row("held-out", *(f"{name} {value:.4f}" for name, value in _losses(held_out)), *bits, *at)
        row(
            "teacher",
            *(f"divergence {_divergence(train)}" for _ in _present(train, "taught")),
            *(f"its weight {x:.2f}" for x in _present(train, "soft_weight")),
            *(f"the teacher's loss {x:.4f}" for x in _present(train, "teacher_loss")),
            *((f"targets {kind} {x}", "bold red") for kind in Lack for x in _present(train, f"cache/{kind}") if x),
            *(f"MFU of its devices {percent(x)}" for x in _present(train, "time/teacher_mfu")),
            *((f"waited for {percent(x)}", "yellow" if x > 0.1 else "") for x in _present(train, "time/teacher_wait")),
        )
        row(
            "optimizer",
            *(f"learning rate {x:.2e}" for x in _present(train, "learning_rate")),
            *(f"grad norm {x:.3f}" for x in _present(train, "grad_norm")),
            *((f"skipped steps {x}", "bold red" if x else "") for x in _present(train, "skipped")),
        )
        row(
            "speed",
            *(f"{compact(x)} tokens/s" for x in _present(train, "time/tokens_per_s")),
            *(f"MFU {percent(x)}" for x in _present(train, "time/mfu")),
            *((f"data wait {percent(x)}", "yellow" if x > 0.1 else "") for x in _present(train, "time/data_wait")),
        )
        load_LE = train.get("experts/load") or []
        for i in _spread(len(load_LE), MAX_STRIPS):
            name = f"layer {self._layers[i]}" if len(self._layers) == len(load_LE) else f"MoE {i}"
            rows.append((name, self._strip(load_LE[i])))
        row("checkpoint", *([] if self._saved is None else [f"step {self._saved}"]))
        if not rows:
            row("train", ("waiting for the first step", "dim"))

        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(style="dim", no_wrap=True, width=LABEL_WIDTH)
        grid.add_column(ratio=1)
        grid.add_row("progress", ProgressBar(total=total, completed=step))
        for label, value in rows:
            grid.add_row(label, value)
        title = Text.assemble((self._run.name, "bold"), f"  {step} of {total} steps  {percent(step / total, 0)}")
        if self._eta():
            title.append(f"  ETA {self._eta()}")
        return Panel(grid, title=title, title_align="left")

    def _strip(self, load_E: list[float]) -> Text:
        """One block per expert: half height is the ideal share 1/E, full height twice that or more. Red gets less than a
        quarter of its share, yellow more than twice."""
        room = max(8, self._out.width - LABEL_WIDTH - 24)
        group = -(-len(load_E) // room)
        blocks = "▁▂▃▄▅▆▇█" if self._out.encoding.startswith("utf") else "12345678"
        text = Text()
        for first in range(0, len(load_E), group):  # Of several experts: their mean height, their worst colour.
            shares = [load * len(load_E) for load in load_E[first : first + group]]
            style = "red" if min(shares) < 0.25 else "yellow" if max(shares) > 2 else "cyan"
            text.append(blocks[min(7, max(0, round(4 * sum(shares) / len(shares)) - 1))], style)
        return text.append(f"  busiest {max(load_E) * len(load_E):.1f}x", "dim")


def _losses(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(key.removeprefix("loss/"), record[key]) for key in record if key == "loss" or key.startswith("loss/")]


def _divergence(record: Mapping[str, Any]) -> str:
    """From the teacher, who may have said nothing of the step's tokens."""
    return f"{record['soft']:.4f}" if "soft" in record else "-"


def _present(record: Mapping[str, Any], key: str) -> list[Any]:
    return [record[key]] if record.get(key) is not None else []


def _spread(length: int, limit: int) -> list[int]:
    if length <= limit:
        return list(range(length))
    return [round(i * (length - 1) / (limit - 1)) for i in range(limit)]
