"""What the terminal shows, read back from the text that was written."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import ModelConfig
from tests.trainer.runs import FACTS, RUN, evaluation, records
from trainer.console import Console
from trainer.report_text import compact, count, duration, percent

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(run=RUN, facts=FACTS, terminal=False, width=100, entered=True, act=lambda console: None) -> str:
    file = io.StringIO()
    console = Console(run, Path("runs/tiny"), facts, file=file, terminal=terminal, width=width)
    if entered:
        with console:
            act(console)
    else:
        act(console)
    return file.getvalue()


def last_panel(text: str) -> str:
    return CONTROL.sub("", text[text.rindex("╭") :])


def test_elsewhere_every_record_is_one_aligned_line_without_control_codes():
    def act(console):
        for record in records():
            console.record(record)
        console.saved(60)
        console.message("done [bold]here[/bold]")

    text = shown(act=act, width=40)
    assert text.replace("\n", "").isprintable()
    lines = text.splitlines()
    assert len(lines) == len(records()) + 2
    train = [line for line in lines if "  train  " in line]
    assert len(train) == 6
    assert len({(line.index("lr "), line.index("tok/s"), line.index("MFU"), line.index("wait")) for line in train}) == 1
    assert lines[0].startswith("step 10/60  train     loss ") and "MFU 23.1 %" in lines[0] and "ETA 12.5 s" in lines[0]
    assert "16.4 k tok/s" in lines[0] and "busiest expert  2.8x" in lines[0] and "skipped" not in lines[0]
    (held_out, _) = (line for line in lines if "held-out" in line)
    assert held_out.startswith("step 30/60  held-out  loss 3.0000") and held_out.endswith("2.3450 bits/byte")
    assert lines[-2] == "step 60/60  checkpoint saved"
    assert lines[-1] == "done [bold]here[/bold]"


def test_a_terminal_has_a_live_panel_with_everything():
    def act(console):
        for record in records():
            console.record({**record, "skipped": 2})
        console.saved(40)
        console.message("a message above")

    text = shown(act=act, terminal=True)
    panel = last_panel(text)
    for part in (
        "tiny  60 of 60 steps  100 %  ETA done",
        "scenes 1.1991",
        "text 2.5413",
        "loss 3.0000",
        "2.345 bits/byte",
        "at step 60",
        "learning rate 1.00e-03",
        "grad norm 0.017",
        "skipped steps 2",
        "16.4 k tokens/s",
        "MFU 23.1 %",
        "data wait 0.4 %",
        "layer 1",
        "layer 3",
        "busiest 2.8x",
        "step 40",
    ):
        assert part in panel, part
    assert "a message above" in text and "a message above" not in panel


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_cache_of_targets_lacks_is_shown(terminal: bool) -> None:
    def line(**metrics: object) -> str:
        text = shown(act=lambda console: console.record(records()[0] | metrics), terminal=terminal, width=160)
        return last_panel(text) if terminal else text

    whole = line(taught=1.0, soft=0.25, **{"cache/found": 8, "cache/missing": 0, "cache/damaged": 0})
    none = line(taught=0.0, **{"cache/found": 8, "cache/missing": 7, "cache/damaged": 1})
    word = "divergence" if terminal else "from teacher"
    assert f"{word} 0.2500" in whole and "missing" not in whole and "damaged" not in whole
    assert f"{word} - " in none and re.search("targets missing 7 +targets damaged 1", none)
    assert word not in line() and (terminal or whole.index("lr ") == none.index("lr "))


def test_the_cursor_is_visible_while_it_runs_so_that_leaving_at_once_leaves_it_so():
    file = io.StringIO()
    with Console(RUN, Path("runs/tiny"), FACTS, file=file, terminal=True, width=80) as console:
        console.record(records()[0])
        assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")


def test_the_strip_shows_each_experts_share_of_the_ideal():
    panel = last_panel(shown(act=lambda console: console.record(records()[0]), terminal=True))
    # Shares of 1, 1, 1.2, 0.8 and of 2.8, 0.4, 0.8, 0 times 1/E; half height is 1/E.
    assert "▄▄▅▃  busiest 1.2x" in panel
    assert "█▂▃▁  busiest 2.8x" in panel


def test_many_experts_and_layers_fit_a_narrow_terminal():
    run = replace(RUN, model=ModelConfig(num_layers=48, num_experts=128))
    load = [[1 / 128] * 128] * 48
    record = {**records()[0], "experts/load": load}
    panel = last_panel(shown(run, act=lambda console: console.record(record), terminal=True, width=44))
    assert max(map(len, panel.splitlines())) <= 44
    assert len(re.findall(r"layer \d+ ", panel)) == 8 and "layer 47" in panel
    assert "▄▄▄▄" in panel and "█" not in panel


def test_before_the_first_step_the_panel_says_so():
    assert "waiting for the first step" in last_panel(shown(terminal=True))


@pytest.mark.parametrize("terminal", [False, True])
def test_the_banner_states_the_facts_that_are_known(terminal):
    text = CONTROL.sub("", shown(terminal=terminal, entered=False, act=Console.banner, width=120))
    for part in (
        "drover: tiny",
        "runs/tiny",
        "1 x cpu",
        "9.41 M, 3.12 M active per token",
        "70 % scenes, 30 % text; digest 9c41f0aa",
        "scratch",
        "250 GFLOP/s (measured: best 1024 x 1024 float32 matrix product on this cpu)",
        "MFU = tokens/s x 3.3e+07 / peak FLOP/s",
    ):
        assert part in text, part
    flagged = shown(facts=FACTS | {"compiler_flags": "--xla_a=1"}, terminal=terminal, entered=False, act=Console.banner)
    assert "--xla_a=1" in flagged and "compiler" not in text
    bare = shown(facts={}, terminal=terminal, entered=False, act=Console.banner)
    assert "runs/tiny" in bare and "None" not in bare and "peak" not in bare


def test_scores_stand_beside_chance():
    scores = evaluation()
    scores["questions"].append({**scores["questions"][-1], "attribute": "[red]", "condition": "blank"})
    text = shown(act=lambda console: console.scores(scores), entered=False)
    assert "[red]" in text
    rows = {words[0]: words[1:] for line in text.splitlines() if (words := line.replace(" %", "%").split())}
    assert rows["colour"] == ["90%", "75%", "15%", "10%", "12%", "60"]
    assert rows["size"] == ["75%", "-", "50%", "-", "50%", "40"]
    assert rows["all"] == ["82%", "75%", "29%", "26%", "28%", "100"]
    assert "held-out text: 2.125 bits per byte" in text


def test_scores_without_questions_or_text_print_nothing_made_up():
    text = shown(act=lambda console: console.scores({"step": 1, "questions": [], "text_bits_per_byte": None}))
    assert text.strip() == ""


def test_records_with_unknown_or_missing_keys_are_shown():
    text = shown(act=lambda console: console.record({"kind": "train", "step": 3, "loss": float("nan"), "new/key": 1}))
    assert text.startswith("step  3/60  train     loss nan")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (compact(0), "0"),
        (compact(0.5), "0.50"),
        (compact(12345), "12.3 k"),
        (compact(999.6), "1.00 k"),
        (compact(5.13e11, "FLOP/s"), "513 GFLOP/s"),
        (compact(0, "FLOP/s"), "0 FLOP/s"),
        (count(108_641_793_536), "109 B"),
        (count(4_200_000), "4.20 M"),
        (duration(0.42), "0.42 s"),
        (duration(59.97), "1:00 min"),
        (duration(222), "3:42 min"),
        (duration(7322), "2:02 h"),
        (duration(300000), "3 d 11 h"),
        (percent(0.2314), "23.1 %"),
    ],
)
def test_numbers_read_as_people_write_them(text, expected):
    assert text == expected
