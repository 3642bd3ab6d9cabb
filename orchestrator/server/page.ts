/**
 * The first page and its login: HTML, style and script as served, without anything from elsewhere. It asks the API every
 * second while it is visible and draws what it hears; all text goes in as text, never as HTML. Served by server.ts.
 */

const ICON = `data:image/svg+xml,${encodeURIComponent(
  '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="4" cy="4" r="2"/><circle cx="12" cy="8" r="2"/><circle cx="4" cy="12" r="2"/></svg>',
)}`;

const head = (title: string): string => `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>${title}</title>
<link rel="icon" href="${ICON}">
<link rel="stylesheet" href="/page.css">
</head>`;

export const PAGE_HTML = `${head('cuda-nn')}
<body>
<header><h1>cuda-nn</h1><nav><a href="/queues">queues</a><a href="/metrics">metrics</a></nav><output id="state" aria-live="polite">connecting</output></header>
<main>
<section aria-labelledby="runs-title"><h2 id="runs-title">Runs</h2><div id="runs"><p class="none">loading</p></div></section>
<section aria-labelledby="workers-title"><h2 id="workers-title">Workers</h2><div id="workers" class="scroll"></div></section>
<section aria-labelledby="queues-title"><h2 id="queues-title">Queues</h2><div id="queues" class="scroll"></div></section>
</main>
<noscript><p>This page needs JavaScript; <a href="/api/runs">/api/runs</a> does not.</p></noscript>
<script src="/page.js" defer></script>
</body>
</html>
`;

export const LOGIN_HTML = `${head('cuda-nn: log in')}
<body>
<header><h1>cuda-nn</h1></header>
<main><form method="post" action="/login" class="card"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus><button>Log in</button>
<p class="quiet">The value of CUDA_NN_TOKEN on the server.</p></form></main>
</body>
</html>
`;

export const PAGE_CSS = `:root {
  --ground: #f6f7f9; --card: #fff; --ink: #16191f; --quiet: #5b6472; --line: #dfe3e9; --accent: #2f6df0;
  --good: #17803d; --bad: #c02626; --warn: #9a6700;
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #0f1216; --card: #171b21; --ink: #e6e9ee; --quiet: #98a2b1; --line: #2a303a; --accent: #78a4ff; --good: #57c47a; --bad: #ff7b72; --warn: #e3b341; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; padding: 1rem clamp(.75rem, 3vw, 2rem); border-bottom: 1px solid var(--line); }
h1 { font-size: 1.1rem; margin: 0; letter-spacing: -.01em; }
h2 { font-size: .8rem; text-transform: uppercase; letter-spacing: .08em; color: var(--quiet); margin: 1.5rem 0 .5rem; }
nav { display: flex; gap: .75rem; }
a { color: var(--accent); }
#state { margin-left: auto; color: var(--quiet); font-size: .85rem; }
#state.lost { color: var(--bad); }
main { padding: 0 clamp(.75rem, 3vw, 2rem) 3rem; max-width: 80rem; margin: 0 auto; }
#runs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .75rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; min-width: 0; }
.card h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
.top { display: flex; gap: .75rem; align-items: baseline; justify-content: space-between; }
.phase { font-size: .75rem; font-weight: 600; color: var(--quiet); white-space: nowrap; }
.phase.running { color: var(--accent); } .phase.completed { color: var(--good); } .phase.failed { color: var(--bad); }
.phase.pausing, .phase.paused { color: var(--warn); }
progress { width: 100%; height: .4rem; margin: .6rem 0 .2rem; accent-color: var(--accent); }
.chart { display: block; width: 100%; height: 4.5rem; margin: .5rem 0; }
.chart path { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .4rem .8rem; margin: .4rem 0; }
dt { font-size: .72rem; color: var(--quiet); } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.quiet, .none { color: var(--quiet); font-size: .85rem; margin: .3rem 0; overflow-wrap: anywhere; }
.error { color: var(--bad); font-size: .85rem; margin: .3rem 0; overflow-wrap: anywhere; }
details { font-size: .85rem; } summary { cursor: pointer; color: var(--warn); }
details ul { margin: .3rem 0; padding-left: 1.1rem; } details li { overflow-wrap: anywhere; }
.verbs { display: flex; gap: .4rem; margin-top: .6rem; }
button { font: inherit; font-size: .85rem; padding: .25rem .7rem; border-radius: .4rem; border: 1px solid var(--line); background: transparent; color: inherit; cursor: pointer; }
button:hover { border-color: var(--accent); } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
th, td { text-align: left; padding: .45rem .8rem; border-top: 1px solid var(--line); white-space: nowrap; font-variant-numeric: tabular-nums; }
th { border-top: 0; font-size: .72rem; font-weight: 600; color: var(--quiet); } td.n, th.n { text-align: right; }
form.card { max-width: 24rem; margin: 3rem auto; display: grid; gap: .6rem; }
input { font: inherit; padding: .4rem .6rem; border-radius: .4rem; border: 1px solid var(--line); background: var(--ground); color: inherit; }
`;

export const PAGE_SCRIPT = `'use strict';
const SVG = 'http://www.w3.org/2000/svg';
const PERIOD_MS = 1000;
const LIVE = ['queued', 'running', 'pausing', 'paused'];
const curves = new Map();
const byId = (id) => document.getElementById(id);
const el = (tag, props = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) key in node ? (node[key] = value) : node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
};
const number = (value, digits) => (value === null || value === undefined ? '\\u2013' : value.toLocaleString('en', { maximumFractionDigits: digits }));
const loss = (value) => (value === null || value === undefined ? '\\u2013' : value.toFixed(4));
const duration = (ms) => {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 60 ? s + ' s' : s < 3600 ? Math.floor(s / 60) + ' min ' + (s % 60) + ' s' : Math.floor(s / 3600) + ' h ' + Math.floor((s % 3600) / 60) + ' min';
};

async function ask(path, options) {
  const reply = await fetch(path, { headers: { accept: 'application/json' }, ...options });
  if (reply.status === 401) location.assign('/login');
  const body = await reply.json();
  if (!reply.ok) throw new Error(body.error ? body.error.message : reply.statusText);
  return body;
}

function chart(curve) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('class', 'chart');
  svg.setAttribute('viewBox', '0 0 100 40');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('role', 'img');
  const { steps, losses } = curve;
  svg.setAttribute('aria-label', 'loss by step, now ' + loss(losses[losses.length - 1]));
  if (steps.length < 2) return svg;
  const low = Math.min(...losses), high = Math.max(...losses), first = steps[0], span = steps[steps.length - 1] - first || 1;
  const point = (index) => (100 * (steps[index] - first) / span).toFixed(2) + ' ' + (38 - 36 * (losses[index] - low) / (high - low || 1)).toFixed(2);
  const path = document.createElementNS(SVG, 'path');
  path.setAttribute('d', 'M' + steps.map((_, index) => point(index)).join('L'));
  svg.append(path);
  return svg;
}

const wayText = ({ workers, exchange, reason }) => (workers > 0 ? workers + (workers === 1 ? ' worker, ' : ' workers, ') + exchange + ': ' : '') + reason;

const list = (id, open, title, lines) =>
  el('details', { open, id }, el('summary', {}, title), el('ul', {}, ...lines.map((line) => el('li', {}, line))));

function faultList(run, open) {
  if (run.faults.length === 0) return null;
  const counts = Object.entries(run.faultCounts).sort((a, b) => b[1] - a[1]);
  const all = counts.reduce((sum, [, count]) => sum + count, 0);
  const title = all + (all === 1 ? ' fault: ' : ' faults: ') + counts.map(([code, count]) => count + ' ' + code).join(', ');
  return list('faults-' + run.run, open, title, run.faults.slice(-20).reverse().map(({ atMs, what, worker, error }) =>
    new Date(atMs).toLocaleTimeString() + ' ' + what + (worker ? ' (' + worker + ')' : '') + ': ' + error.code + ', ' + error.message));
}

function attemptList(run, open) {
  if (run.attempts.length < 2) return null;
  const attempts = run.attempts.slice(-10).reverse();
  return list('attempts-' + run.run, open, 'attempt ' + attempts[0].number, attempts.map(({ number: nth, fromStep, toStep, runningMs, phase, error }) =>
    nth + ': steps ' + fromStep + ' to ' + toStep + ', ' + duration(runningMs) + ', ' + phase + (error ? ', ' + error.code : '')));
}

function runCard(run, opened, openedAttempts) {
  const facts = [
    ['step', number(run.step) + ' / ' + number(run.steps)],
    ['loss', loss(run.lastReport && run.lastReport.loss)],
    ['validation', loss(run.validation && run.validation.loss)],
    ['tokens/s', number(run.tokensPerSecond, 0)],
    ['time', run.startedAtMs === null ? '\\u2013' : duration((run.finishedAtMs || Date.now()) - run.startedAtMs)],
  ];
  if (run.skippedSteps > 0) facts.push(['skipped', number(run.skippedSteps)]);
  if (run.rollbacks.length > 0) facts.push(['rolled back', number(run.rollbacks.length) + (run.rollbacks.length === 1 ? ' time' : ' times')]);
  const verb = (name) => el('button', { type: 'button', onclick: () => ask('/api/runs/' + encodeURIComponent(run.run) + '/' + name, { method: 'POST' }).then(draw, say) }, name);
  const verbs = { queued: ['cancel'], running: ['pause', 'cancel'], pausing: ['resume', 'cancel'], paused: ['resume', 'cancel'], failed: ['retry'], cancelled: ['retry'] }[run.phase] || [];
  return el('article', { className: 'card' },
    el('div', { className: 'top' }, el('h3', {}, run.run), el('span', { className: 'phase ' + run.phase }, run.phase)),
    el('progress', { max: run.steps, value: run.step, ariaLabel: 'steps of ' + run.run }),
    chart(curves.get(run.run) || { steps: [], losses: [] }),
    el('dl', {}, ...facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value)))),
    run.way && LIVE.includes(run.phase) ? el('p', { className: 'quiet' }, wayText(run.way)) : null,
    run.error ? el('p', { className: 'error' }, run.error.code + ': ' + run.error.message) : null,
    faultList(run, opened),
    attemptList(run, openedAttempts),
    verbs.length > 0 ? el('div', { className: 'verbs' }, ...verbs.map(verb)) : null);
}

function table(columns, rows, none) {
  if (rows.length === 0) return el('p', { className: 'none' }, none);
  const cell = (tag, text, index) => el(tag, { className: columns[index][1] || '' }, text);
  return el('table', {}, el('thead', {}, el('tr', {}, ...columns.map(([title], index) => cell('th', title, index)))),
    el('tbody', {}, ...rows.map((row) => el('tr', {}, ...row.map((text, index) => cell('td', text, index))))));
}

const say = (error) => {
  const state = byId('state');
  state.textContent = error ? error.message : 'live';
  state.className = error ? 'lost' : '';
};

async function draw() {
  const [{ runs }, { workers }, { queues }] = await Promise.all([ask('/api/runs'), ask('/api/workers'), ask('/api/queues')]);
  await Promise.all(runs.slice(0, 24).map(async (run) => {
    if (!curves.has(run.run) || LIVE.includes(run.phase) || curves.get(run.run).phase !== run.phase) {
      curves.set(run.run, { ...(await ask('/api/runs/' + encodeURIComponent(run.run) + '/curve')), phase: run.phase });
    }
  }));
  const focus = document.activeElement && document.activeElement.tagName === 'BUTTON' && byId('runs').contains(document.activeElement);
  if (!focus) {
    const open = new Set([...document.querySelectorAll('details[open]')].map((node) => node.id));
    const cards = runs.slice(0, 100).map((run) => runCard(run, open.has('faults-' + run.run), open.has('attempts-' + run.run)));
    byId('runs').replaceChildren(...(runs.length === 0 ? [el('p', { className: 'none' }, 'No run yet: cuda-nn train SPEC')] : cards));
  }
  const rows = workers.map(({ id, state, device, host, replica }) => [id, state, device.name, host, replica ? replica.run + ' @ ' + replica.step : '\\u2013']);
  byId('workers').replaceChildren(table([['worker'], ['state'], ['device'], ['host'], ['replica']], rows, 'No live worker: cuda-nn worker'));
  const states = ['waiting', 'active', 'delayed', 'completed', 'failed'];
  byId('queues').replaceChildren(table([['queue'], ...states.map((state) => [state, 'n'])],
    Object.entries(queues).map(([name, counts]) => [name, ...states.map((state) => number(counts[state]))]), ''));
  say(null);
}

async function loop() {
  if (!document.hidden) await draw().catch(say);
  setTimeout(loop, PERIOD_MS);
}
document.addEventListener('visibilitychange', () => { if (!document.hidden) draw().catch(say); });
loop();
`;
