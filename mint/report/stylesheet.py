"""The look of the report: one style sheet, light and dark, for desk, phone and paper; nothing is fetched."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfbf9; --card: #ffffff; --ink: #1d2329; --soft: #5b646d; --rule: #e2dfd8; --faint: #f3f1ec;
  --student: #0f6e74; --base: #9a6a1f; --teacher: #5a4b9c; --other: #5b646d; --wrong: #a8432f;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181b; --card: #1a1f23; --ink: #e7e4dd; --soft: #9aa4ac; --rule: #2f363c; --faint: #20262b;
    --student: #5cc2c0; --base: #dcae62; --teacher: #ada0ee; --other: #9aa4ac; --wrong: #ee8f78;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans); }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 56px; }
.kicker { margin: 0 0 10px; color: var(--soft); font-size: 13px; letter-spacing: .09em; text-transform: uppercase; }
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.2; margin: 0; text-wrap: balance; }
h1 { font-size: 38px; letter-spacing: -.01em; }
h2 { font-size: 25px; }
h3 { font-size: 18px; }
p { margin: 0; max-width: 68ch; }
small, .soft { color: var(--soft); }
small { font-size: 13px; }
b { font-weight: 600; }
b, td, .value, .scale, svg { font-variant-numeric: tabular-nums; }
.lead { margin-top: 18px; font: 20px/1.5 var(--serif); }
.remark { margin-top: 14px; padding-left: 14px; border-left: 3px solid var(--rule); color: var(--soft);
  font-size: 15px; }
section { padding: 44px 0 0; }
section > p.soft { margin-top: 8px; font-size: 15px; }
dl.about { display: flex; flex-wrap: wrap; gap: 6px 30px; margin: 26px 0 0; padding: 14px 0; font-size: 14px;
  border-block: 1px solid var(--rule); }
dl.about div { display: flex; gap: 8px; min-width: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 22px; margin-top: 20px; }
.grid.two { grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); }
.grid.one { grid-template-columns: minmax(0, 1fr); }
.beside { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 12px 36px; align-items: end; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px; min-width: 0; }
.grid > .card { display: flex; flex-direction: column; }
.card > h3 { margin-bottom: 10px; }
.card > p.soft { font-size: 14px; margin: -4px 0 12px; }

.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 7px; }
.legend b { color: var(--ink); }
.forest + .legend { margin: 14px 0 0; }
.swatch { width: 18px; height: 3px; border-radius: 2px; background: var(--hue); }
.l0 { --hue: var(--student); } .l1 { --hue: var(--base); } .l2 { --hue: var(--teacher); } .l3 { --hue: var(--other); }
.dash { width: 0; height: 15px; border-left: 2px var(--dash, solid) var(--hue); }
.c0 { --hue: var(--ink); --dash: dashed; } .c1 { --hue: var(--soft); --dash: dotted; }
.c2 { --hue: var(--soft); --dash: solid; }

.forest { display: grid; gap: 2px; }
.forest .row { display: grid; grid-template-columns: minmax(84px, 13em) minmax(0, 1fr) 9.4em; align-items: center;
  column-gap: 14px; min-height: 34px; }
.forest .name { font-size: 14px; overflow-wrap: anywhere; }
.forest .track { position: relative; height: 34px;
  background: linear-gradient(var(--rule), var(--rule)) 0 50% / 100% 1px no-repeat; }
.forest .value { font-size: 14px; white-space: nowrap; }
.forest .value small { margin-left: 4px; }
.forest i { position: absolute; top: 50%; }
.forest .whisker { height: 5px; margin-top: -2.5px; border-radius: 3px; background: var(--hue); opacity: .4; }
.forest .dot { width: 13px; height: 13px; margin: -6.5px 0 0 -6.5px; border-radius: 50%; background: var(--hue);
  box-shadow: 0 0 0 2px var(--card); }
.forest .ceiling { top: 0; bottom: -2px; margin-left: -1px; opacity: .65;
  border-left: 2px var(--dash, solid) var(--hue); }
.forest .student .name { font-weight: 600; }
.student { --hue: var(--student); } .base { --hue: var(--base); } .teacher { --hue: var(--teacher); }
.other { --hue: var(--other); }
.forest .axis { min-height: 20px; }
.forest .scale { position: relative; height: 18px; color: var(--soft); font-size: 12px; }
.forest .scale span { position: absolute; transform: translateX(-50%); }

.scroll { overflow-x: auto; margin-top: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; }
table.plain th, table.plain td { padding: 9px 0 9px 16px; border-bottom: 1px solid var(--rule); vertical-align: top; }
table.plain th:first-child { padding-left: 0; }
table.plain tbody th { font-weight: 400; }
table.results tbody th { min-width: 9em; position: sticky; left: 0; background: var(--paper); }
table.plain thead th { color: var(--soft); font-weight: 500; font-size: 13px; border-bottom-color: var(--soft); }
table.plain td, table.plain thead th + th { text-align: right; white-space: nowrap; }
table.plain td small { display: block; font-size: 12px; }
table.results tr.student th, table.results tr.student td { background: var(--faint); }
table.results tr.student th { box-shadow: inset 3px 0 var(--student); padding-left: 12px; font-weight: 600; }
table.results tr.student td { font-weight: 600; } table.results small { font-weight: 400; }
table.plain tr.ceiling { font-style: italic; color: var(--soft); }
table.plain td.name, table.plain thead th.name { text-align: left; white-space: normal; }

svg { display: block; width: 100%; max-width: 380px; height: auto; overflow: visible; margin: auto auto 0; }
svg line { stroke: var(--rule); }
svg text { fill: var(--soft); font: 11.5px var(--sans); }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .line { stroke: var(--hue); stroke-width: 2; }
svg .point { fill: var(--hue); }
svg .zero { stroke: var(--soft); stroke-dasharray: 2 4; }
svg .diagonal { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .gap { stroke: var(--wrong); stroke-width: 3; opacity: .5; }
svg .bin { fill: var(--student); fill-opacity: .85; stroke: var(--card); stroke-width: 1.5; }

table.confusion { width: auto; font-size: 12px; border-collapse: separate; border-spacing: 2px; }
table.confusion th { font-weight: 400; color: var(--soft); }
table.confusion tbody th { padding-right: 8px; text-align: right; line-height: 1.2; }
table.confusion tbody th bdi { display: block; width: max-content; max-width: 15em; margin-left: auto; }
table.confusion thead th { height: 14em; vertical-align: bottom; padding: 0; }
table.confusion thead th span { display: block; writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 13.6em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; margin: 0 auto; }
table.confusion td { width: 32px; min-width: 26px; height: 28px; text-align: center; padding: 0; border-radius: 4px;
  background: color-mix(in srgb, var(--hue) calc(var(--share, 0) * 78%), var(--faint)); }
table.confusion thead td { background: none; }
.confusion .right { --hue: var(--student); } .confusion .wrong { --hue: var(--wrong); }

.case { display: grid; grid-template-columns: 168px minmax(0, 1fr); gap: 22px; margin-top: 22px; }
.case.bare { grid-template-columns: minmax(0, 1fr); }
.case img { display: block; width: 100%; border-radius: 8px; border: 1px solid var(--rule); background: var(--faint); }
.case .note { margin-top: 8px; font: 16px/1.55 var(--serif); white-space: pre-line; overflow-wrap: anywhere;
  unicode-bidi: isolate; max-width: 74ch; }
.case .truth { margin-top: 10px; font-size: 14px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 18px; margin-top: 14px; }
.answers h4 { margin: 0 0 4px; font-size: 13px; font-weight: 600; color: var(--hue);
  border-bottom: 2px solid var(--hue); padding-bottom: 3px; }
.answers ol { margin: 0; padding-left: 1.5em; font-size: 14px; }
.answers li { padding: 2px 0; overflow-wrap: anywhere; }
.answers li::marker { color: var(--soft); font-size: 12px; }
.answers li.hit { font-weight: 600; }
.answers li.hit::after { content: " \\2713"; color: var(--student); }
.answers li small { font-weight: 400; margin-left: 4px; }
.answers p { font-size: 14px; white-space: pre-line; overflow-wrap: anywhere; }

details { margin-top: 18px; }
summary { cursor: pointer; color: var(--student); font-size: 15px; }
dl.words { font-size: 14px; display: grid; grid-template-columns: max-content minmax(0, 72ch); gap: 6px 20px;
  margin: 14px 0 0; }
dl.words dt { color: var(--ink); font-weight: 600; }
dl.words dd { color: var(--soft); }
footer { padding: 40px 28px 64px; color: var(--soft); font-size: 13px; }

@media (max-width: 900px) { .beside { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) {
  main, header, footer { padding-left: 18px; padding-right: 18px; }
  header { padding-top: 32px; }
  h1 { font-size: 29px; } .lead { font-size: 18px; } h2 { font-size: 22px; }
  .grid { grid-template-columns: minmax(0, 1fr); gap: 16px; }
  .card { padding: 15px 15px; }
  .forest .row { grid-template-columns: minmax(0, 1fr) auto; row-gap: 0; padding-top: 6px; }
  .forest .track { grid-column: 1 / -1; grid-row: 2; height: 26px; }
  .forest .axis .scale { grid-column: 1 / -1; }
  .forest .axis > span:not(.scale) { display: none; }
  .case { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .case img { max-width: 168px; }
  dl.words { grid-template-columns: minmax(0, 1fr); gap: 2px; } dl.words dd { margin-bottom: 8px; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc; --faint: #f4f4f4; --student: #0f6e74;
    --base: #9a6a1f; --teacher: #5a4b9c; --other: #5b646d; --wrong: #a8432f; color-scheme: light; }
  html { zoom: .7; }
  body { font-size: 11pt; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  header { padding-top: 0; } section { padding-top: 26px; }
  .card, .case, tr, .forest, svg, table.results, table.confusion, section > p.soft { break-inside: avoid; }
  h2, h3, section > p.soft { break-after: avoid; }
  .scroll { overflow: visible; } a, summary { color: inherit; }
}
"""
