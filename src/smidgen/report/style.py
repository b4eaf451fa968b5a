"""The page's style sheet: one column on a phone, two on a screen; light or dark as the reader has it."""

__all__ = ["STYLE"]

STYLE = """
:root{--page:#fbfbfa;--card:#fff;--ink:#1c1d1f;--soft:#62666d;--line:#e3e4e6;--a:#2a6fdb;--b:#c2570c;--mark:#dcecff;
--good:#18794e;--bad:#b42318}
@media (prefers-color-scheme:dark){:root{--page:#131416;--card:#1b1d20;--ink:#e8e9eb;--soft:#9da2a9;--line:#303338;
--a:#6ea8ff;--b:#f59f5c;--mark:#1f3f6b;--good:#4cc38a;--bad:#ff8a7a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:24px 16px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:26px;line-height:1.2;margin:0}
h2{font-size:18px;margin:32px 0 12px}
header p{margin:6px 0 0;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:12px;margin:20px 0 0}
.tiles div,figure,.answer,details{background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:12px 14px}
dt{color:var(--soft);font-size:13px}
dd{margin:0}
.tiles dd{white-space:nowrap;font-size:19px;font-weight:600}
.tiles small{display:block;font-size:13px;font-weight:400;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px;align-items:start}
figure{margin:0;min-width:0}
figure+figure{margin-top:0}
section>figure{margin-top:12px}
figcaption{font-weight:600;margin-bottom:8px}
svg{display:block;width:100%;height:auto}
svg text{font-size:14px;fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}
path.line,path.dots,path.faint{fill:none;stroke-width:2;stroke-linejoin:round}
path.faint{stroke-width:1;opacity:.35}
path.a{stroke:var(--a)}path.b{stroke:var(--b)}circle.a{fill:var(--a)}circle.b{fill:var(--b)}
.key{font-weight:400;font-size:13px;color:var(--soft);margin-left:14px;white-space:nowrap}
.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle;background:var(--a)}
.key.b::before{background:var(--b)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;font-weight:400;padding:4px 12px 4px 0;border-top:1px solid var(--line);vertical-align:top}
tr:first-child th,tr:first-child td{border-top:0}
th{color:var(--soft);white-space:nowrap}
td{font-variant-numeric:tabular-nums;width:99%}
.bars td:last-child{text-align:right;white-space:nowrap;width:1%;padding-right:0}
.bars th,.bars td{border:0;white-space:nowrap;vertical-align:middle}
.bars th{text-align:right;font-variant-numeric:tabular-nums}
.bar{height:14px;min-width:1px;border-radius:0 3px 3px 0;background:var(--a)}
pre{margin:0;white-space:pre-wrap;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
mark{background:var(--mark);color:inherit;border-radius:3px}
.answer{display:grid;grid-template-columns:auto 1fr;gap:4px 14px;margin:0 0 12px}
.answer dd{white-space:pre-wrap;font:13px/1.6 ui-monospace,Menlo,Consolas,monospace}
.answer dt{line-height:21px}
.right::before{content:"\\2713\\a0 ";color:var(--good)}
.wrong::before{content:"\\2717\\a0 ";color:var(--bad)}
details{margin-top:12px}
summary{cursor:pointer;font-weight:600}
details table{margin-top:8px}
ul{margin:0;padding-left:20px}
@media (max-width:480px){svg text{font-size:16px}th{white-space:normal;min-width:112px}
.bars th{min-width:0}.bars th,.bars td{font-size:13px;padding-right:8px}
.answer{grid-template-columns:1fr}}
"""
