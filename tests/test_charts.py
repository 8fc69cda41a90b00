import math
import re

from eval.charts import MANY, Chart, Curve, Share, charts, shares
from eval.score_curves import over_scales


def _strokes(html):
    """(x, from, to) of every vertical stroke of the curve."""
    path = next(iter(re.findall(r'<path class="main" d="([^"]+)"', html)))
    found = re.findall(r"M([\d.-]+) ([\d.-]+)V([\d.-]+)", path)
    return [tuple(map(float, stroke)) for stroke in found]


def _places(html):
    """(x, y) of the points of the curve."""
    path = next(iter(re.findall(r'<path class="main" d="M([^"]+?)h0', html)))
    return [tuple(map(float, point.split())) for point in path.split("L")]


def _drawn(curve, x=(0.0, 1.0, 2.0)):
    return charts("C", "", [Chart("c", "y", "x", list(x), [curve], from_zero=False)])


def test_an_interval_is_drawn_from_its_low_to_its_high_around_the_value():
    nowhere = (math.nan, math.nan)
    html = _drawn(Curve("c", [1.0, 2.0, 3.0], intervals=[(0.0, 1.5), nowhere, (2.0, 4.0)]))
    (first, low, high), (last, _, top) = _strokes(html)
    places = _places(html)
    assert (first, last) == (places[0][0], places[2][0])
    # One unit up is the same everywhere: downwards in the picture.
    unit = places[0][1] - places[1][1]
    assert unit > 0
    assert math.isclose(low - places[0][1], unit, abs_tol=0.2)
    assert math.isclose(places[0][1] - high, unit / 2, abs_tol=0.2)
    assert top >= 26  # inside the axes, which reach to the end of the longest stroke


def test_a_spread_reaches_equally_far_up_and_down_as_before():
    html = _drawn(Curve("c", [1.0, 2.0, 3.0], spread=[0.5, math.nan, 0.5]))
    strokes, places = _strokes(html), _places(html)
    assert len(strokes) == 2
    for (_, low, high), (_, y) in zip(strokes, (places[0], places[2]), strict=True):
        assert math.isclose(low - y, y - high, abs_tol=0.2)


def test_values_left_of_zero_stay_inside_the_axes():
    places = _places(_drawn(Curve("c", [1.0, 2.0, 3.0]), x=(-1.0, 0.0, 1.0)))
    assert [x for x, _ in places] == [50, 221, 392]


def test_scales_are_drawn_in_order_and_a_missing_score_is_a_gap():
    def at(scale, scores):
        return {"scale": scale, "scores": {k: {"value": v} for k, v in scores.items()}}

    points = [at(1.0, {"clip_t": 30.0}), at(0.0, {"clip_t": 31.0, "odd_one": 1.0}), at(0.5, {})]
    html = over_scales({"scores": {}, "curves": {"scales": points}})
    assert "odd one" in html and html.count("<svg") == 2
    path = re.findall(r'<path class="main" d="([^"]+)"', html)[0]
    assert [m.split()[0] for m in re.findall(r"M([^h]+)h0", path)] == ["50", "392"]


def test_curves_over_places_of_their_own_share_the_axes():
    curves = [
        Curve("short", [1.0, 2.0], MANY[0], x=[0.0, 10.0]),
        Curve("long", [1.0, 1.5, 3.0], MANY[4], x=[0.0, 10.0, 20.0]),
    ]
    html = charts("C", "", [Chart("c", "y", "x", [], curves, from_zero=False)])
    paths = dict(re.findall(r'<path class="(q1(?: dashed)?)" d="M([^"]+?)h0', html))
    ends = {look: [float(at.split()[0]) for at in path.split("L")] for look, path in paths.items()}
    assert ends == {"q1": [50, 221], "q1 dashed": [50, 221, 392]}
    assert html.index(">short<") < html.index(">long<")


def test_parts_of_a_whole_say_their_share():
    html = shares("Time", "", [Share("a & b", 30.0, "30 s"), Share("c", 10.0, "10 s")])
    assert "a &amp; b" in html and "width:75.0%" in html and ">25.0 %<" in html
    assert shares("Time", "", []) == "" == shares("Time", "", [Share("a", 0.0, "0 s")])
