// What a screen reader and a keyboard need: names of the search and its field, and a way into what scrolls sideways.
function name(selector, words) {
  const element = document.querySelector(selector);
  if (element && !element.getAttribute("aria-label")) element.setAttribute("aria-label", words);
}

function reachable() {
  name(".md-search", "Search");
  name("#__search", "Show the search");
  name("#__drawer", "Show the contents");
  const scrolling = document.querySelectorAll("pre > code, .md-typeset__scrollwrap, .md-typeset__table, .md-sidebar__scrollwrap");
  for (const element of scrolling) {
    if (element.scrollWidth > element.clientWidth) element.tabIndex = 0;
  }
}

addEventListener("load", () => {
  reachable();
  new MutationObserver(reachable).observe(document.body, {childList: true, subtree: true});
});
addEventListener("resize", reachable);
