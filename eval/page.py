"""The HTML that every report stands in: its policy and its looks, light and dark.

`{title}` and `{body}` are replaced, both already escaped, and `{policy}`: the one script that a
page may run, if it has one.
"""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{policy}">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2;
  --paper: #fbfbfa; --card: #fff; --accent: #1f6f5c; --warn: #8a5a00; --warnbg: #fff6e0;
  --bad: #a8322a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a2a8b0; --line: #363b42;
  --paper: #16181b; --card: #1e2125; --accent: #6cc7ae; --warn: #f0c674; --warnbg: #2b2516;
  --bad: #ff9a8d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 .4rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
h2 + p { margin: 0 0 .9rem; color: var(--soft); }
h3 { font-size: .92rem; font-weight: 500; margin: 0 0 .5rem; overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
.verdict { font-size: 1.35rem; line-height: 1.35; margin: 0 0 1.2rem; padding-left: .9rem;
  border-left: 4px solid var(--accent); }
.warning { color: var(--warn); background: var(--warnbg); padding: .6rem .8rem; margin: .6rem 0;
  border-radius: 6px; }
.warning + .verdict { margin-top: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 30rem);
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .8rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
.wide > table:not([class]) th { white-space: normal; overflow-wrap: break-word; max-width: 13rem; }
.wide > table:not([class]) th[scope="col"] { vertical-align: bottom; }
.wide > table:not([class]) td small { white-space: normal; }
.cards { display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .5rem; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.film { display: grid; gap: .9rem; }
.film .row { grid-auto-flow: row;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 11rem), 1fr)); }
figcaption { font-size: .82rem; margin-top: .25rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round;
  stroke-linejoin: round; }
svg .rule { color: var(--line); stroke-width: 1; }
svg .bar { color: var(--card); fill: var(--accent); stroke-width: .6; }
.shapes > div { display: grid; align-items: center; gap: 0 .8rem; padding: .25rem 0;
  grid-template-columns: 2.75rem 6.5rem minmax(3rem, 1fr) 3.5rem 15rem;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line); }
.shapes svg { width: 2.75rem; height: 2.75rem; }
.shapes rect { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.shapes b { font-weight: 500; }
.shapes .track + b { text-align: right; }
.track i { display: block; height: .8rem; border-radius: 3px; background: var(--accent); }
.sheet { display: grid; gap: 1.1rem .8rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 10rem), 1fr)); }
.sheet img { width: auto; max-width: 100%; max-height: 15rem; margin: 0 auto; }
.sheet figcaption { overflow-wrap: anywhere; line-height: 1.35; }
.sheet .clamp { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
.pair { align-items: start; }
.pair img { max-height: 13rem; width: auto; max-width: 100%; }
.reasons { display: grid; gap: .4rem 1rem; }
.reasons > div { display: grid; grid-template-columns: 4.5rem 1fr; gap: .8rem; align-items: center;
  border-bottom: 1px solid var(--line); padding: .3rem 0; }
.reasons > .plain { grid-template-columns: 1fr; }
.reasons img { width: 4.5rem; max-height: 4.5rem; object-fit: contain; border-radius: 4px; }
.reasons b { font-weight: 500; overflow-wrap: anywhere; }
.words { display: flex; flex-wrap: wrap; gap: .35rem; }
.words span { background: var(--card); border: 1px solid var(--line); border-radius: 999px;
  padding: .1rem .6rem; font-size: .85rem; }
.words small { display: inline; margin-left: .35rem; }
h2 + .words, h2 + .reasons { margin-top: .6rem; }
details { margin: .6rem 0; }
details > .reasons { margin-top: .5rem; }
.main { color: var(--accent); }
.pale { color: var(--soft); }
svg .pale { stroke-width: 1; opacity: .55; }
.limit { color: var(--warn); }
svg .limit { stroke-width: 1.2; stroke-dasharray: 5 4; }
.q1 { color: var(--accent); }
.q2 { color: #3f7fbf; }
.q3 { color: #a668b5; }
.q4 { color: #c56a4a; }
.key { margin: .2rem 0 0; font-size: .8rem; }
.key span { display: inline-block; margin-right: 1rem; }
.key span::before { content: ""; display: inline-block; width: 1.1em; margin-right: .4em;
  vertical-align: middle; border-top: 2px solid; }
.key .limit::before { border-top-style: dashed; }
.key .dashed::before { border-top-style: dashed; }
svg .dashed { stroke-dasharray: 7 4; }
.slide { position: sticky; top: 0; z-index: 2; display: flex; align-items: center; gap: .9rem;
  padding: .6rem 0; background: var(--paper); }
.slide[hidden], figure[hidden] { display: none; }
.slide label { font-weight: 600; }
.slide input { flex: 1 1 auto; min-width: 0; max-width: 34rem; height: 1.6rem; margin: 0;
  accent-color: var(--accent); }
.slide output { min-width: 7.5rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sliding .film { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.sliding .film article { display: flex; flex-direction: column; }
.sliding .film .row { margin-top: auto; grid-template-columns: 1fr 1fr; }
.shares { display: grid; gap: .3rem 0; max-width: 44rem; font-variant-numeric: tabular-nums; }
.shares > div { display: grid; align-items: center; gap: 0 .8rem;
  grid-template-columns: minmax(6rem, 13rem) minmax(3rem, 1fr) 5.5rem 3.5rem; }
.shares b { font-weight: 500; line-height: 1.3; }
.shares span:not(.track) { text-align: right; }
.shares i { min-width: 2px; }
.use pre { margin: 0; padding: .6rem .8rem; font-size: .86rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; }
.use h3 { margin: .9rem 0 .3rem; }
.use p { margin: .35rem 0 0; font-size: .88rem; color: var(--soft); }
.listed { font-size: .9rem; width: 100%; }
.listed th, .listed td { padding: .4rem .5rem; }
.listed :is(th, td):first-child { text-align: left; padding-left: 0; white-space: normal;
  overflow-wrap: anywhere; min-width: 9rem; }
.listed .text { text-align: left; }
.listed .wrap { white-space: normal; overflow-wrap: anywhere; }
.listed thead th { vertical-align: bottom; white-space: normal; font-size: .82rem;
  line-height: 1.25; }
.listed button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; }
.listed [aria-sort] button { color: var(--accent); }
.listed [aria-sort="ascending"] button { text-decoration: overline; }
.listed [aria-sort="descending"] button { text-decoration: underline; }
.listed .best { color: var(--accent); }
@media (max-width: 46rem) {
  .shares { gap: .7rem 0; }
  .shares > div { grid-template-columns: minmax(3rem, 1fr) 5rem 3.5rem; }
  .shares b { grid-column: 1 / -1; }
  .stacked, .stacked :is(thead, tbody) { display: block; min-width: 0; }
  .stacked thead tr { display: flex; flex-wrap: wrap; gap: .4rem; padding-bottom: .4rem; }
  .stacked thead th { padding: .15rem .6rem; border: 1px solid var(--line); min-width: 0;
    border-radius: 999px; }
  .stacked thead th:first-child { padding-left: .6rem; min-width: 0; }
  .stacked tbody tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr));
    gap: .5rem .8rem; padding: .8rem 0; border-bottom: 1px solid var(--line); }
  .stacked td, .stacked td:last-child { border: 0; padding: 0; text-align: left; }
  .stacked td:first-child { grid-column: 1 / -1; font-weight: 600; }
  .stacked td:empty { display: none; }
  .stacked td:not(:first-child)::before { content: attr(data-label); display: block;
    color: var(--soft); font-size: .76rem; font-weight: 400; } }
summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; font-size: .82rem; line-height: 1.45; }
a { color: var(--accent); }
.judged { border-left-color: var(--soft); }
.judged b { display: inline-block; margin-right: .6rem; padding: .05rem .7rem; font-size: 1.05rem;
  border-radius: 999px; color: var(--paper); background: var(--soft); white-space: nowrap; }
.judged.keep { border-left-color: var(--accent); }
.judged.keep b { background: var(--accent); }
.judged.unclear { border-left-color: var(--warn); }
.judged.unclear b { background: var(--warn); }
.judged.leave { border-left-color: var(--bad); }
.judged.leave b { background: var(--bad); }
.judged + .warning { font-size: .88rem; line-height: 1.45; margin: 0; padding: .45rem .8rem; }
.first { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem 1.6rem;
  margin-top: .9rem; }
.first > div { flex: 0 1 auto; min-width: 0; max-width: 100%; }
.first > .strip { flex: 1 1 15rem; }
.close { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.over { display: grid; grid-template-columns: minmax(0, 1fr); }
.over .scores { width: 100%; }
.over > .strip { order: -1; grid-template-columns: repeat(5, minmax(0, 1fr)); }
.strip { display: grid; gap: .7rem 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)); }
.strip p { margin: 0 0 .2rem; font-size: .78rem; line-height: 1.3; color: var(--soft);
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.strip figcaption { margin-top: .1rem; font-size: .76rem; color: var(--soft); }
.strip .row { gap: .35rem; }
.strip img { max-height: 11rem; object-fit: contain; object-position: left; }
.scores { font-size: .92rem; }
.scores th, .scores td { padding: .32rem .45rem; }
.scores thead th { vertical-align: bottom; white-space: normal; max-width: 6.4rem;
  font-size: .82rem; line-height: 1.25; }
.scores th:first-child { padding-left: 0; white-space: normal; min-width: 11.6rem; max-width: 13rem;
  line-height: 1.3; }
.scores i { font-style: normal; font-weight: 400; font-size: .74rem; color: var(--soft);
  white-space: nowrap; }
.scores b { font-weight: 500; }
.scores small { font-size: .74rem; line-height: 1.25; }
.scores .own { background: var(--card); }
.scores .own b { font-weight: 700; }
.scores .told > * { border-bottom: 0; padding-bottom: .1rem; }
.scores .note td { text-align: left; white-space: normal; padding: 0 0 .35rem; }
.note p { margin: 0; position: sticky; left: 0; width: 0; min-width: min(100%, 92vw);
  color: var(--warn); font-size: .8rem; line-height: 1.35; }
.say { font-size: .72rem; padding: .05rem .4rem; border-radius: 999px; margin-left: .35rem;
  border: 1px solid; color: var(--soft); }
.say.good { color: var(--accent); }
.say.poor { color: var(--bad); }
.legend { margin: .5rem 0 0; width: 0; min-width: 100%; font-size: .8rem; line-height: 1.4;
  color: var(--soft); }
.grids { display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.grids h3 small { display: inline; margin-left: .4rem; }
.grid { display: grid; gap: .3rem .4rem; align-items: start; overflow-x: auto;
  grid-template-columns: 4.2rem repeat(var(--n), minmax(5.5rem, 1fr)); }
.grid > span { font-size: .78rem; color: var(--soft); line-height: 1.3; align-self: center; }
.grid > .seed { text-align: center; font-size: .72rem; }
.grid figcaption { margin-top: .1rem; font-size: .74rem; color: var(--soft); text-align: center; }
.plainly { margin: .4rem 0 0; padding-left: 1.1rem; }
.plainly li { margin: .2rem 0; }
@media (max-width: 46rem) { .shapes > div {
  grid-template-columns: 2.75rem 6rem 1fr 3rem; } .shapes small { grid-column: 2 / -1; } }
@media (max-width: 34rem) { dl { display: block; } dd { margin: 0 0 .6rem; }
  body { padding: .9rem; }
  .grid { grid-template-columns: repeat(var(--n), minmax(6rem, 1fr)); }
  .first > .strip { order: 0; grid-template-columns: 1fr; }
  .grid > .corner { display: none; }
  .grid > .arm { grid-column: 1 / -1; position: sticky; left: 0; justify-self: start; }
  .scores th, .scores td { white-space: nowrap; padding: .32rem .3rem; }
  .scores thead th { max-width: 4.6rem; }
  .scores th:first-child { position: sticky; left: 0; z-index: 1; background: var(--paper);
    min-width: 6.6rem; max-width: 6.6rem; white-space: normal; overflow-wrap: anywhere; }
  .scores td:not(.own, .moved) small { display: none; }
  .scores .moved small { white-space: normal; max-width: 4.4rem; margin-left: auto; }
  .strip img { max-height: none; }
  .say { display: block; border: 0; padding: 0; margin: 0; }
  .verdict { font-size: 1.15rem; }
  th, td { padding: .4rem .5rem; white-space: normal; }
  th:last-child, td:last-child { padding-right: 0; } }
</style>
</head>
<body>
{body}
</body>
</html>
"""
