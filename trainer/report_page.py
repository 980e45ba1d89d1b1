"""The frame of the report: one HTML page that asks the network for nothing and runs no script, whatever a model wrote."""

from html import escape
from typing import Literal

# Even if something slipped through the escaping, this lets the page load nothing but its own pictures and style.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfa; --card: #ffffff; --ink: #1b1e24; --soft: #5c636e; --faint: #8b919b; --rule: #e4e4df; --frame: #d4d4ce;
  --blue: #0061a8; --vermilion: #c8500a; --green: #007a5a; --violet: #7a4f9e; --sky: #6aaede; --grey: #9aa0a8;
  --pale: #d0d3d7; --warn: #8a5a00; --warn-paper: #fff6df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1c1f24; --ink: #e9eaec; --soft: #a5abb5; --faint: #7d848f; --rule: #2b2f36; --frame: #3a3f48;
    --blue: #5aa9e6; --vermilion: #f08a4b; --green: #3fbf95; --violet: #b98fdb; --sky: #2f6f9f; --grey: #6c727c;
    --pale: #474c55; --warn: #f0c36a; --warn-paper: #2e2715;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1240px; margin: 0 auto; padding: 44px 32px 72px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 20px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0; font-weight: 680; overflow-wrap: anywhere; }
.status { color: var(--soft); font-size: 16px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 60px 0 4px; font-weight: 650; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 620; }
h3 small { font-weight: 400; color: var(--soft); font-size: 13px; margin-left: 8px; }
p { margin: 0; max-width: 78ch; }
p.lead { color: var(--soft); margin-bottom: 16px; }
p.note, p.empty { color: var(--soft); font-size: 13px; margin-top: 6px; max-width: 110ch; }
.notice {
  margin: 22px 0 0; padding: 12px 16px; border-left: 4px solid var(--warn); background: var(--warn-paper); border-radius: 4px;
  max-width: none;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); margin: 28px 0 0; overflow: hidden;
  border-top: 1px solid var(--frame); border-bottom: 1px solid var(--frame); }
.tile { padding: 14px 16px 12px; border-left: 1px solid var(--rule); border-top: 1px solid var(--rule); margin: -1px 0 0 -1px; }
.tile b { display: block; font-size: 27px; line-height: 1.2; font-weight: 640; letter-spacing: -0.02em; white-space: nowrap; }
.tile b small { font-size: 14px; font-weight: 450; color: var(--soft); letter-spacing: 0; }
.tile span { color: var(--soft); font-size: 13px; display: block; line-height: 1.35; }
.row { display: grid; gap: 28px 32px; margin-top: 18px; }
.row.two { grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); }
.row.three { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); }
svg .group { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg .value { fill: var(--ink); font-size: 11.5px; font-weight: 600; }
svg .note { font-size: 11.5px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--frame); }
svg .ideal { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 3 3; opacity: 0.65; }
.c1 { --c: var(--blue); } .c2 { --c: var(--vermilion); } .c3 { --c: var(--green); } .c4 { --c: var(--violet); }
svg path { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-linecap: round; }
svg .raw { stroke-width: 1; opacity: 0.4; }
svg .smooth { stroke-width: 2.2; }
svg .held { stroke-width: 1; stroke-dasharray: 2 3; opacity: 0.75; }
svg .mark { fill: var(--paper); stroke: var(--c); stroke-width: 1.8; }
svg .end { fill: var(--c); font-weight: 600; font-size: 12.5px; }
svg .last { fill: var(--ink); font-weight: 500; }
svg .bar.seen, .key.seen { fill: var(--blue); background: var(--blue); }
svg .bar.novel, .key.novel { fill: var(--sky); background: var(--sky); }
svg .bar.shuffled, .key.shuffled { fill: var(--grey); background: var(--grey); }
svg .bar.blank, .key.blank { fill: var(--pale); background: var(--pale); }
svg .whisker { stroke: var(--ink); stroke-width: 1.1; opacity: 0.6; }
svg .chance { stroke: var(--vermilion); stroke-width: 2.4; }
svg .frame { fill: none; stroke: var(--frame); }
svg .load { fill: var(--blue); opacity: 0.55; }
svg .even { stroke: var(--ink); stroke-width: 1.4; }
svg image { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; color: var(--soft); font-size: 13px; margin: 2px 0 8px; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 7px; vertical-align: -1px; }
.key.line { height: 3px; border-radius: 0; width: 18px; vertical-align: 4px; background: var(--vermilion); }
.key.raw { height: 3px; width: 18px; vertical-align: 4px; background: var(--soft); opacity: 0.35; border-radius: 0; }
.key.smooth { height: 3px; width: 18px; vertical-align: 4px; background: var(--soft); border-radius: 0; }
.key.held { border: 2px solid var(--soft); border-radius: 50%; width: 10px; height: 10px; }
.scale { width: 340px; max-width: 100%; font-size: 12px; color: var(--soft); margin: 4px 0 10px; }
.scale img { width: 100%; height: 12px; display: block; border: 1px solid var(--frame); }
.scale div { display: flex; justify-content: space-between; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px; margin-top: 14px; }
.sample { display: grid; grid-template-columns: 104px minmax(0, 1fr); gap: 12px; background: var(--card); padding: 10px;
  border: 1px solid var(--rule); border-radius: 6px; font-size: 13px; line-height: 1.4; align-items: start; }
.sample img { width: 104px; height: 104px; object-fit: contain; border-radius: 3px; background: var(--rule);
  image-rendering: pixelated; }
.sample .answer { font-size: 15px; font-weight: 640; margin-top: 3px; overflow-wrap: anywhere; }
.sample .right { color: var(--green); } .sample .wrong { color: var(--vermilion); }
.sample .accepted, .sample .tag { color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: 190px minmax(0, 1fr); gap: 5px 18px; margin: 14px 0 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code, .config { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 12.5px; }
details { margin-top: 26px; border-top: 1px solid var(--frame); padding-top: 12px; }
summary { cursor: pointer; font-weight: 620; }
.config { columns: 330px 3; column-gap: 36px; margin-top: 14px; line-height: 1.6; }
.config section { break-inside: avoid; margin-bottom: 16px; }
.config h4 { margin: 0; font-size: 13px; }
.config div { overflow-wrap: anywhere; } .config i { font-style: normal; color: var(--soft); }
@media (max-width: 1080px) {
  main { padding: 28px 22px 56px; }
  .tiles { grid-template-columns: repeat(3, 1fr); }
  svg.wide text { font-size: 15px; } svg.wide .group { font-size: 16px; } svg.wide .value { font-size: 14.5px; }
}
@media (max-width: 700px) {
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .row.two, .row.three { grid-template-columns: minmax(0, 1fr); }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: 8px; }
}
@media print { .sample, figure { break-inside: avoid; } details { display: none; } }
"""


def page(title: str, body: str) -> str:
    """The whole document; `title` is text, `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, lead: str, *parts: str) -> str:
    """A section; title and lead are text, the parts are HTML. Without any part there is no section."""
    inner = "\n".join(part for part in parts if part)
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<h2>{escape(title)}</h2>\n{lead}\n{inner}" if inner else ""


def figure(title: str, detail: str, picture: str, note: str = "") -> str:
    """A picture (HTML) under its title and above its note (text)."""
    small = f"<small>{escape(detail)}</small>" if detail else ""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><h3>{escape(title)}{small}</h3>{picture}{note}</figure>"


def row(*figures: str, columns: Literal["two", "three"]) -> str:
    """Figures beside each other where there is room; nothing if there are none."""
    kept = [one for one in figures if one]
    return f'<div class="row {columns}">{"".join(kept)}</div>' if kept else ""


def tile(value: str, unit: str, label: str) -> str:
    """A key figure."""
    label = escape(label).replace(" %", "&nbsp;%")
    return f'<div class="tile"><b>{escape(value)} <small>{escape(unit)}</small></b><span>{label}</span></div>'


def legend(*keys: tuple[str, str]) -> str:
    """Pairs of the class of a key and its text."""
    return (
        '<div class="legend">'
        + "".join(f'<span><i class="key {c}"></i>{escape(text)}</span>' for c, text in keys)
        + "</div>"
    )
