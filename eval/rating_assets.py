"""The HTML, style and script of a rating page.

Script and style are inline, since the page is one file, and allowed by their hashes: nothing else
in the page can run, whatever a prompt says, and nothing can be fetched or sent. The pictures and
prompts are JSON in an element that is not run.
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; form-action 'none'">
<title>Rating pictures</title>
<style>{style}</style>
</head>
<body>
<header>
<p id="question">{question}</p>
<p id="prompt"></p>
</header>
<main id="pictures"></main>
<nav id="buttons" aria-label="Your vote"></nav>
<p id="said" role="status"></p>
<footer>
<progress id="bar" value="0" max="1" aria-label="Progress"></progress>
<span id="progress"></span>
<button type="button" id="undo">Undo <kbd>Backspace</kbd></button>
<label>Your name <input id="rater" autocomplete="off" maxlength="60"></label>
<button type="button" id="save">Save votes</button>
</footer>
<noscript>This page needs its script to take votes.</noscript>
<script type="application/json" id="content">{content}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2;
  --paper: #fbfbfa; --card: #fff; --accent: #1f6f5c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a2a8b0; --line: #363b42;
  --paper: #16181b; --card: #1e2125; --accent: #6cc7ae; } }
* { box-sizing: border-box; }
html, body { height: 100%; margin: 0; }
body { display: flex; flex-direction: column; gap: .7rem; padding: 1rem; max-width: 76rem;
  margin: 0 auto; background: var(--paper); color: var(--ink);
  font: 1rem/1.4 system-ui, -apple-system, "Segoe UI", sans-serif; }
header { text-align: center; }
p { margin: 0; }
#question { color: var(--soft); }
#prompt { font-size: 1.3rem; overflow-wrap: anywhere; }
main { flex: 1 1 0; min-height: 9rem; display: flex; gap: 1rem; justify-content: center; }
main img { flex: 0 1 38rem; min-width: 0; width: 100%; height: 100%; object-fit: contain; }
nav { display: flex; flex-wrap: wrap; gap: .6rem; justify-content: center; }
button { font: inherit; color: inherit; padding: .55rem 1.1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; cursor: pointer; }
button:hover:enabled { border-color: var(--accent); }
button:disabled { opacity: .45; cursor: default; }
button:focus-visible, input:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
#save.due { background: var(--accent); border-color: var(--accent); color: var(--paper); }
kbd { font: inherit; font-size: .78rem; color: var(--soft); border: 1px solid var(--line);
  border-radius: 4px; padding: 0 .35rem; margin-left: .3rem; }
#said { text-align: center; min-height: 1.4em; color: var(--accent); }
footer { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center;
  justify-content: center; padding-top: .7rem; border-top: 1px solid var(--line); }
footer, footer button { font-size: .9rem; }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .35rem .5rem; width: 10rem; }
progress { width: 9rem; accent-color: var(--accent); }
#progress { color: var(--soft); font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) { body { padding: .7rem; } main { gap: .4rem; } kbd { display: none; }
  #prompt { font-size: 1.1rem; } }
"""

SCRIPT = """
'use strict';
const content = JSON.parse(document.getElementById('content').textContent);
const at = id => document.getElementById(id);
const choices = content.kind === 'pair'
  ? [['left', 'Left', '1'], ['equal', 'Equal', '0'], ['right', 'Right', '2']]
  : [1, 2, 3, 4, 5].map(score => [score, String(score), String(score)]);
const named = content.kind === 'pair' ? ['left picture', 'right picture'] : ['picture'];
const place = 'rating-' + content.page;
let votes = [];

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(place)) || {};
    votes = (kept.votes || []).slice(0, content.items.length);
    at('rater').value = kept.rater || '';
  } catch (error) { at('said').textContent = 'This browser keeps no votes: save before closing.'; }
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify({ rater: at('rater').value, votes }));
  } catch (error) { at('said').textContent = 'This browser keeps no votes: save before closing.'; }
}

function picture(address, name) {
  const image = document.createElement('img');
  image.alt = name;
  image.src = address;
  return image;
}

function show() {
  const item = content.items[votes.length];
  at('prompt').textContent = item ? item.prompt
    : 'That was all, thank you. Write your name and save your votes.';
  at('pictures').replaceChildren(
    ...(item ? item.pictures.map((address, k) => picture(address, named[k])) : []));
  at('bar').max = content.items.length;
  at('bar').value = votes.length;
  at('progress').textContent = votes.length + ' of ' + content.items.length;
  at('undo').disabled = !votes.length;
  at('question').hidden = !item;
  for (const button of at('buttons').children) button.disabled = !item;
  at('save').classList.toggle('due', !item);
}

function vote(choice) {
  if (votes.length >= content.items.length) return;
  votes.push(choice);
  at('said').textContent = '';
  keep();
  show();
}

function undo() {
  votes.pop();
  at('said').textContent = '';
  keep();
  show();
}

function save() {
  const rater = at('rater').value.trim();
  if (!rater) {
    at('said').textContent = 'Write your name first, or any name, so that votes are counted once.';
    at('rater').focus();
    return;
  }
  const saved = { format: 1, page: content.page, kind: content.kind, rater,
    votes: votes.map((vote, item) => ({ item, vote })) };
  const link = document.createElement('a');
  link.href = URL.createObjectURL(
    new Blob([JSON.stringify(saved, null, 1)], { type: 'application/json' }));
  link.download = 'votes-' + rater.replace(/[^A-Za-z0-9_-]+/g, '_') + '.json';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  at('said').textContent = 'Saved as ' + link.download + '.';
}

for (const [choice, label, key] of choices) {
  const button = document.createElement('button');
  const hint = document.createElement('kbd');
  button.type = 'button';
  hint.textContent = key;
  button.append(label, ...(label === key ? [] : [hint]));
  button.addEventListener('click', () => vote(choice));
  at('buttons').append(button);
}
document.addEventListener('keydown', event => {
  if (event.target === at('rater') || event.ctrlKey || event.metaKey || event.altKey) return;
  const chosen = choices.find(([, , key]) => key === event.key);
  if (chosen && !event.repeat) vote(chosen[0]);
  else if (event.key === 'Backspace') undo();
});
at('rater').addEventListener('input', keep);
at('undo').addEventListener('click', undo);
at('save').addEventListener('click', save);
restore();
show();
"""
