// Run before anything is drawn: the colours that were chosen here before, else the system's.
"use strict";
(() => {
  let kept = null;
  try {
    kept = localStorage.getItem("writesae-theme");
  } catch { /* storage is off */ }
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  document.documentElement.classList.add("js");
})();
