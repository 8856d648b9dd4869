// Keeps a page up to date: the server sends what has changed of it, made and escaped there. Without this script the page stays as it was.
"use strict";
(() => {
  const main = document.querySelector("main[data-events]");
  const live = document.getElementById("live");
  const pause = document.getElementById("pause");
  if (!main || !window.EventSource) return;

  let source = null;
  let paused = false;
  const waiting = new Map();

  const isInUse = (part) => {
    const chosen = document.getSelection();
    const reads = chosen && !chosen.isCollapsed && part.contains(chosen.anchorNode);
    return reads || (document.activeElement !== main && part.contains(document.activeElement));
  };
  // What somebody is reading or has the keyboard in is left alone until they go on.
  const show = () => {
    for (const [id, html] of waiting) {
      const part = document.getElementById(id);
      if (part && isInUse(part)) continue;
      if (part) part.innerHTML = html;
      waiting.delete(id);
    }
  };
  const say = (text) => { if (live.textContent !== text) live.textContent = text; };

  const start = () => {
    if (source || paused || document.hidden) return;
    source = new EventSource(main.dataset.events);
    source.addEventListener("open", () => say("Live."));
    source.addEventListener("parts", (event) => {
      for (const [id, html] of Object.entries(JSON.parse(event.data))) waiting.set(id, html);
      show();
    });
    source.addEventListener("error", () => {
      say(source && source.readyState === EventSource.CLOSED ? "Not live: the node keeps enough pages up to date." : "Not live: the node does not answer.");
    });
  };
  const stop = (text) => {
    if (source) source.close();
    source = null;
    say(text);
  };

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Go on" : "Pause";
    if (paused) stop("Paused."); else start();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) stop("Not live while it is not looked at."); else start();
  });
  document.addEventListener("focusout", () => setTimeout(show, 0));
  document.addEventListener("selectionchange", show);
  start();
})();
