"""What a student gains from a teacher, in miniature: held-out scores of students and of controls, over paired seeds.

    python -m benchmarks.students [--runs runs/students] [--seeds 3] [--steps 400]

Trains the teacher (configs/tiny_behemoth.py) once, then for every seed, from the same weights and with the same batches,
configs/tiny_distill.py in four ways: without a teacher; with the teacher's draws from a cache, which `drover teach` fills
first; without a teacher for as many more steps as its forward passes would have paid for; and with the teacher beside it.
The first two at each of four learning rates: the control is the run without a teacher that has the lowest held-out loss,
the student has the rate of its config. Prints the tables of docs/DISTILLATION.md and writes the plot beside it,
docs/students.svg. What is finished in `--runs` is not done again; what is of another config there is refused.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config_file import load_run
from trainer.flops import flops_per_token

STUDENT, TEACHER = "configs/tiny_distill.py", "configs/tiny_behemoth.py"
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 16e-3)
PLOT = Path("docs/students.svg")


@dataclass(frozen=True)
class Scores:
    """Held-out scores of a finished run."""

    text: float
    """Loss in nats a token."""
    scenes: float
    """Loss in nats a token of documents about pictures; words of questions weigh a tenth."""
    right: float
    """Share of questions about pictures that were answered right."""

    @classmethod
    def of(cls, workdir: Path) -> "Scores":
        evaluation = json.loads((workdir / "evaluation.json").read_text())
        real = [row for row in evaluation["questions"] if row["condition"] == "real"]
        right = sum(row["correct"] for row in real) / sum(row["count"] for row in real)
        return cls(evaluation["loss"]["loss/text"], evaluation["loss"]["loss/scenes"], right)


Options = dict[str, object]
"""Of a config, by name."""
Arm = dict[int, Scores]
"""Of one way to train, by seed."""


class Study:
    """Runs commands of `drover`, each into a folder of its own."""

    def __init__(self, runs: Path, steps: int, seeds: int):
        self.runs, self.steps, self.seeds = runs, steps, range(seeds)
        self.teacher, self.cache = runs / "teacher", runs / "targets"

    def drover(self, title: str, *command: str) -> None:
        """Runs a command, whose words go to a log in `runs`."""
        print(title, "...", flush=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        with open(self.runs / "log.txt", "a") as log:
            code = "from launch.cli import main; raise SystemExit(main())"
            done = subprocess.run([sys.executable, "-c", code, *command], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"{title}: exit status {done.returncode}; {self.runs}/log.txt says why")

    def train_teacher(self) -> None:
        self.drover("teacher", "train", "--config", TEACHER, "--workdir", str(self.teacher))

    def options(self, seed: int, steps: int, others: Options) -> list[str]:
        """Of a student. Every seed has its own weights, batches and pictures; all have the teacher's tokenizer."""
        values = {
            "seed": seed,
            "data.seed": seed,
            "data.tokenizer": self.teacher / "tokenizer.json",
            "steps": steps,
            "distill.teacher": self.teacher,
            "eval.every_steps": max(1, self.steps // 8),
            "eval.batches": 16,
            "eval.final_batches": 64,
            "eval.questions": 512,
            **others,
        }
        return ["--config", STUDENT, *(f"--config.{name}={value}" for name, value in values.items())]

    def teach(self) -> None:
        """Fills the cache with the batches of every seed."""
        for seed in self.seeds:
            done = self.runs / f"targets-{seed}.done"
            if not done.exists():
                words = self.options(seed, self.steps, {})
                self.drover(f"targets of seed {seed}", "teach", "--out", str(self.cache), *words)
                done.touch()

    def arm(self, name: str, others: Options, steps: int | None = None) -> Arm:
        """Trains one way over all seeds."""
        found = {}
        for seed in self.seeds:
            workdir, words = self.runs / f"{name}-{seed}", self.options(seed, steps or self.steps, others)
            self.drover(f"{name}, seed {seed}", "train", "--workdir", str(workdir), *words)
            found[seed] = Scores.of(workdir)
        return found

    def cost(self) -> float:
        """FLOPs of a step with the teacher beside the student, over those of a step without."""
        row = [row for row in self.metrics("online", 0) if row["kind"] == "train"][-1]
        student, teacher = (
            flops_per_token(run.model, run.data.sequence_length)
            for run in (load_run(STUDENT, {"distill.teacher": str(self.teacher)}), load_run(TEACHER, {}))
        )
        amounts = row["tokens"], row["tiles"]
        return 1 + teacher.forward_step(*amounts) / student.training_step(*amounts)

    def metrics(self, name: str, seed: int) -> list[dict[str, Any]]:
        """What a run logged."""
        return list(
            map(json.loads, (self.runs / f"{name}-{seed}" / "metrics" / "metrics.jsonl").read_text().splitlines())
        )

    def curve(self, name: str, key: str) -> tuple[list[int], list[float]]:
        """Means over seeds of a held-out loss, at steps."""
        values: dict[int, list[float]] = {}
        for seed in self.seeds:
            for row in self.metrics(name, seed):
                if row["kind"] == "eval":
                    values.setdefault(row["step"], []).append(row[key])
        steps = sorted(values)
        return steps, [statistics.fmean(values[step]) for step in steps]


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def best_rate(arms: dict[float, Arm]) -> float:
    """The learning rate with the lowest held-out loss, of text and of pictures together."""
    return min(arms, key=lambda rate: mean(scores.text + scores.scenes for scores in arms[rate].values()))


def rates_table(controls: dict[float, Arm], students: dict[float, Arm]) -> str:
    """Held-out losses at each learning rate: means, the smallest and the largest."""

    def cells(arm: Arm) -> Iterator[str]:
        for field in ("text", "scenes"):
            values = [getattr(scores, field) for scores in arm.values()]
            yield f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    lines = ["| learning rate | text, alone | taught | pictures, alone | taught |", "|---|---|---|---|---|"]
    for rate in controls:
        pairs = zip(cells(controls[rate]), cells(students[rate]), strict=True)
        lines.append("| " + " | ".join((f"{rate:g}", *(cell for pair in pairs for cell in pair))) + " |")
    return "\n".join(lines)


def line(name: str, tokens: float, compute: float, arm: Arm, control: Arm) -> str:
    """A row of the table: means, and the mean difference to the control with the smallest and the largest."""
    cells = [name, f"{tokens:.1f}", f"{compute:.1f}"]
    for field, digits, scale in (("text", 3, 1), ("scenes", 3, 1), ("right", 1, 100)):
        values = {seed: scale * getattr(scores, field) for seed, scores in arm.items()}
        cell = f"{mean(values.values()):.{digits}f}"
        if arm is not control:
            gains = [value - scale * getattr(control[seed], field) for seed, value in values.items()]
            cell += f" ({mean(gains):+.{digits}f}: {min(gains):+.{digits}f} to {max(gains):+.{digits}f})"
        cells.append(cell)
    return "| " + " | ".join(cells) + " |"


def plot(study: Study, arms: dict[str, str]) -> str:
    """Held-out losses over steps, one panel for text and one for pictures. `arms`: shown name by name of folder."""
    from trainer.report_charts import Series, line_chart

    width, height, panels = 620, 300, []
    for i, (key, title) in enumerate((("loss/text", "text"), ("loss/scenes", "pictures"))):
        series = [
            Series(shown, f"c{n}", *study.curve(name, key), style="points")
            for n, (name, shown) in enumerate(arms.items(), 1)
        ]
        chart = line_chart(series, "{:.2f}".format, width=width, height=height - 30)
        inside = chart[chart.index(">") + 1 : -len("</svg>")]
        panels.append(
            f'<g transform="translate({i * width},30)"><text class="title" x="58" y="-10">held-out loss on {title}, nats a '
            f"token, over steps</text>{inside}</g>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}" width="{2 * width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5c636e} .title{font-weight:600;fill:#1b1e24;font-size:13px}"
    ".grid{stroke:#e4e4df} .axis{stroke:#8b919b} .c1{--c:#2f6db5} .c2{--c:#c8501e} .c3{--c:#2b8a5a} .c4{--c:#7a4fb0}"
    "path{fill:none;stroke:var(--c);stroke-width:1.6} .mark{fill:#fff;stroke:var(--c);stroke-width:1.6}"
    ".end{fill:var(--c);font-weight:600} .last{font-weight:400}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/students"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    study = Study(options.runs, options.steps, options.seeds)
    study.train_teacher()
    study.teach()
    from_cache: Options = {"distill.source": "cache", "distill.cache": study.cache}
    student = load_run(STUDENT, {})
    assert student.distill
    own_rate = student.optimizer.peak_lr
    rates = sorted({*LEARNING_RATES, own_rate})
    controls, students = (
        {rate: study.arm(f"{name}-{rate:g}", {**others, "optimizer.peak_lr": rate}) for rate in rates}
        for name, others in (("alone", {"distill": None}), ("cached", from_cache))
    )
    best = best_rate(controls)
    control, cached = controls[best], students[own_rate]
    online = study.arm("online", {"distill.draws": 0})
    cost = study.cost()
    longer = study.arm(f"longer-{best:g}", {"distill": None, "optimizer.peak_lr": best}, round(cost * study.steps))

    print(f"{rates_table(controls, students)}\n\ncontrol: {best:g}, student: {own_rate:g}")
    taught = Scores.of(study.teacher)
    print(f"teacher: text {taught.text:.3f}, pictures {taught.scenes:.3f}, questions {100 * taught.right:.1f} %\n")
    print("| | tokens | compute | text, nats | pictures, nats | questions right, % |\n|---|---|---|---|---|---|")
    print(line("no teacher", 1, 1, control, control))
    print(line("no teacher, for as much compute", cost, cost, longer, control))
    print(line("teacher beside the student", 1, cost, online, control))
    print(line(f"teacher's {student.distill.draws} draws from the cache", 1, cost, cached, control))
    shown = {
        f"alone-{best:g}": "no teacher",
        f"longer-{best:g}": "no teacher, longer",
        "online": "teacher",
        f"cached-{own_rate:g}": "cache",
    }
    PLOT.write_text(plot(study, shown))
    print(f"\nplot: {PLOT}")


if __name__ == "__main__":
    main()
