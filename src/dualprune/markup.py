"""The pieces of the report pages: elements, tables and figures as escaped HTML, numbers as words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ------------------------------------------------------------------ HTML, piece by piece


class Html(str):
    """Markup, safe as it stands; any other string is escaped when it becomes a child."""


def el(tag: str, *children: object, **attributes: object) -> Html:
    """Return one element; ``class_`` and ``aria_label`` become ``class`` and ``aria-label``, None drops an attribute."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    return Html(f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    """Return the children as one piece of markup; plain strings are escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(str(child)) for child in children))


def facts(pairs: Iterable[tuple[str, object]], class_: str) -> Html:
    """Return a description list of the pairs that have a value."""
    items = [el("div", el("dt", name), el("dd", value)) for name, value in pairs if value not in (None, "")]
    return el("dl", *items, class_=class_)


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]], *, text: Iterable[int] = (0,)) -> Html:
    """Return a table whose columns are numbers, save those at the places in `text`; the first cell heads its row.

    A row may end in a dict of attributes for its ``<tr>``.
    """
    side = ["l" if place in set(text) else None for place in range(len(head))]
    body = []
    for row in rows:
        attributes = row[-1] if isinstance(row[-1], dict) else {}
        cells = [el("td" if i else "th", row[i], class_=side[i], scope=None if i else "row") for i in range(len(head))]
        body.append(el("tr", *cells, **attributes))
    heading = el("tr", *(el("th", word, class_=side[i], scope="col") for i, word in enumerate(head)))
    table = el("table", el("caption", caption), el("thead", heading), el("tbody", *body))
    return el("div", table, class_="wide", role="region", tabindex="0", aria_label=caption)


def remark(*words: object) -> Html:
    """Return a paragraph that says what is missing or must be known."""
    return el("p", *words, class_="note")


def html_figure(name: str, figure: Figure, title: str, caption: str, *, wide: bool = False) -> Html:
    """Return `figure` as inline SVG with its title and caption."""
    from dualprune.plots import to_svg

    svg = Html(to_svg(figure, name, f"{title}. {caption}"))
    return el("figure", svg, el("figcaption", el("b", f"{title}."), " ", caption), class_="full" if wide else None)


def html_page(title: str, *body: object) -> str:
    """Return a whole page, style inside."""
    return _PAGE.substitute(title=escape(title), style=_STYLE, body=join(body))


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="dualprune">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6472; --line: #dde1e7; --card: #f5f7f9; --page: #fff;
  --link: #0063a0; --good: #00694c; --bad: #a84300; --bar: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #9aa4b2; --line: #333b47; --card: #1c222b;
  --page: #12161c; --link: #6db8ea; --good: #3fc79a; --bad: #f29a5c; --bar: #3b9ad6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { border-bottom: 1px solid var(--line); margin-bottom: 1.5rem; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
p, figcaption, .facts { max-width: 46rem; }
a { color: var(--link); }
.verdict { font-size: 1.6rem; line-height: 1.3; font-weight: 600; max-width: 56rem; margin: .35rem 0 1.25rem;
  text-wrap: pretty; }
.note { border-left: 3px solid var(--bad); padding: .3rem .8rem; background: var(--card); }
.honest, figcaption, caption { color: var(--soft); font-size: .875rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { margin: 0; } dd { margin: 0; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; }
.key div { background: var(--card); border-radius: .4rem; padding: .7rem .9rem; display: flex;
  flex-direction: column-reverse; justify-content: flex-end; }
.key dt { color: var(--soft); font-size: .85rem; line-height: 1.3; } .key dd { font-size: 1.25rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.facts div { display: grid; grid-template-columns: 9rem 1fr; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .3rem 0; }
.facts dt { color: var(--soft); } .facts dd, code, pre { overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; break-inside: avoid; } figure.full { grid-column: 1 / -1; max-width: 46rem; }
.plot { display: block; width: 100%; height: auto; color: var(--soft); }
.wide { overflow-x: auto; }
.plots + .wide { margin-top: 2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } tbody th { font-weight: 500; } thead th { color: var(--soft);
  border-bottom-width: 2px; white-space: normal; vertical-align: bottom; }
th.l, td.l { text-align: left; } td.l { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
tr > :first-child { padding-left: 0; } tr.best > * { font-weight: 700; }
tr.level > * { color: var(--soft); }
.bar { display: inline-block; width: 7rem; height: .6rem; background: var(--line); vertical-align: middle; }
.bar span { display: block; height: 100%; background: var(--bar); }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--link); }
pre { background: var(--card); padding: .9rem; font-size: .8rem; white-space: pre-wrap; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --card: #f4f4f4; --page: #fff; --link: #000; }
  main { padding: 0; max-width: none; } .wide { overflow: visible; } .verdict { font-size: 1.3rem; }
  .plots { grid-template-columns: 1fr 1fr; gap: 1rem 1.5rem; }
  body { font-size: 10pt; } h2 { break-after: avoid; } thead { display: table-header-group; } tr { break-inside: avoid; }
  .bar, .bar span { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# ------------------------------------------------------------------ words for numbers

DASH = "–"


def or_dash(value: Any, form: Callable[[Any], str]) -> str:
    """Return form(value), or a dash for None."""
    return DASH if value is None else form(value)


def in_hundredths(value: float) -> str:
    """12.345 → "12.35"."""
    return f"{value:.2f}".replace("-", "−")


def with_sign(value: float) -> str:
    """1.5 → "+1.50"."""
    return f"{value:+.2f}".replace("-", "−")


def in_thousands(value: int) -> str:
    """12345 → "12,345"."""
    return f"{value:,}"


def in_times(value: float) -> str:
    """6.5 → "6.5×"."""
    return f"{value:.3g}×" if value < 100 else f"{value:.0f}×"


def in_short(value: float) -> str:
    """Return the number in its shortest form."""
    return f"{value:g}"


def in_bytes(value: int) -> str:
    """1234567 → "1.23 MB"."""
    size, units = float(value), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"


def in_time(seconds: float) -> str:
    """75 → "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def unit_of(metric: str) -> str:
    """Return the unit a metric name ends in: " %" or nothing."""
    return " %" if metric.rstrip().endswith("%") else ""
