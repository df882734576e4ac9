"""The look of a report: one column of text, figures two abreast where there is room, sensible on paper."""

STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#5b6470;--rule:#dfe3e8;--paper:#fff;--wash:#f5f7f9;--blue:#0072b2;
--mark:#ffe9a8;--under:#d55e00;--here:#e8f2f9;--faint:#9aa3ad;--win:#0072b2;--loss:#b84c00}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e3e7ec;--soft:#a1abb6;--rule:#2c343d;--paper:#14171b;
--wash:#1d2228;--blue:#4ba9e2;--mark:#5a4a16;--under:#f08a4b;--here:#172c3b;--faint:#66707b;--win:#4ba9e2;--loss:#f08a4b}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 -apple-system,"Segoe UI",Inter,Roboto,
"Helvetica Neue",
Arial,"Liberation Sans",sans-serif}
main{max-width:1060px;margin:0 auto;padding:40px 28px 60px}
header{border-bottom:1px solid var(--rule);padding-bottom:18px;margin-bottom:22px}
.kicker{margin:0;color:var(--blue);font-weight:600;font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{font-size:34px;line-height:1.15;letter-spacing:-.015em;margin:4px 0 8px;text-wrap:balance}
h2{font-size:22px;letter-spacing:-.01em;margin:44px 0 10px}
h3{font-size:16px;margin:22px 0 8px}
.sub{margin:0;color:var(--soft)}
p{max-width:74ch}
.lead{font-size:18px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:24px 0}
.card{background:var(--wash);border-radius:8px;padding:14px 16px}
.value{font-size:30px;font-weight:600;letter-spacing:-.02em;line-height:1.2;font-variant-numeric:tabular-nums}
.value.long{font-size:16.5px;line-height:36px;letter-spacing:-.03em;white-space:nowrap}
.label{font-size:14px;line-height:1.35}
.note{font-size:12.5px;color:var(--soft);margin-top:4px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:28px 32px;margin:32px 0;
align-items:start}
figure{margin:0;break-inside:avoid}
figure img{display:block;width:100%;max-width:760px;height:auto}
figcaption{font-size:14px;color:var(--soft);line-height:1.45;margin-top:6px}
figcaption b{color:var(--ink)}
.scroll{overflow-x:auto}
.scroll table{font-size:12.5px}
.scroll th,.scroll td{padding:5px 6px}
table{border-collapse:collapse;font-size:13.5px;width:100%;font-variant-numeric:tabular-nums}
table.narrow{width:auto;min-width:340px}
th,td{padding:5px 7px;text-align:right;white-space:nowrap;vertical-align:bottom}
th:first-child{text-align:left;font-weight:400}
thead th{font-weight:600;color:var(--soft);border-bottom:1.5px solid var(--ink)}
thead th:first-child{font-weight:600}
tbody tr{border-bottom:1px solid var(--rule)}
tr.group th{font-weight:600;padding-top:14px}
tr.here{background:var(--here)}
.verdict{font-weight:600}
.verdict.win{color:var(--win)}
.verdict.loss{color:var(--loss)}
.verdict.tie{color:var(--soft)}
p .verdict.tie{color:inherit}
.ci{color:var(--soft);font-size:.88em}
details{margin:14px 0}
summary{cursor:pointer;font-weight:600}
.small{font-size:13.5px;color:var(--soft)}
.atoms{columns:2 440px;column-gap:32px}
.atom{break-inside:avoid;margin:0 0 20px}
.atom h3{margin:0 0 6px;border-bottom:1px solid var(--rule);padding-bottom:4px}
.atom h3 span{font-weight:400;color:var(--soft);font-size:13px;margin-left:6px}
.about{margin:3px 0;font-size:12.5px}
.about code{background:var(--wash);border-radius:4px;padding:1px 4px;white-space:pre-wrap}
.context{display:flex;gap:8px;align-items:baseline;margin:5px 0;font-size:12.5px}
.context code{flex:1;min-width:0;font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
white-space:pre-wrap;
tab-size:4;overflow-wrap:anywhere;background:var(--wash);border-radius:4px;padding:2px 6px}
.context .act{flex:none;width:3.2em;text-align:right;color:var(--soft);font-variant-numeric:tabular-nums}
.context .doc{flex:none;max-width:9em;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;color:var(--soft);
font-size:11.5px}
mark{background:var(--mark);color:inherit;box-shadow:inset 0 -2px 0 var(--under);border-radius:2px;font-weight:700}
.nl{color:var(--faint)}
.warning{border-left:3px solid var(--under);padding:2px 0 2px 12px}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;overflow-wrap:anywhere}
a{color:var(--blue)}
table.claims{table-layout:fixed}
.claims th,.claims td{white-space:normal;text-align:left;vertical-align:top;overflow-wrap:anywhere;
padding:7px 9px 7px 0}
.claims th:first-child{width:27%}
.claims thead th:nth-child(2){width:17%}
.claims thead th:nth-child(4){width:20%}
.claims tr.group th{padding-top:18px}
.claims tr.group code{display:block;font-weight:400;color:var(--soft)}
.study{border-top:1px solid var(--rule);margin-top:40px}
.study h2{margin-top:26px}
.study .scroll th{white-space:normal;min-width:11em}
.study .scroll th,.study .scroll td{vertical-align:top}
.study figure{max-width:640px}
.overview{max-width:760px;margin:24px 0}
.finding{margin:12px 0}.finding p{margin:4px 0 0}
.answers li{max-width:80ch;margin:4px 0}
footer{margin-top:44px;border-top:1px solid var(--rule);padding-top:12px;color:var(--soft);font-size:12.5px}
@media (max-width:720px){.claims,.claims tbody,.claims tr,.claims th,.claims td,.claims th:first-child{display:block;
width:auto}.claims thead{display:none}.claims tr{padding:8px 0}.claims th,.claims td{padding:2px 0}
.claims td:before{content:attr(data-label) ": ";color:var(--soft)}}
@media (max-width:640px){table.narrow{display:block;overflow-x:auto;min-width:0}
main{padding:22px 16px 40px}h1{font-size:26px}.context .doc{display:none}}
@media print{main{max-width:none;padding:0}body{font-size:10.5pt}.card,.context code,tr.here,
mark{-webkit-print-color-adjust:exact;
print-color-adjust:exact}.scroll{overflow:visible}h2{break-after:avoid}}
"""
