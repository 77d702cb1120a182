"""The plots of a bench page as SVG: roofline, stage breakdown, ablation, latency distribution, batch scaling.

Every function returns None where the record has nothing to plot. Colors are those of Okabe and Ito, which
people with any color vision tell apart; who is who is also said by marker, position or label.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from blip3o_rt.measure.bench.compose import breakdown as stage_seconds
from blip3o_rt.measure.bench.lines import BY_NAME, ORDER, unit
from blip3o_rt.measure.records import OURS, BenchRecord, Line, OpTime, Row, baselines, rows
from blip3o_rt.measure.units import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PUBLISHED = ("published", "published-compiled", "published-graphed")
CANDIDATES = {  # who -> color and marker
    OURS: ("#0072b2", "o"),
    "transformers": ("#e69f00", "s"),
    "diffusers": ("#009e73", "D"),
    "published": ("#d55e00", "^"),
    "published-compiled": ("#cc79a7", "v"),
    "published-graphed": ("#56b4e9", "P"),
}
OTHER_COLOR, GRID_COLOR, TEXT_COLOR = "#555555", "#dddddd", "#222222"
OTHER = (OTHER_COLOR, "X")
BLUE, RED = CANDIDATES[OURS][0], CANDIDATES["published"][0]
MEASURED_WHOLE = ("all ops", "batching")  # switches of bench that no sum of single ones can hold
BEHIND_TEXT = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
LABEL_HEIGHT = 14.0  # points
WIDTH = 9.5  # inches; a page shows an inch as 96 pixels
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "blip3o_rt",  # the same record gives the same bytes
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelcolor": TEXT_COLOR,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID_COLOR,
    "figure.facecolor": "white",
    "legend.frameon": False,
}


def available() -> bool:
    """Whether plots can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def figure(
    height: float, rows: int = 1, columns: int = 1, heights: Sequence[float] | None = None
) -> Iterator[tuple[list[Axes], io.BytesIO]]:
    """A figure's panels, row by row, in the pages' style; after the block its SVG is in the buffer.

    height: inches. heights: the rows', in proportion.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = drawn.subplots(rows, columns, squeeze=False, height_ratios=heights)
        yield list(panels.flat), buffer
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})


def roofline(record: BenchRecord) -> bytes | None:
    """Attained GFLOP/s over operations per byte, below the rooflines measured in the same run."""
    stages = [point for line in record.lines if line.who == OURS and (point := roofline_point(line))]
    ops = [point for op in record.ops if (point := roofline_point(op))]
    if not stages and not ops:
        return None
    low = min(x for x, _, _ in stages + ops) / 30
    high = max(x for x, _, _ in stages + ops) * 8
    with figure(5.2) as ((axes,), buffer):
        top = draw_rooflines(axes, record, low, high)
        top = max(top, *(y for _, y, _ in stages + ops))
        bottom = min(y for _, y, _ in stages + ops)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 3, 3 * top))
        axes.set(xlabel="FLOP per byte", ylabel="GFLOP/s")
        for points, size, shade, label in ((ops, 18, OTHER_COLOR, "op"), (stages, 60, BLUE, "stage")):
            xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
            axes.scatter(xs, ys, s=size, color=shade, alpha=0.8, label=label, zorder=3)
        height = 72 * 4.2 / math.log10(9 * top / bottom)  # points per decade
        for x, y, name, drop in without_overlap(stages, height):
            axes.annotate(
                name,
                (x, y),
                xytext=(8, -4 - drop),
                textcoords="offset points",
                color=BLUE,
                bbox=BEHIND_TEXT,
                zorder=2.5,
                arrowprops={"arrowstyle": "-", "color": BLUE, "linewidth": 0.6} if drop else None,
            )
        if stages and ops:
            axes.legend(loc="lower right")
    return buffer.getvalue()


def roofline_point(timed: Line | OpTime) -> tuple[float, float, str] | None:
    """(FLOP per byte, GFLOP/s, name) of one call; None where one of the three is not known."""
    if not timed.bytes or not timed.flops or not timed.median:
        return None
    return timed.flops / timed.bytes, timed.flops / timed.median / 1e9, timed.label


def without_overlap(
    points: Sequence[tuple[float, float, str]], points_per_decade: float
) -> list[tuple[float, float, str, float]]:
    """(x, y, name, how many points to lower its label so that it lies on no other one's)."""
    placed: list[tuple[float, float, str, float]] = []
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        drop = 0.0
        for other_x, other_y, _, other_drop in placed:
            above = points_per_decade * math.log10(other_y / y) + drop - other_drop
            if abs(math.log10(x / other_x)) < 1.2 and abs(above) < LABEL_HEIGHT:
                drop += LABEL_HEIGHT - above
        placed.append((x, y, name, drop))
    return placed


def draw_rooflines(axes: Axes, record: BenchRecord, low: float, high: float) -> float:
    """The memory slope and a level per dtype of matrix product, from where they meet; the highest level.

    Their names stand left of the slope, where no point can be.
    """
    read = record.roofline("read")
    bandwidth = read.value if read is not None else None
    levels = {r.dtype: r.value for r in record.rooflines if r.name == "matmul" and r.value}
    top = max(levels.values(), default=0.0)
    end = top / bandwidth if bandwidth and top else high
    if bandwidth:
        axes.plot([low, end], [bandwidth * low, bandwidth * end], color=TEXT_COLOR, linewidth=1.2)
        x = math.sqrt(low * end)
        name_roofline(axes, f"read {significant(bandwidth)} GB/s", x, bandwidth * x)
    for dtype, level in levels.items():
        begin = level / bandwidth if bandwidth else low
        axes.plot([begin, high], [level, level], color=TEXT_COLOR, linewidth=1.2, linestyle="--")
        name_roofline(axes, f"matmul {dtype} {significant(level)} GFLOP/s", begin, level)
    return top


def name_roofline(axes: Axes, name: str, x: float, y: float) -> None:
    axes.annotate(name, (x, y), xytext=(-8, -3), textcoords="offset points", ha="right", bbox=BEHIND_TEXT)


def breakdown(record: BenchRecord) -> bytes | None:
    """Seconds of one image, stage by stage, ours and the published code's."""
    parts = stage_seconds(record, record.lines, PUBLISHED)
    if not parts:
        return None
    stages = [stage for stage in ORDER if any(stage in found for found in parts.values())]
    with figure(1.3 + 0.55 * len(parts)) as ((axes,), buffer):
        whos = list(parts)[::-1]
        left = [0.0] * len(whos)
        for stage in stages:
            widths = [parts[who].get(stage, 0.0) for who in whos]
            axes.barh(
                whos,
                widths,
                left=left,
                color=BY_NAME[stage].color,
                label=stage,
                edgecolor="white",
                height=0.6,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for who, total in zip(whos, left, strict=True):
            axes.annotate(
                f"{significant(total)} s",
                (total, who),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set(xlabel="seconds per image", xlim=(0, 1.15 * max(left)))
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(len(stages), 5), fontsize=10)
    return buffer.getvalue()


def ablation(record: BenchRecord) -> bytes | None:
    """What each switch takes off the time of its line, from everything off to everything on."""
    found: dict[str, list[tuple[str, float]]] = {}
    for entry in record.ablations:
        if entry.ratio and entry.ratio > 0:
            found.setdefault(entry.line, []).append((entry.switch, entry.ratio))
    if not found:
        return None
    height = sum(0.9 + 0.36 * (len(steps) + 1) for steps in found.values())
    heights = [len(steps) + 3.0 for steps in found.values()]
    with figure(height, rows=len(found), heights=heights) as (panels, buffer):
        for axes, (line, steps) in zip(panels, found.items(), strict=True):
            draw_waterfall(axes, line, sorted(steps, key=lambda step: -step[1]))
    return buffer.getvalue()


def draw_waterfall(axes: Axes, line: str, steps: Sequence[tuple[str, float]]) -> None:
    """One bar per switch, from the time with it off to that with it on, each beginning where one ended.

    What turns several switches at once, or times another amount of work, is a bar of its own from 0.
    """
    whole = [step for step in steps if step[0] in MEASURED_WHOLE]
    single = [step for step in steps if step[0] not in MEASURED_WHOLE]
    begin = 1.0 + sum(ratio - 1.0 for _, ratio in single)
    bars = [(name, 0.0, ratio, OTHER_COLOR, ratio) for name, ratio in whole]
    for name, ratio in single:
        end = begin - (ratio - 1.0)
        bars.append((name, begin, end, BLUE if ratio >= 1 else RED, ratio))
        begin = end
    bars.append(("all on", 0.0, 1.0, OTHER_COLOR, 1.0))
    for place, (_, left, right, shade, ratio) in enumerate(bars):
        axes.barh(place, right - left, left=left, color=shade, height=0.62)
        edge = (max(left, right), place)
        axes.annotate(f"{ratio:.2f}x", edge, xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.axvline(1.0, color=TEXT_COLOR, linewidth=1)
    most = max(edge for bar in bars for edge in bar[1:3])
    axes.set(title=line, xlabel="time, where all on is 1", xlim=(0, 1.15 * most))
    axes.grid(visible=False, axis="y")


def distribution(record: BenchRecord) -> bytes | None:
    """Every sample of every stage at its smallest batch, ours above the baselines, with medians."""
    smallest: dict[str, Row] = {}
    for row in rows([record], ORDER):
        if any(line.samples for line in row.lines.values()):
            smallest.setdefault(row.name, row)
    if not smallest:
        return None
    heights = [0.5 + 0.34 * len(row.lines) for row in smallest.values()]
    with figure(sum(heights) + 0.45 * len(heights), rows=len(heights), heights=heights) as (panels, buffer):
        for axes, row in zip(panels, smallest.values(), strict=True):
            draw_samples(axes, row)
    return buffer.getvalue()


def draw_samples(axes: Axes, row: Row) -> None:
    whos = [who for who in (OURS, *baselines([row])) if who in row.lines and row.lines[who].samples]
    longest = max(row.lines[who].median or 0.0 for who in whos)
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")
    for place, who in enumerate(whos):
        line = row.lines[who]
        values = [scale * sample for sample in line.samples]
        color, marker = CANDIDATES.get(who, OTHER)
        places = [place] * len(values)
        axes.scatter(values, places, marker=marker, color=color, alpha=0.5, s=28, linewidths=0)
        axes.plot([scale * (line.median or 0.0)] * 2, [place - 0.35, place + 0.35], color=TEXT_COLOR)
    batch = "" if row.batch == 1 else f", batch {row.batch}"
    axes.set_yticks(range(len(whos)), whos)
    most = max(scale * max(row.lines[who].samples) for who in whos)
    axes.set(xlabel=f"{row.name}{batch}, {unit}", xlim=(0, 1.05 * most), ylim=(len(whos) - 0.4, -0.6))
    axes.grid(visible=False, axis="y")


def batch_scaling(record: BenchRecord) -> bytes | None:
    """Work per second over the batch, for every stage that was timed at more than one batch size."""
    found: dict[str, dict[str, list[Line]]] = {}
    for row in rows([record], ORDER):
        for who, line in row.lines.items():
            if line.rate is not None and unit(row.name):
                found.setdefault(row.name, {}).setdefault(who, []).append(line)
    several = {
        name: {who: lines for who, lines in by_who.items() if len(lines) > 1}
        for name, by_who in found.items()
    }
    several = {name: by_who for name, by_who in several.items() if by_who}
    if not several:
        return None
    columns = min(2, len(several))
    count = math.ceil(len(several) / columns)
    with figure(3.3 * count, rows=count, columns=columns) as (panels, buffer):
        for axes in panels[len(several) :]:
            axes.set_visible(False)
        for axes, (name, by_who) in zip(panels, several.items(), strict=False):
            draw_scaling(axes, name, by_who)
    return buffer.getvalue()


def draw_scaling(axes: Axes, name: str, by_who: Mapping[str, Sequence[Line]]) -> None:
    batches = sorted({line.batch for lines in by_who.values() for line in lines})
    for who, lines in by_who.items():
        axes.plot(
            [line.batch for line in lines],
            [line.rate or 0.0 for line in lines],
            color=CANDIDATES.get(who, OTHER)[0],
            marker=CANDIDATES.get(who, OTHER)[1],
            label=who,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set(title=name, xlabel="batch", ylabel=f"{unit(name)}s per second")
    axes.set_ylim(bottom=0)
    axes.legend()
