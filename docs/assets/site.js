// What scrolls sideways can be reached with the keyboard, and the search has a name.
function reachable() {
  for (const part of document.querySelectorAll("pre code, .md-typeset__scrollwrap, .wide")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => {
    nav.setAttribute("aria-label", `Code ${i + 1}`);
  });
  const seen = {};
  for (const nav of document.querySelectorAll("nav[aria-label]")) {
    const label = nav.getAttribute("aria-label").replace(/ \(\d+\)$/, "");
    seen[label] = (seen[label] ?? 0) + 1;
    if (seen[label] > 1) nav.setAttribute("aria-label", `${label} (${seen[label]})`);
  }
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
}
addEventListener("load", () => requestAnimationFrame(reachable));
addEventListener("resize", reachable);
