// A feature's page: the next and the previous of its site, and its link.
"use strict";

(() => {
  const to = (rel) => {
    const a = document.querySelector(`a[rel=${rel}]`);
    return a && (() => a.click());
  };
  W.page.next = to("next");
  W.page.previous = to("prev");
  const copy = W.$("copy");
  if (!navigator.clipboard) copy.hidden = true; // not over plain http from another machine
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(location.href.split("#")[0]);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not allowed here";
    }
    setTimeout(() => (copy.textContent = "Copy link"), 1500);
  });
})();
