"""The report's HTML: elements, tables, figures and the page around them. Text that is not yet markup is escaped."""

from __future__ import annotations

import html
import math
import string
from collections.abc import Iterable, Sequence
from typing import Any

from acrlpd.training import charts


class Html(str):
    """Text that is markup already; every other string is escaped on its way into the page."""


def page(title: str, sections: Iterable[str]) -> str:
    return PAGE.substitute(title=escaped(title), style=STYLE, body="\n".join(sections))


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>{element('h2', title)}", *filter(None, parts), "</section>"])


def element(tag: str, text: str, name: str = "") -> Html:
    attribute = f' class="{name}"' if name else ""
    return Html(f"<{tag}{attribute}>{escaped(text)}</{tag}>")


def grid(figures: Iterable[charts.Chart]) -> str:
    return f'<div class="grid">{"".join(map(_figure, figures))}</div>'


def _figure(chart: charts.Chart) -> str:
    return f"<figure>{element('h3', chart.title)}{chart.svg}{element('figcaption', chart.caption)}</figure>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(element("th", each) for each in header)
    body = "".join(f"<tr>{''.join(element('td', cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def share_bar(share: float) -> Html:
    width = 100 * share if math.isfinite(share) else 0.0
    return Html(f'<span class="bar" style="width:{width:.1f}px"></span> {percent(share, 1)}')


def escaped(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "unknown"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #8a929b; --panel: #f3f5f7;
  --orange: #c65102; --purple: #8a5a9e; --blue: #0068a8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e4e7ea; --faint: #7d868f; --panel: #20252a;
    --orange: #f0954a; --purple: #c79bdb; --blue: #5ab4e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.headline { font-size: 1.2rem; margin: 0 0 1rem; }
.remark { padding: .5rem .75rem; background: var(--panel); border-left: 3px solid var(--orange); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; }
dt, figcaption, small { color: var(--ink); opacity: .75; font-size: .85rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 1rem 0 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
svg text { font-family: inherit !important; }
.film { display: grid; grid-template-columns: repeat(8, 1fr); gap: .25rem; margin-top: .25rem; }
.film span { display: block; min-width: 0; }
.film img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--panel); }
.bar { display: inline-block; height: .6rem; background: var(--blue); }
pre { padding: .75rem; background: var(--panel); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 40rem) { .film { grid-template-columns: repeat(8, 9rem); overflow-x: auto; } }
@media print { body { max-width: none; padding: 0; font-size: .8rem; } .bar { print-color-adjust: exact; } }
"""

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
