"""Plots of a load test: throughput and TTFT over the request rate; latency over throughput; heat maps of users ×
context. None of them shows latencies of overloaded cells.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gemma4_tpu.benching.all_cells import Results
from gemma4_tpu.benching.cells import Cell, rate_text
from gemma4_tpu.benching.one_cell import FAILED, INFEASIBLE, MEASURED, OK
from gemma4_tpu.plotting import COLOURS, INK, draw_titled

_QUANTITIES = (  # file, key, label, colours of a heat map (brighter is better), states of the cells that are shown
    ("throughput", "output_throughput", "output tokens per second", "viridis", MEASURED),
    ("ttft", "median_ttft_ms", "median time to first token (ms)", "viridis_r", (OK,)),
)
_CURVES = {"ttft": "time to first token (ms)", "tpot": "time per output token (ms)"}


def plot_results(results: Results, folder: Path, title: str, searched: dict[str, Any] | None) -> list[Path]:
    """Draws the plots for which there are figures; returns the paths. `searched`: what `slo_outcome` returned, if rates
    were searched for.
    """
    folder.mkdir(exist_ok=True)
    drawn = [path for name in _CURVES if (path := _curve(results, name, title, folder, searched))]
    for name, key, label, colours, states in _QUANTITIES:
        known = {cell: r[key] for cell, r in results.items() if r["state"] in states and r[key] is not None}
        rates = {cell: value for cell, value in known.items() if cell.rate is not None}
        if rates and not searched:  # a search's trials bunch up around one rate: no curve over rates to read
            drawn.append(_over_rate(rates, label, title, folder / f"{name}.png", logarithmic=name == "ttft"))
        if any(cell.users is not None for cell in known):
            drawn.append(_matrix(results, key, label, colours, title, folder / f"{name}_matrix.png"))
    return drawn


def _over_rate(values: dict[Cell, float], label: str, title: str, path: Path, *, logarithmic: bool) -> Path:
    """Draws one line for each pair of lengths; the unbounded rate is set apart on the right."""
    rates = sorted({cell.rate for cell in values if cell.rate is not None})
    places = {rate: place for place, rate in enumerate(rates)}
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell, value in values.items():
        assert cell.rate is not None
        lines.setdefault(_lengths(cell.input_tokens, cell.output_tokens), []).append((places[cell.rate], value))

    def draw(axes: Any) -> None:
        for number, (name, points) in enumerate(lines.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 5, "linewidth": 1.8}
            bounded = sorted(point for point in points if not math.isinf(rates[point[0]]))
            apart = [point for point in points if math.isinf(rates[point[0]])]
            axes.plot([x for x, _ in bounded], [y for _, y in bounded], label=name, **style)
            axes.plot([x for x, _ in apart], [y for _, y in apart], **style)
        if math.isinf(rates[-1]) and len(rates) > 1:
            axes.axvline(len(rates) - 1.5, color="#999999", linewidth=1, linestyle=(0, (2, 3)))
            axes.set_xlim(-0.3, len(rates) - 0.7)
        axes.set_xticks(range(len(rates)), [rate_text(rate) for rate in rates])
        axes.set_xlabel("requests per second (∞: all at once)")
        axes.set_ylabel(label)
        _scale(axes, values.values(), logarithmic=logarithmic)
        axes.figure.legend(loc="outside lower left", ncols=2, fontsize=9)

    return draw_titled(draw, title, path, _inches(len(lines)))


def _curve(results: Results, name: str, title: str, folder: Path, searched: dict[str, Any] | None) -> Path | None:
    """Draws latency over throughput, median and p99: a line for each pair of lengths. A search's trials, which bunch up
    around the rate that it finds, are points; that rate is a vertical line, the limits of `bench.slo` horizontal ones.
    Returns None if there are fewer than two points.
    """
    keys = {f"median_{name}_ms": ("-", "o", "median"), f"p99_{name}_ms": ("--", "^", "p99")}
    lines: dict[str, list[dict[str, Any]]] = {}
    for cell, result in results.items():
        bounded = cell.rate is not None and not math.isinf(cell.rate)
        if bounded and result["state"] == OK and all(result[key] is not None for key in keys):
            lines.setdefault(_lengths(cell.input_tokens, cell.output_tokens), []).append(result)
    if max(map(len, lines.values()), default=0) < 2:
        return None
    values = [result[key] for points in lines.values() for result in points for key in keys]
    limits = {key: ms for key, ms in (searched["limits"] if searched else {}).items() if f"_{name}_" in key}
    colours = {lengths: COLOURS[number % len(COLOURS)] for number, lengths in enumerate(lines)}

    def draw(axes: Any) -> None:
        for lengths, points in lines.items():
            points.sort(key=lambda result: float(result["request_rate"]))
            for key, (dashes, marker, statistic) in keys.items():
                axes.plot(
                    [r["output_throughput"] for r in points], [r[key] for r in points], label=f"{lengths}: {statistic}",
                    color=colours[lengths], linestyle="" if searched else dashes, marker=marker, markersize=4.5,
                    markerfacecolor=colours[lengths] if statistic == "median" else "white",
                )  # fmt: skip
        for found in searched["searches"] if searched else ():
            lengths = _lengths(found["input_tokens"], found["output_tokens"])
            if found["output_throughput"] and lengths in colours:
                told = f"{lengths}: {found['rate']:g} requests/s"
                axes.axvline(found["output_throughput"], color=colours[lengths], linewidth=1, linestyle=":", label=told)
        for key, ms in limits.items():
            axes.axhline(ms, color="#a33", linewidth=1, linestyle=":")
            told = f"{key} ≤ {ms:g}"
            axes.annotate(told, (0.01, ms), xycoords=("axes fraction", "data"), va="bottom", color="#a33", fontsize=8)
        axes.set_xlim(left=0)
        _scale(axes, [*values, *limits.values()])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.set_xlabel("output tokens per second")
        axes.set_ylabel(_CURVES[name])
        axes.figure.legend(loc="outside lower left", ncols=2, fontsize=9)

    entries = 2 * len(lines) + (len(searched["searches"]) if searched else 0)
    return draw_titled(draw, title, folder / f"{name}_over_throughput.png", _inches(entries))


def _inches(entries: int) -> tuple[float, float]:
    """Size of a plot with this many entries in two columns below it: narrow enough to be legible on a phone."""
    return 5.8, 3.6 + 0.2 * math.ceil(entries / 2)


def _lengths(input_tokens: int, output_tokens: int) -> str:
    return f"{input_tokens:,} in, {output_tokens:,} out"


def _scale(axes: Any, values: Collection[float], *, logarithmic: bool = True) -> None:
    """Sets a logarithmic scale if wanted and if the values are far apart, else one from 0."""
    from matplotlib.ticker import LogLocator, NullLocator

    if logarithmic and max(values) > 5 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.12 * max(values) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


def _matrix(results: Results, key: str, label: str, colours: str, title: str, path: Path) -> Path:
    """Draws a heat map: users upwards, lengths to the right; each cell contains its number, or why there is none."""
    cells = [cell for cell in results if cell.users is not None]
    lengths = sorted({(cell.input_tokens, cell.output_tokens) for cell in cells})
    users = sorted({cell.users for cell in cells if cell.users is not None})
    lines: dict[int | None, int] = {number: line for line, number in enumerate(users)}

    def draw(axes: Any) -> None:
        from matplotlib.colors import LogNorm

        grid = [[math.nan] * len(lengths) for _ in users]
        for cell in cells:
            result = results[cell]
            if result["state"] in MEASURED and result[key]:
                grid[lines[cell.users]][lengths.index((cell.input_tokens, cell.output_tokens))] = result[key]
        known = [value for row in grid for value in row if not math.isnan(value)]
        apart = max(known) > 5 * min(known)
        norm = LogNorm(min(known), max(known)) if apart else None
        image = axes.pcolormesh(grid, cmap=colours, norm=norm, edgecolors="white", linewidth=1.5)
        for cell in cells:
            at = (lengths.index((cell.input_tokens, cell.output_tokens)) + 0.5, lines[cell.users] + 0.5)
            _write_in(axes, at, results[cell], key, image)
        answers = sorted({output_tokens for _, output_tokens in lengths})
        names = [f"{i:,}" if len(answers) == 1 else f"{i:,}\n{o:,}" for i, o in lengths]
        axes.set_xticks([place + 0.5 for place in range(len(lengths))], names)
        axes.set_yticks([i + 0.5 for i in range(len(users))], [f"{n:,}" for n in users])
        told = f"answers: {answers[0]:,}" if len(answers) == 1 else "below: answer"
        axes.set_xlabel(f"prompt tokens ({told})")
        axes.set_ylabel("users at a time")
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)

    return draw_titled(
        draw, f"{title}: {label}", path, (max(6.0, 2.4 + 0.68 * len(lengths)), max(3.6, 1.6 + 0.4 * len(users)))
    )


def _write_in(axes: Any, at: tuple[float, float], result: dict[str, Any], key: str, image: Any) -> None:
    state, value = result["state"], result.get(key)
    if state in MEASURED and value:
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
        text, colour = _short(value), "white" if dark else INK
    else:
        text, colour = (
            {INFEASIBLE: "too\nlong", FAILED: "failed"}.get(state, "–"),
            "#a33" if state == FAILED else "#888",
        )
    axes.text(*at, text, ha="center", va="center", fontsize=8, color=colour)


def _short(value: float) -> str:
    if value >= 100_000:
        return f"{value / 1000:,.0f}k"
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
