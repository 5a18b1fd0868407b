"""Page: one file, everything escaped, curves that keep their extremes."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from fromzero.errors import DataError
from fromzero.report.events import Evaluated, Finished, Planned, Started, StepDone, Warned
from fromzero.report.jsonlines import JsonLines
from fromzero.report.page import MOST_POINTS, Page, thin, ticks, write_page

BAD = '<script>alert("x")</script>'


def run_folder(path, events, recipe=None):
    path.mkdir(exist_ok=True)
    observer = JsonLines(path / "events.jsonl")
    for event in events:
        observer(event)
    observer.close()
    if recipe is not None:
        (path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return path


def a_run(name="mnist-cnn", steps=2000, metric="accuracy"):
    yield Planned(name, steps, 500, 1_199_882, 1_290, None)
    yield Started(name, f"runs/{name}", 0, 0.0)
    for step in range(1, steps + 1):
        yield StepDone(step, 1 + (step - 1) // 500, 64, 2.3 * math.exp(-step / 400) + 0.1, 1e-3 * (1 - step / steps))
        if step % 500 == 0:
            yield Evaluated(step, step // 500, 0.5 / step * 500, 0.4, {metric: 1 - 50 / step}, best=True)
    yield Warned(f"{name} is odd", "look at it")
    yield Finished("done", steps, 185.0, {"run": name, "validation": {"loss": 0.1, metric: 0.98}, "steps": steps})


def page_of(folder):
    return write_page(folder).read_text(encoding="utf-8")


def charts(page):
    return [
        ET.fromstring(svg)
        for svg in re.findall(
            r"<svg.*?</svg>",
            page.replace("class=label", 'class="label"').replace("class=x", 'class="x"').replace("class=y", 'class="y"'),
            re.S,
        )
    ]


def test_the_page_has_curves_evaluations_result_warnings_and_recipe(tmp_path):
    page = page_of(run_folder(tmp_path / "a", a_run(), "name: mnist-cnn\nbatch: 64\n"))
    for title in ("Warnings", "Curves", "Evaluations", "Result", "Recipe"):
        assert f"<h2>{title}</h2>" in page
    assert "done · 2,000 steps · 1,199,882 parameters · 1,290 trained · 3 min 5 s" in page
    assert "<th>validation.accuracy</th><td>0.9800</td>" in page
    assert "batch: 64" in page
    assert page.count("<td>best</td>") == 4


def test_there_is_a_chart_with_ticks_and_labels_for_loss_each_metric_and_learning_rate(tmp_path):
    found = charts(page_of(run_folder(tmp_path / "a", a_run())))
    assert [svg.get("aria-label") for svg in found] == ["loss per step", "accuracy per step", "learning rate per step"]
    for svg in found:
        kinds = [text.get("class") for text in svg.iter("text")]
        assert kinds.count("x") >= 3
        assert kinds.count("y") >= 3
        assert kinds.count("label") == 2
    assert len(list(found[0].iter("polyline"))) == 2


def test_every_point_lies_within_its_chart(tmp_path):
    for svg in charts(page_of(run_folder(tmp_path / "a", a_run()))):
        for line in svg.iter("polyline"):
            points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
            assert len(points) <= MOST_POINTS
            assert all(0 <= x <= 640 and 0 <= y <= 260 for x, y in points)


def test_nothing_from_outside_reaches_the_page_unescaped(tmp_path):
    page = page_of(run_folder(tmp_path / "a", a_run(BAD, metric='"><img src=x onerror=1>'), f"# {BAD}\n"))

    seen = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.add(tag)
            assert not any(name.startswith("on") for name, _ in attrs)

    Tags().feed(page)
    assert not seen & {"script", "img", "link", "iframe", "object"}
    assert "<h1>&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;</h1>" in page


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page = page_of(run_folder(tmp_path / "a", a_run()))
    assert not re.search(r"(?:https?:)?//|@import|url\(|\bsrc=|<script", page)
    assert "prefers-color-scheme: dark" in page


def test_a_name_that_looks_like_a_place_of_the_template_changes_nothing(tmp_path):
    page = page_of(run_folder(tmp_path / "a", a_run("{body}"), "name: '{title}'"))
    assert page.count("<h2>Curves</h2>") == 1
    assert "<title>{body}</title>" in page
    assert "name: &#x27;{title}&#x27;" in page


def test_losses_that_are_no_numbers_are_counted_and_not_drawn(tmp_path):
    nan = float("nan")
    page = page_of(
        run_folder(
            tmp_path / "a",
            [StepDone(1, 1, 64, 0.5, 1.0), StepDone(2, 1, 64, nan, 1.0), Evaluated(1, 1, 0.5, 0.5), Evaluated(2, 1, nan, nan)],
        )
    )
    assert "2 losses were no finite numbers" in page
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page))


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-320, 2e-320], [0.0, 5e-324], [-1e308, 1e308], [1e-30, 1e30], [0.5, 1e12]])
def test_extreme_curves_are_drawn(tmp_path, values):
    svg = charts(page_of(run_folder(tmp_path / "a", [StepDone(i + 1, 1, 64, value, 0.1) for i, value in enumerate(values)])))[0]
    points = [tuple(map(float, pair.split(","))) for pair in next(svg.iter("polyline")).get("points").split()]
    assert len(points) == len(values)
    assert all(0 <= x <= 640 and 0 <= y <= 260 for x, y in points)


def test_a_curve_that_is_flat_but_for_rounding_is_drawn_flat_with_ticks_that_differ(tmp_path):
    svg = charts(page_of(run_folder(tmp_path / "a", [StepDone(1, 1, 64, 1.0, 0.1), StepDone(2, 1, 64, 1 + 1e-12, 0.1)])))[0]
    labels = [text.text for text in svg.iter("text") if text.get("class") == "y"]
    assert len(labels) == len(set(labels)) >= 3


def test_a_run_that_only_began_has_a_page(tmp_path):
    assert "not finished" in page_of(run_folder(tmp_path / "a", [Started("a", "runs/a", 0, 0.0)]))


def test_a_run_that_went_on_is_not_called_by_how_it_was_left(tmp_path):
    events = [Started("a", "runs/a", 0, 0.0), Finished("interrupted", 5, 1.0), Started("a", "runs/a", 5, 2.0)]
    assert "not finished" in page_of(run_folder(tmp_path / "a", events))


def test_a_folder_without_events_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        write_page(tmp_path)


def test_a_page_is_written_again_and_leaves_nothing_beside_it(tmp_path):
    folder = run_folder(tmp_path / "a", a_run())
    assert write_page(folder) == write_page(folder) == folder / "page.html"
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "page.html"]


def test_thinning_keeps_first_last_lowest_and_highest_in_order():
    points = [(float(i), math.sin(i / 50)) for i in range(100_000)]
    points[34_567], points[67_890] = (34_567.0, 9.0), (67_890.0, -9.0)
    thinned = thin(points)
    assert 400 < len(thinned) <= MOST_POINTS
    assert thinned == sorted(thinned)
    assert {points[0], points[-1], points[34_567], points[67_890]} <= set(thinned)


def test_short_curves_are_not_thinned():
    points = [(float(i), 1.0) for i in range(MOST_POINTS)]
    assert thin(points) == points


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert [f"{tick:.6g}" for tick in ticks(0.13, 0.87)] == ["0.2", "0.4", "0.6", "0.8"]
    assert ticks(5, 5) == [5]


def test_the_page_is_written_at_the_end_by_the_process_whose_run_spoke(tmp_path):
    folder = run_folder(tmp_path / "a", a_run())
    silent, heard = Page(folder), Page(folder)
    heard(object())
    silent.close()
    assert not (folder / "page.html").exists()
    heard.close()
    assert (folder / "page.html").exists()
