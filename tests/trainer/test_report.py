"""The report as a reader gets it: whole, alone, true to its files, and safe whatever the model wrote."""

import base64
import html
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sharding.errors import UserError
from tests.trainer.runs import FACTS, RUN, evaluation, png, records, write_run
from trainer import metrics, report_charts
from trainer.report import render, write_report
from trainer.report_charts import Axis, Series, buckets, line_chart, smooth
from trainer.report_experts import heat_map
from trainer.report_scores import Score, question_scores
from trainer.sections import to_plain

CONFIG = json.loads(json.dumps(to_plain(RUN)))
VOID = {"meta", "img", "br", "line", "rect", "circle", "path", "image"}


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that do not close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).replace("\xa0", " ").split())


def rendered(found=None, scores=None, facts=FACTS, config=CONFIG) -> Page:
    return Page(render(config, facts, records() if found is None else found, scores))


def test_a_finished_run_has_everything(tmp_path):
    path = write_report(write_run(tmp_path, scores=evaluation()))
    assert path == tmp_path / "report.html"
    words = Page(path.read_text(encoding="utf-8")).words
    for part in (
        "tiny 60 of 60 steps in 15.0 s",
        "2.125 bits/byte held-out text",
        "75 % colour, new combinations; chance 12 %",
        "16.4 k tokens per second, median",
        "23.1 % of peak FLOP/s, median",
        "Loss by source",
        "scenes, held out 1.3",
        "What colour is it?",
        "✓ red",
        "accepted: red / it is red",
        "1 of these 1 are right",
        "Expert load",
        "layer 3",
        "1/E = 25.00 %",
        "Learning rate",
        "Gradient norm",
        "Data wait median 0.4 % of the step",
        "MFU = tokens/s x 3.3e+07 / peak FLOP/s. Peak 250 GFLOP/s: measured",
        "9.41 M (9,412,608)",
        "versions jax 0.10.2",
        "num_experts 4",
    ):
        assert part in words, part
    assert "Unfinished" not in words


def test_the_page_stands_alone():
    page = render(CONFIG, FACTS, records(), evaluation())
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "data", "action", "srcset"):
            assert attributes.get(name, "data:").startswith("data:"), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    assert "default-src 'none'" in html.unescape(page)


def test_what_the_model_wrote_is_only_text():
    evil = '</div><script>alert(1)</script><img src=x onerror="alert(2)">&amp;'
    scores = evaluation(predicted=evil, question=evil, answers=[evil], attribute=evil, image=png() + '"><script>')
    scores["questions"].append({**scores["questions"][0], "attribute": evil})
    config = {**CONFIG, "name": evil, "data": {evil: evil}}
    page = rendered(scores=scores, facts={**FACTS, "command": evil, evil: evil, "peak_source": evil}, config=config)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "".join(page.text).count(evil) >= 8


def test_an_unfinished_run_says_so(tmp_path):
    words = Page(write_report(write_run(tmp_path, steps=40)).read_text(encoding="utf-8")).words
    assert "Unfinished: 40 of 60 steps. This run has not been evaluated" in words
    assert "2.345 bits/byte held-out text" in words and "Held-out questions" not in words


def test_the_time_of_every_start_counts():
    found = [record for record in records() if record["kind"] == "train"]
    for record, elapsed in zip(found, (10, 20, 30, 4, 8, 12), strict=True):  # resumed after the third
        record["time/elapsed"] = elapsed
    assert "60 of 60 steps in 42.0 s" in rendered(found).words


def test_scores_of_an_earlier_step_say_so():
    assert "The held-out scores are those of step 30." in rendered(scores={**evaluation(), "step": 30}).words


def test_a_run_without_a_step_or_facts_has_a_report():
    words = rendered([], facts={}).words
    assert "No step has been recorded yet." in words and "0 of 60 steps" in words


def test_a_text_only_dense_run_has_no_empty_sections():
    plain = [
        {k: v for k, v in r.items() if "scenes" not in k and "experts" not in k and "aux" not in k} for r in records()
    ]
    scores = {"step": 60, "text_bits_per_byte": 1.5, "questions": [], "samples": []}
    words = rendered(plain, scores).words
    assert "Expert load" not in words and "Questions" not in words and "text, held out" in words


def lessons(facts, **changes) -> str:
    """What a report says of a teacher; its run's first half had 300 tokens a step, the second 100."""
    train = [record for record in records() if record["kind"] == "train"]
    taught = [
        record | {"soft": 0.5, "taught": share, "tokens": tokens} | {name: each[i] for name, each in changes.items()}
        for i, (record, share, tokens) in enumerate(
            zip(train, [1, 1, 1, 0.5, 0, 0.5], [300] * 3 + [100] * 3, strict=True)
        )
    ]
    found = re.search(r"Teacher (.*?) Divergence from the teacher", rendered(taught, facts=FACTS | facts).words)
    assert found
    return found[1]


def test_what_the_teacher_beside_the_student_took_is_said() -> None:
    flops = {"flops": [40, 40, 40, 20, 10, 10], "teacher_flops": [10, 10, 10, 2, 2, 2]}
    assert lessons({"teacher": "runs/<a>, step 6"}, **flops) == (
        "runs/<a>, step 6. 83.3 % of the tokens had targets from the teacher beside the student, which took 22.5 % of the "
        "FLOPs of the run."
    )
    assert lessons({"teacher": "runs/a"}).endswith("from the teacher beside the student.")


def test_what_the_cache_of_a_teacher_cost_is_said() -> None:
    cache = {"tokens": 6000, "bytes_per_token": 16.44, "device_seconds": 3000.0, "tokens_of_known_cost": 6000}
    said = "c, of t. 83.3 % of the tokens had targets from the cache, where one takes 16.4 bytes; "
    facts = {"teacher": "c, of t", "teacher_cache": cache}
    assert lessons(facts) == said + "making them took 50:00 min of device time (2.00 tokens/s a device)."
    counts = {
        "cache/found": [8, 15, 23, 30, 38, 1900],
        "cache/missing": [0, 1, 1, 1, 1, 98],
        "cache/damaged": [0] * 5 + [2],
    }
    lacking = (
        "100 of 2,000 segments had no targets (98 missing, 2 damaged), and were learned from the next token alone; "
    )
    assert lessons(facts, **counts) == lessons(facts).replace("83.3 %", f"{lacking}83.3 %")
    assert lessons(facts, **counts | {"cache/missing": [0] * 6, "cache/damaged": [0] * 6}) == lessons(facts)
    cache["tokens_of_known_cost"] = 3000
    assert (
        lessons(facts)
        == said + "making 3.00 thousand of its 6.00 thousand took 50:00 min of device time (1.00 tokens/s a device)."
    )
    cache["tokens_of_known_cost"] = 0
    assert lessons(facts) == said + "what teaching cost is not known."
    assert "teacher cache" not in rendered(facts=FACTS | facts).words


def test_steps_whose_targets_the_student_wrote_have_no_loss_of_the_data():
    found = [{k: v for k, v in r.items() if not k.startswith("loss")} | {"sampled/soft": 0.5} for r in records(20)]
    words = rendered(found).words
    assert "On what the student wrote" in words and "training loss" not in words
    assert "On what the student wrote" not in rendered().words
    words = rendered([*records(20), *found[1:]]).words  # the last loss that there was
    assert "training loss" in words


def test_values_that_are_not_finite_are_counted_not_drawn():
    found = records()
    found[1]["grad_norm"], found[1]["loss/text"] = math.inf, math.nan
    page = render(CONFIG, FACTS, found, None)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower().replace("nano", "")
    assert Page(page).words.count("Recorded as not finite, and not drawn: 1.") == 2
    for record in found:
        record["grad_norm"] = math.nan
    assert "No finite value was recorded." in rendered(found).words


def test_the_report_is_deterministic_and_replaced_whole(tmp_path, monkeypatch):
    write_run(tmp_path, scores=evaluation())
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(No space left on device\)"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        write_report(tmp_path)


def test_curves_go_through_their_values():
    picture = line_chart([Series("a", "c1", [0, 50, 100], [1.0, 3.0, 2.0], "exact")], str, width=400, height=200)
    (path,) = re.findall(r'class="smooth c1" d="M([^"]*)"', picture)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split()) for point in path.split("L"))
    assert (x1 - x0, x2 - x1) == pytest.approx((163, 163)) and y1 < y2 < y0
    assert (y0 - y1) == pytest.approx(2 * (y2 - y1), abs=0.2)


def test_a_gap_in_a_curve_stays_a_gap():
    picture = line_chart([Series("a", "c1", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], "exact")], str)
    (path,) = re.findall(r'class="smooth c1" d="([^"]*)"', picture)
    assert path.count("M") == 2 and path.count("L") == 1


def test_long_curves_keep_their_extremes(monkeypatch):
    monkeypatch.setattr(report_charts, "MAX_POINTS", 10)
    values = np.ones(1000)
    values[537] = 50
    middle, (mean, lowest, highest) = buckets(np.arange(1000.0), values)
    assert len(middle) == 10 and highest.max() == 50 and lowest.min() == 1 and mean.max() == pytest.approx(1.49)


def test_smoothing_keeps_constants_ignores_nan_and_reduces_noise():
    values = np.full(200, 3.0)
    values[50] = np.nan
    assert smooth(values) == pytest.approx(3.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise)[50:].std() < 0.4 * noise.std()
    assert np.isnan(smooth(np.full(5, np.nan))).all()


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis(0, 1400, 0, 1), [0, 500, 1000]),
        (Axis(0.3, 6.5, 0, 1, log=True), [0.5, 1, 2, 5]),
        (Axis(0.9, 1.1, 0, 1), [0.9, 0.95, 1.0, 1.05, 1.1]),
        (Axis(1e-4, 1e4, 0, 1, log=True), [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1e3, 1e4]),
    ],
)
def test_ticks_are_round(axis, expected):
    assert axis.ticks(4) == pytest.approx(expected)


def test_the_heat_map_shows_the_ratio_to_the_ideal_share():
    steps = [10, 20, 30, 40]
    loads = [[[0.25, 0.5, 0.25, 0.0]]] * 2 + [[[1.0, 0.0, 0.0, 0.0]]] * 2
    picture = heat_map(steps, loads, [7])
    assert "layer 7" in picture and "1/E = 25.00 %" in picture
    (data,) = re.findall(r'href="data:image/png;base64,([^"]*)"', picture)
    pixels_ECR = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels_ECR.shape == (4, 4, 4)
    under, over, ideal = (0, 97, 168, 255), (213, 94, 0, 255), 0
    assert pixels_ECR[0, 0, 3] == ideal  # its share is 1/E: the page shows through
    assert tuple(pixels_ECR[0, 2]) == tuple(pixels_ECR[0, 3]) == over and pixels_ECR[0, 1, 3] == ideal
    assert tuple(pixels_ECR[1, 3]) == under and tuple(pixels_ECR[3, 0]) == under
    assert (
        tuple(pixels_ECR[1, 0][:3]) == over[:3] and 100 < pixels_ECR[1, 0, 3] < 255
    )  # twice the ideal, half the scale
    bars = [float(width) for width in re.findall(r'class="load"[^>]* width="([^"]*)"', picture)]
    assert bars[0] > 0 and bars[1:] == [0, 0, 0]


def test_scores_gather_combinations_and_weigh_chance_by_questions():
    colour, size, everything = question_scores(evaluation())
    assert (colour.seen, colour.novel, colour.shuffled, colour.blank) == (
        Score(36, 40),
        Score(15, 20),
        Score(9, 60),
        Score(6, 60),
    )
    assert (size.novel, size.blank, size.chance) == (None, None, 0.5)
    assert everything.attribute == "all" and everything.seen == Score(66, 80)
    assert everything.chance == pytest.approx((60 * 0.125 + 40 * 0.5) / 100)
    assert question_scores({"questions": []}) == []


def test_the_interval_is_wilsons():
    # By hand: centre (0.9 + 1.96²/80) / (1 + 1.96²/40), half width 1.96 √(0.09/40 + 1.96²/6400) / (1 + 1.96²/40).
    assert Score(36, 40).interval() == pytest.approx((0.7695, 0.9604), abs=5e-4)
    assert Score(0, 10).interval()[0] == 0 and Score(10, 10).interval()[1] == 1
