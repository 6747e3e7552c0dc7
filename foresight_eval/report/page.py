"""The report as one HTML page: tables, figures, and every trajectory, to be filtered and opened.

The page holds everything it shows (``assets/page.html``, ``page.css``, ``page.js`` and the data) and is
forbidden to load anything.  An episode's record is an inert ``<script>`` of its own, read when it is opened,
so that a page with thousands of them appears at once.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foresight_eval.hindsight import judged
from foresight_eval.report.plots import Plot
from foresight_eval.report.tables import Table, task_types
from foresight_eval.results import Result, bucket
from foresight_eval.statistics import Paired, paired
from itp.text.state import parse

ASSETS = Path(__file__).parent / "assets"
_RATE = re.compile(r"([\d.]+) (\[.+\])")


SHOWN = 6
"""Results that the first screen compares; the table below it has all."""


def render(results: Sequence[Result], tables: Sequence[Table], plots: Sequence[Plot],
           baseline: Result | None = None) -> str:
    """The page's text.  Its first screen compares with ``baseline``, the first result by default."""
    rows, records = _episodes(results)
    games = {(meta["split"], meta["game_id"]) for result in results for meta in result.metas}
    index = {"results": [result.title for result in results], "types": task_types(results), "episodes": rows}
    parts = {
        "CSS": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "JS": (ASSETS / "page.js").read_text(encoding="utf-8"),
        "COUNTS": f"{_count(len(results), 'result')} · {_count(len(rows), 'episode')} · {_count(len(games), 'game')}",
        "ANSWER": _answer(results, baseline or results[0]),
        "TABLES": "\n".join(map(_table, tables)),
        "FIGURES": "\n".join(map(_figure, plots)),
        "SETTINGS": _settings(results),
        "INDEX": _json(index),
        "RECORDS": "\n".join(f'<script type="application/json" id="e{i}">{_json(record)}</script>'
                             for i, record in enumerate(records)),
    }
    page = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"<!--([A-Z]+)-->|/\*([A-Z]+)\*/", lambda m: parts[m[1] or m[2]], page)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _episodes(results: Sequence[Result]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the list shows and filters by, and the whole of each episode, in the same order."""
    rows, records = [], []
    for r, result in enumerate(results):
        for i, record in ((i, record) for i, trials in result.trials.items() for record in trials):
            meta, steps = record["meta"], record["foresight_steps"]
            task, first = _beginning(record)
            rows.append({
                "r": r, "i": i, "type": bucket(meta["task_type"]), "won": int(meta["success"]), "score": meta["score"],
                "steps": len(steps), "k": sum(step["k"] for step in steps) / len(steps) if steps else 0,
                "tokens": sum(u["prompt_tokens"] + u["completion_tokens"] for u in meta["usage"].values()),
                "game": f"{meta['split']}/{meta['game_id']}", "task": task,
                **({"trial": meta.get("trial", 0) + 1} if len(result.trials[i]) > 1 else {}),
            })
            records.append({"first": first, "why": meta["terminate_reason"], "usage": meta["usage"],
                            "golden": meta.get("golden_steps"), "note": record.get("look_back", {}).get("note", ""),
                            "steps": [_step(steps, t) for t in range(len(steps))]})
    return rows, records


def _beginning(record: dict[str, Any]) -> tuple[str, str]:
    """Task and first observation."""
    if not record["conversations"]:
        return "", ""
    state = parse(record["conversations"][0]["value"])
    return state.task, state.first


def _step(steps: list[dict[str, Any]], t: int) -> dict[str, Any]:
    """A step without what is empty in it.  Names are short because there are tens of thousands of them."""
    step = steps[t]
    shown = {
        "a": step["action"], "o": step["obs_next"], "k": step["k"], "bad": int(step["invalid"]),
        "im": [[action, seen, None if score is None else round(score, 3)] for action, seen, score in
               zip(step["imagined_actions"], step["wm_raw_output"], judged(steps, t), strict=True)],
        "th": step["thought"], "re": step["reflection"], "kraw": step["k_raw_output"].strip(),
        "pk": [round(math.exp(p), 3) for p in step["k_logprobs"]], "v": step["value"],
        "s": step["info"]["seconds"],
        # Older results have no cost by step, and only methods that compare actions have these.
        "n": sum(usage["calls"] for usage in step.get("usage", {}).values()),
        "tok": sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in step.get("usage", {}).values()),
        "co": [[c["action"], round(c["value"], 3), c["tries"]] for c in step.get("considered", [])],
    }
    return {key: value for key, value in shown.items() if value not in ("", 0, None, [])}


def _answer(results: Sequence[Result], baseline: Result) -> str:
    """Did it help?  A card for each result: its difference of success from the baseline, and what that means."""
    rate = baseline.summary["overall"]
    solves = (f"<b>{html.escape(baseline.title)}</b> solves {100 * rate['rate']:.1f} % of {_count(rate['n'], 'game')}")
    compared = [(pair, result) for result in results if result.name != baseline.name
                and (pair := paired(result.outcomes_within(1), baseline.outcomes_within(1)))]
    if not compared:
        return f"<h2>How well does it do?</h2><p>{solves}.</p>"
    compared.sort(key=lambda each: -each[0].difference)
    left = f" The others are in the table below: {len(compared) - SHOWN} more." * (len(compared) > SHOWN)
    cards = "".join(_verdict(result, pair) for pair, result in compared[:SHOWN])
    return (f"<h2>Did it help?</h2><p>{solves}. On the same games, in points of success with the 95 % interval:{left}"
            f'</p><ul class="verdicts">{cards}</ul>')


def _verdict(result: Result, pair: Paired) -> str:
    low, high = (100 * end for end in pair.interval)
    kind, said = ("good", "helps") if low > 0 else ("bad", "hurts") if high < 0 else ("", "can't be told from chance")
    return (f'<li class="{kind}"><b>{html.escape(result.title)}</b> <strong>{100 * pair.difference:+.1f}</strong> '
            f"<small>({low:+.1f} to {high:+.1f})</small> <span>{said} on {_count(pair.n, 'game')}</span></li>")


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(f"<tr><th>{html.escape(row[0])}</th>{''.join(map(_cell, row[1:]))}</tr>" for row in table.rows)
    return (f'<figure class="table" id="table-{table.name}"><h3>{html.escape(table.title)}</h3>'
            f"<div><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
            f"<figcaption>{html.escape(table.note)}</figcaption></figure>")


def _cell(text: str) -> str:
    """A rate with an interval is shaded by its height; the interval stands back."""
    if match := _RATE.fullmatch(text):
        return f'<td class="rate" style="--rate:{match[1]}">{match[1]} <small>{match[2]}</small></td>'
    return f"<td>{html.escape(text)}</td>"


def _figure(plot: Plot) -> str:
    image = base64.b64encode(plot.svg.encode()).decode()
    return (f'<figure class="plot" id="plot-{plot.name}"><h3>{html.escape(plot.title)}</h3>'
            f'<img alt="{html.escape(plot.title)}" src="data:image/svg+xml;base64,{image}">'
            f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>")


def _settings(results: Sequence[Result]) -> str:
    """The settings in which the results differ, and what they share."""
    keys = list(dict.fromkeys(key for result in results for key in result.config))
    value = {key: [json.dumps(result.config.get(key)) for result in results] for key in keys}
    differ = [key for key in keys if len(set(value[key])) > 1 and key != "out_dir"]
    rows = tuple((key, *(v.strip('"') for v in value[key])) for key in differ)
    shared = "\n".join(f"{key}: {value[key][0]}" for key in keys if len(set(value[key])) == 1)
    table = Table("settings", "What they were made with", "Settings in which they differ.",
                  ("", *(result.title for result in results)), rows)
    return (f"{_table(table) if rows else ''}<details><summary>Settings that they share</summary>"
            f"<pre>{html.escape(shared)}</pre></details>")
