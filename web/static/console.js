// Takes a fresh copy of the page every few seconds and puts its live parts in place of the old ones. A part
// that is in use stays as it is. Without JavaScript the page is the same, but not refreshed.
"use strict";
const EVERY_MS = 5000;

function inUse(part) {
  return part.contains(document.activeElement) || part.querySelector("input:checked") !== null;
}

async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch(location.pathname + location.search.replace(/([?&])notice=[^#]*/, ""), { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelectorAll("[data-live]").forEach((part) => {
      const next = fresh.getElementById(part.id);
      if (next && !inUse(part)) part.replaceWith(next);
    });
    document.title = fresh.title;
    document.body.classList.remove("stale");
  } catch {
    document.body.classList.add("stale");
  }
}

setInterval(refresh, EVERY_MS);
document.addEventListener("visibilitychange", refresh);
