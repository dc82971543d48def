"""The head of ``report.html``: how it looks on a telephone, a wide screen, in the dark and on paper."""

from fedtorch.run.markup import Markup

MADE = '<meta name="generator" content="fedtorch report">'
"""Tells a page of ours from a file of anybody's."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #fff; --edge: #d8dde3;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #a04b8c; --shade: 0 114 178; --note: #fff4d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181d; --edge: #343b44;
    --s0: #56b4e9; --s1: #f0925a; --s2: #3cc79d; --s3: #d795c6; --shade: 86 180 233; --note: #3a3214 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 16px }
h1 { font-size: 1.5em; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15em; margin: 1.6em 0 .4em; padding-top: .5em; border-top: 1px solid var(--edge) }
h3 { font-size: 1em; margin: 1em 0 .3em }
p { margin: .4em 0; max-width: 76ch; overflow-wrap: anywhere }
footer, .legend, figcaption, dt { color: var(--soft); font-size: .87em }
footer { margin-top: 2em }
.note { background: var(--note); padding: 8px 10px; border-radius: 4px; max-width: none }
.figures { display: flex; flex-wrap: wrap; gap: 8px 26px; margin: 14px 0 }
dd { margin: 0; font-size: 1.45em; font-variant-numeric: tabular-nums }
.pairs { columns: 260px; column-gap: 36px; margin: .4em 0; font-size: .87em }
.pairs div { display: flex; gap: 10px; border-bottom: 1px solid var(--edge); break-inside: avoid;
  padding: 2px 0 }
.pairs dt { flex: 1; font-size: 1em }
.pairs dd { font-size: 1em; text-align: right; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr));
  gap: 14px 22px }
figure { margin: 0; break-inside: avoid }
svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: var(--soft) }
.grid { stroke: var(--edge); stroke-width: 1 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.other { stroke-dasharray: 4 3; opacity: .75 }
.band { opacity: .16; stroke: none }
.line.s0 { stroke: var(--s0) } .line.s1 { stroke: var(--s1) }
.line.s2 { stroke: var(--s2) } .line.s3 { stroke: var(--s3) }
.s0 { fill: var(--s0); background: var(--s0) } .s1 { fill: var(--s1); background: var(--s1) }
.s2 { fill: var(--s2); background: var(--s2) } .s3 { fill: var(--s3); background: var(--s3) }
.line.s0, .line.s1, .line.s2, .line.s3 { fill: none }
.legend span { margin-right: 14px; display: inline-block }
.key { display: inline-block; width: 14px; height: 8px; margin-right: 5px; border-radius: 2px }
.key.other { height: 0; border-top: 3px dashed; background: none; vertical-align: middle }
.key.other.s0 { color: var(--s0) } .key.other.s1 { color: var(--s1) }
.key.other.s2 { color: var(--s2) } .key.other.s3 { color: var(--s3) }
.wide { overflow-x: auto; margin: .5em 0 }
table { border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; vertical-align: bottom }
th, td { padding: 3px 10px 3px 0 }
tbody th { font-weight: 400; vertical-align: top; position: sticky; left: 0;
  background: var(--paper); max-width: 16em; overflow-wrap: break-word }
tbody tr { border-top: 1px solid var(--edge); break-inside: avoid }
.n, .right td { text-align: right }
.options td { overflow-wrap: anywhere }
.options .n { text-align: left }
.map td { padding: 3px 6px; text-align: right }
.map thead th { padding: 3px 6px; max-width: 8em; overflow-wrap: break-word }
.map th:first-child { padding-left: 0 }
.map tbody tr { border-top: 1px solid var(--paper) }
.side { display: flex; flex-wrap: wrap; gap: 4px 40px; align-items: flex-start }
.side > * { max-width: 100% }
.quiet td { min-width: 26px }
.small td { min-width: 11px; height: 18px; padding: 0 }
.small thead th { padding: 0; font-weight: 400; color: var(--soft) }
.small thead th.n, .small thead th:first-child { padding-right: 8px }
.small td.n { padding: 0 8px; min-width: 3em }
.na { background: repeating-linear-gradient(135deg, var(--edge) 0 2px, transparent 2px 5px) }
.bad { background: var(--s1) } .out { background: var(--s3) }
.legend .scale { margin: 0 4px }
.scale i { display: inline-block; width: 14px; height: 10px }
@media print {
  :root { --ink: #000; --soft: #444; --paper: #fff; --edge: #bbb; --shade: 0 114 178; --note: #fff }
  body { font-size: 10.5px; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  main { padding: 0 } .note { border: 1px solid } h2 { break-after: avoid } .wide { overflow: visible }
  .charts { grid-template-columns: repeat(2, 1fr) } }
"""

SHADES = "\n".join(
    f".h{k} {{ background: rgb(var(--shade) / {0.05 + 0.1 * k:.2f}){'; color: #fff' if k > 6 else ''} }}"
    for k in range(10)
)

HEAD = Markup(
    '<html lang="en">\n<meta charset="utf-8">\n'
    f"{MADE}\n"
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta http-equiv="Content-Security-Policy" '
    """content="default-src 'none'; style-src 'unsafe-inline'">\n"""
    f"<style>{STYLE}{SHADES}\n</style>\n"
)
